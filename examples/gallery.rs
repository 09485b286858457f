//! The pictures of README.md and docs/, made by `dinv` itself on the demo suite.
//!
//! ```text
//! just gallery                    every sheet, into docs/images
//! just gallery strength folder    these only
//! ```
//!
//! Every picture comes from a command that a user can type; this program only runs them, with seed 0, and lays the
//! results out. Analogies in `gallery` are picked, one for each attribute of the demo world. Those in `compared` and
//! `losses` are the first six of the validation suite as `dinv eval run --limit 6` takes them, learned as docs/study.md
//! did (`demo/benchmark/study.toml`).

#![expect(clippy::print_stdout, reason = "the files are the result")]

#[path = "../crates/dinv/src/cli/canvas.rs"]
#[allow(dead_code, reason = "the sheets need a part of it")]
mod canvas;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use image::RgbImage;
use serde::Deserialize;

use canvas::{ACCENT, Canvas, GREY, INK, RULE, bold, pixel, regular};

const SUITE: &str = "demo/benchmark/validation";
const IMAGES: &str = "docs/images";

/// One analogy for each attribute of the demo world, four to a sheet.
const PICKED: [[&str; 4]; 2] = [["045", "000", "029", "020"], ["088", "071", "120", "074"]];
/// Pictures by day for `strength` and `folder`.
const BY_DAY: [&str; 6] = ["076", "040", "012", "041", "053", "071"];

/// Makes and saves a sheet.
type Draw = fn(&Studio) -> Result<()>;

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let sheets: [(&str, Draw); 6] = [
        ("gallery", Studio::gallery),
        ("captions", Studio::captions),
        ("strength", Studio::strength),
        ("folder", Studio::folder),
        ("compared", Studio::compared),
        ("losses", Studio::losses),
    ];
    if let Some(unknown) =
        (wanted.iter()).find(|name| sheets.iter().all(|(known, _)| known != name))
    {
        let known = sheets.map(|(name, _)| name).join(", ");
        bail!("there is no sheet `{unknown}`; there are {known}");
    }
    let studio = Studio::open()?;
    for (name, draw) in sheets {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            draw(&studio)?;
        }
    }
    Ok(())
}

/// An analogy of the suite's manifest.
#[derive(Deserialize)]
struct Analogy {
    name: String,
    attributes: BTreeMap<String, BTreeMap<String, String>>,
}

impl Analogy {
    /// What changes from A to A′, such as `cactus → palm`.
    fn edit(&self) -> String {
        let [before, after] = ["a", "a_prime"].map(|picture| &self.attributes[picture]);
        let changed = before
            .iter()
            .filter(|(name, value)| after[*name] != **value);
        let words =
            changed.map(|(name, value)| format!("{} → {}", word(value), word(&after[name])));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// A value of an attribute as people say it.
fn word(value: &str) -> &str {
    match value {
        "none" => "clear sky",
        "line" => "line drawing",
        "pixel" => "pixel art",
        "flat" => "flat colours",
        other => other,
    }
}

/// The program, the suite, and a folder for intermediate results.
struct Studio {
    dinv: PathBuf,
    suite: Vec<Analogy>,
    work: tempfile::TempDir,
}

impl Studio {
    fn open() -> Result<Self> {
        let examples = std::env::current_exe()?;
        let release = examples
            .parent()
            .and_then(Path::parent)
            .context("no folder above examples/")?;
        let manifest =
            fs::read_to_string(format!("{SUITE}/manifest.jsonl")).with_context(|| {
                format!("{SUITE}/manifest.jsonl: run this at the root of the repository")
            })?;
        Ok(Self {
            dinv: release.join("dinv"),
            suite: manifest
                .lines()
                .map(serde_json::from_str)
                .collect::<Result<_, _>>()?,
            work: tempfile::tempdir()?,
        })
    }

    fn path(&self, name: &str) -> String {
        self.work.path().join(name).to_string_lossy().into_owned()
    }

    fn analogy(&self, name: &str) -> Result<&Analogy> {
        let found = self.suite.iter().find(|analogy| analogy.name == name);
        found.with_context(|| format!("{SUITE}: no analogy `{name}`"))
    }

    /// Runs `dinv`; arguments are separated by spaces, except those in `last`.
    fn dinv(&self, arguments: &str, last: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.dinv);
        command
            .args(arguments.split_whitespace())
            .args(last)
            .args(["--quiet", "--model", "demo", "--device", "cpu"]);
        println!(
            "{}",
            format!("dinv {arguments} {}", last.join(" ")).trim_end()
        );
        // The list of files on stdout is of no interest here.
        let done = command.stdout(std::process::Stdio::null()).status();
        let done = done.with_context(|| format!("{}: not built", self.dinv.display()))?;
        if !done.success() {
            bail!("dinv {arguments}: {done}");
        }
        Ok(())
    }

    /// B′ of an analogy of the suite, by `dinv analogy`.
    fn solved(&self, name: &str) -> Result<RgbImage> {
        let out = self.path(&format!("analogy-{name}"));
        let at = format!("{SUITE}/{name}");
        self.dinv(
            &format!("analogy --a {at}/a.png --a-prime {at}/a_prime.png --b {at}/b.png -o {out}"),
            &[],
        )?;
        open(format!("{out}/b_prime.png"))
    }

    /// A difference learned from the built-in example, day to sunset.
    fn sunset(&self) -> Result<String> {
        let file = self.path("sunset.safetensors");
        if !Path::new(&file).exists() {
            self.dinv(
                &format!("learn --a demo/images/a.png --a-prime demo/images/a_prime.png -o {file}"),
                &[],
            )?;
        }
        Ok(file)
    }

    fn gallery(&self) -> Result<()> {
        for (number, names) in PICKED.iter().enumerate() {
            let mut grid = Grid::new(&["A", "A′", "B", "B′ (made)"], &[2]);
            for name in names {
                let mut row = pictures(&format!("{SUITE}/{name}"), &["a", "a_prime", "b"])?;
                row.push(self.solved(name)?);
                grid.row(self.analogy(name)?.edit(), row);
            }
            grid.save(&format!("gallery-{}", number + 1))?;
        }
        Ok(())
    }

    fn captions(&self) -> Result<()> {
        let full = [
            "a large red castle in the middle on grass with a clear sky, flat illustration",
            "a large blue boat on the left on water with birds, flat illustration",
        ];
        let short = ["a red castle", "a blue boat on water with birds"];
        let out = ["captioned", "full", "short"].map(|name| self.path(name));
        self.dinv(&format!("analogy -o {}", out[0]), &[])?;
        fs::create_dir_all(IMAGES)?;
        fs::copy(
            format!("{}/sheet.png", out[0]),
            format!("{IMAGES}/sheet.png"),
        )?;
        for ([of_a, of_b], out) in [full, short].into_iter().zip(&out[1..]) {
            let flags = [
                "--caption-a",
                of_a,
                "--caption-a-prime",
                of_a,
                "--caption-b",
                of_b,
            ];
            self.dinv(&format!("analogy -o {out}"), &flags)?;
        }
        let titles = ["A", "A′", "B", "captioner", "one caption", "a short one"];
        let mut grid = Grid::new(&titles, &[2, 3]);
        let mut row = pictures("demo/images", &["a", "a_prime", "b"])?;
        for out in out {
            row.push(open(format!("{out}/b_prime.png"))?);
        }
        grid.row(String::new(), row);
        grid.save("captions")
    }

    fn strength(&self) -> Result<()> {
        let difference = self.sunset()?;
        let strengths = ["0", "0.25", "0.5", "0.75", "1", "1.5"];
        let mut grid = Grid::new(&strengths, &[]);
        let mut row = Vec::new();
        for strength in strengths {
            let out = self.path(&format!("strength-{strength}"));
            self.dinv(
                &format!("apply {difference} --b demo/images/b.png -o {out} --strength {strength}"),
                &[],
            )?;
            row.push(open(format!("{out}/b.png"))?);
        }
        grid.row("--strength".to_owned(), row);
        grid.save("strength")
    }

    fn folder(&self) -> Result<()> {
        let difference = self.sunset()?;
        let day = self.path("day");
        fs::create_dir_all(&day)?;
        for name in BY_DAY {
            fs::copy(format!("{SUITE}/{name}/b.png"), format!("{day}/{name}.png"))?;
        }
        let files: Vec<String> = BY_DAY
            .iter()
            .map(|name| format!("{day}/{name}.png"))
            .collect();
        let [evening, undone] = ["evening", "undone"].map(|name| self.path(name));
        let inputs: Vec<&str> = files.iter().map(String::as_str).collect();
        self.dinv(&format!("apply {difference} -o {evening} --b"), &inputs)?;
        let made: Vec<String> = BY_DAY
            .iter()
            .map(|name| format!("{evening}/{name}.png"))
            .collect();
        let made: Vec<&str> = made.iter().map(String::as_str).collect();
        self.dinv(
            &format!("apply {difference} --reverse -o {undone} --b"),
            &made,
        )?;
        let mut grid = Grid::new(&[""; 6], &[]);
        for (label, folder) in [
            ("B", &day),
            ("applied", &evening),
            ("applied, then undone with --reverse", &undone),
        ] {
            grid.row(label.to_owned(), pictures(folder, &BY_DAY)?);
        }
        grid.save("folder")
    }

    /// The first six analogies of the suite, solved by these methods; gives the folder.
    fn measured(&self, methods: &[&str]) -> Result<String> {
        let out = self.path("eval");
        for file in ["study", "tuned"] {
            let is_of_file = |method: &&&str| method.ends_with("-tuned") == (file == "tuned");
            let methods: Vec<&str> = methods.iter().filter(is_of_file).copied().collect();
            if !methods.is_empty() {
                let methods = methods.join(",");
                self.dinv(
                    &format!(
                        "eval run --suite {SUITE} --limit 6 --jobs 2 -o {out} \
                         --variants demo/benchmark/{file}.toml --methods {methods}"
                    ),
                    &[],
                )?;
            }
        }
        Ok(out)
    }

    fn compared(&self) -> Result<()> {
        let methods = [
            "difference-inversion",
            "dia-tuned",
            "analogist-tuned",
            "instruct-pix2pix-tuned",
        ];
        let titles = [
            "A",
            "A′",
            "B",
            "true B′",
            "ours",
            "DIA",
            "Analogist",
            "InstructPix2Pix",
        ];
        self.of_methods("compared", &methods, &titles)
    }

    fn losses(&self) -> Result<()> {
        let methods = ["difference-inversion", "no-clip", "clip-only"];
        let titles = [
            "A",
            "A′",
            "B",
            "true B′",
            "both losses",
            "no CLIP loss",
            "CLIP loss only",
        ];
        self.of_methods("losses", &methods, &titles)
    }

    fn of_methods(&self, sheet: &str, methods: &[&str], titles: &[&str]) -> Result<()> {
        let out = self.measured(methods)?;
        let mut grid = Grid::new(titles, &[2, 4]);
        for analogy in &self.suite {
            let name = &analogy.name;
            let made = |method: &&str| format!("{out}/{method}/{name}/b_prime.png");
            if !methods
                .iter()
                .all(|method| Path::new(&made(method)).exists())
            {
                continue;
            }
            let mut row = pictures(
                &format!("{SUITE}/{name}"),
                &["a", "a_prime", "b", "b_prime"],
            )?;
            for method in methods {
                row.push(open(made(method))?);
            }
            grid.row(analogy.edit(), row);
        }
        grid.save(sheet)
    }
}

fn open(path: impl AsRef<Path>) -> Result<RgbImage> {
    let path = path.as_ref();
    Ok(image::open(path)
        .with_context(|| path.display().to_string())?
        .into_rgb8())
}

fn pictures(folder: &str, names: &[&str]) -> Result<Vec<RgbImage>> {
    names
        .iter()
        .map(|name| open(format!("{folder}/{name}.png")))
        .collect()
}

/// Pictures in rows under titles, each row with a label below it.
struct Grid<'a> {
    titles: &'a [&'a str],
    /// Columns that stand a little apart from the one before. What is made stands from the last of them on.
    breaks: &'a [usize],
    rows: Vec<(String, Vec<RgbImage>)>,
}

const TILE: f32 = 128.0;
const GAP: f32 = 10.0;
const BREAK: f32 = 24.0;
const MARGIN: f32 = 16.0;
const TITLE: f32 = 34.0;
const LABEL: f32 = 34.0;

impl<'a> Grid<'a> {
    fn new(titles: &'a [&'a str], breaks: &'a [usize]) -> Self {
        Self {
            titles,
            breaks,
            rows: Vec::new(),
        }
    }

    fn row(&mut self, label: String, pictures: Vec<RgbImage>) {
        self.rows.push((label, pictures));
    }

    /// Left edge of a column.
    fn x(&self, column: usize) -> f32 {
        let before = self.breaks.iter().filter(|&&start| start <= column).count();
        (0..column).map(|_| TILE + GAP).sum::<f32>()
            + (0..before).map(|_| BREAK).sum::<f32>()
            + MARGIN
    }

    fn save(&self, name: &str) -> Result<()> {
        let has_titles = self.titles.iter().any(|title| !title.is_empty());
        let title = if has_titles { TITLE } else { 0.0 };
        let below = |label: &str| if label.is_empty() { GAP } else { LABEL };
        let rows: f32 = self.rows.iter().map(|(label, _)| TILE + below(label)).sum();
        let width = self.x(self.titles.len()) - GAP + MARGIN;
        let mut canvas = Canvas::new(
            pixel(width.ceil()),
            pixel((rows + title + 2.0 * MARGIN - GAP).ceil()),
        )?;
        for (column, title) in self.titles.iter().enumerate() {
            let size = if title.chars().count() > 8 {
                15.0
            } else {
                19.0
            };
            canvas.text_centred(
                title,
                self.x(column) + TILE / 2.0,
                MARGIN + 3.0,
                bold(size, INK),
            );
        }
        let mut y = MARGIN + title;
        for (label, pictures) in &self.rows {
            for (column, picture) in pictures.iter().enumerate() {
                let picture = image::imageops::resize(
                    picture,
                    pixel(TILE),
                    pixel(TILE),
                    image::imageops::FilterType::Lanczos3,
                );
                let is_made = column + 1 == pictures.len() && self.breaks == [2];
                let (border, frame) = if is_made { (3.0, ACCENT) } else { (1.0, RULE) };
                canvas.picture(&picture, self.x(column), y, border, frame);
            }
            canvas.text(label, MARGIN, y + TILE + 6.0, regular(18.0, GREY));
            y += TILE + below(label);
        }
        let path = format!("{IMAGES}/{name}.png");
        fs::create_dir_all(IMAGES)?;
        canvas.into_image().save(&path)?;
        println!("{path}");
        Ok(())
    }
}
