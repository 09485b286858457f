//! README.md and docs/: their commands run, their links resolve, and the book has every page.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::repository;

/// Pages whose commands readers are meant to paste; those of a folder in the order of the book.
const README: &str = "README.md";
const GUIDE: [&str; 8] = [
    "docs/guide/first-picture.md",
    "docs/guide/own-photographs.md",
    "docs/guide/captions.md",
    "docs/guide/many-pictures.md",
    "docs/guide/gpu.md",
    "docs/guide/first-run.md",
    "docs/guide/other-tools.md",
    "docs/guide/clusters.md",
];

fn read(page: &str) -> String {
    fs::read_to_string(repository().join(page)).unwrap()
}

/// The lines of all code blocks, those that end in `\` joined with the next.
fn code_lines(page: &str) -> Vec<String> {
    let text = read(page).replace("\\\n", " ");
    let code = text.lines().filter_map(|line| line.strip_prefix("    "));
    code.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// The commands of a page that call the program, always written as `dinv`.
fn commands(page: &str) -> Vec<String> {
    let lines = code_lines(page).into_iter();
    let lines = lines.map(|line| line.replace("cargo run --release -- ", "dinv "));
    lines
        .filter(|line| {
            let mut words = line
                .split(' ')
                .skip_while(|word| word.contains('=') && !word.starts_with('-'));
            words.next() == Some("dinv")
        })
        .collect()
}

/// Whether a command needs a download, other people's files, or hours.
fn only_understood(command: &str) -> bool {
    if command.starts_with("dinv serve") {
        return true; // it runs until it is stopped; `serve.rs` starts it
    }
    ["--model", "models pull", "models check", "eval "]
        .iter()
        .any(|part| command.contains(part))
}

#[cfg(unix)]
mod run {
    use std::process::Command;

    use super::super::{copy_folder, golden, workplace};
    use super::*;

    /// A folder like the repository's root, with a tiny model as the demo model.
    fn checkout() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let demo = root.path().join("demo");
        copy_folder(&golden("pipeline"), &demo.join("model"));
        let settings = r#"{"steps": 4, "num_tokens": 2, "select_every": 2, "select_samples": 1, "num_inference_steps": 4}"#;
        fs::write(demo.join("model/dinv.json"), settings).unwrap();
        let pictures = workplace();
        fs::create_dir_all(demo.join("images")).unwrap();
        for name in ["a.png", "a_prime.png", "b.png"] {
            fs::copy(pictures.path().join(name), demo.join("images").join(name)).unwrap();
        }
        let validation = "demo/benchmark/validation";
        copy_folder(
            &repository().join(validation),
            &root.path().join(validation),
        );
        for file in fs::read_dir(repository().join("demo")).unwrap() {
            let file = file.unwrap();
            if file.path().extension().is_some_and(|end| end == "toml") {
                fs::copy(file.path(), demo.join(file.file_name())).unwrap();
            }
        }
        root
    }

    fn paste(root: &Path, page: &str) -> usize {
        let commands = commands(page);
        for command in &commands {
            let line = match only_understood(command) {
                // Flags before this are parsed, and an unknown one is an error.
                true => format!("{command} --help"),
                false => command.clone(),
            };
            let program = Path::new(env!("CARGO_BIN_EXE_dinv"));
            let path = std::env::var("PATH").unwrap_or_default();
            let done = Command::new("sh")
                .args(["-c", &line])
                .current_dir(root)
                .env(
                    "PATH",
                    format!("{}:{path}", program.parent().unwrap().display()),
                )
                .env("DINV_DEMO_MODEL", root.join("demo/model"))
                .env("HF_HOME", root.join("hf"))
                .env("HF_HUB_OFFLINE", "1")
                // As a scheduler sets them.
                .env("SLURM_ARRAY_TASK_ID", "1")
                .env("SLURM_ARRAY_TASK_MIN", "1")
                .env("SLURM_ARRAY_TASK_COUNT", "8")
                .output()
                .unwrap();
            assert!(
                done.status.success(),
                "{page}: {line}\n{}",
                String::from_utf8_lossy(&done.stderr)
            );
        }
        commands.len()
    }

    /// Runs in one checkout, as for a reader who starts with the README.
    #[test]
    fn commands_of_the_readme_and_then_of_the_guide_can_be_pasted() {
        let root = checkout();
        assert!(paste(root.path(), README) >= 7);
        assert!(root.path().join("out/sheet.png").is_file());
        assert!(root.path().join("day-again/b.png").is_file());
        for page in GUIDE {
            let pasted = paste(root.path(), page);
            assert!(
                pasted >= 1 || page.ends_with("gpu.md"),
                "{page}: no command found"
            );
        }
    }
}

/// All Markdown files that people read.
fn pages() -> Vec<PathBuf> {
    fn of(folder: &Path, pages: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
            if path.is_dir() && !hidden && !path.ends_with("target") {
                of(&path, pages);
            } else if path.extension().is_some_and(|end| end == "md") {
                pages.push(path);
            }
        }
    }
    let mut all = Vec::new();
    of(repository(), &mut all);
    all
}

/// The links of a page: Markdown links and the sources of pictures.
fn links(text: &str) -> Vec<String> {
    let prose: String = text
        .lines()
        .filter(|line| !line.starts_with("    "))
        .collect::<Vec<_>>()
        .join("\n");
    let markdown = prose.split("](").skip(1);
    let markdown = markdown.filter_map(|rest| rest.split_once(')'));
    let pictures = prose.split("src=\"").skip(1);
    let pictures = pictures.filter_map(|rest| rest.split_once('"'));
    markdown
        .chain(pictures)
        .map(|(link, _)| link.to_owned())
        .collect()
}

/// The anchors of a page's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |line: &str| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title
            .chars()
            .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    assert!(pages.len() > 25, "{} pages", pages.len());
    let mut checked = 0;
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        for link in links(&text) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            let where_from = format!("{}: {link}", page.display());
            assert!(target.exists(), "{where_from}: no such file");
            if !anchor.is_empty() {
                let found = anchors(&fs::read_to_string(&target).unwrap());
                assert!(
                    found.contains(anchor),
                    "{where_from}: no such heading in {found:?}"
                );
            }
            checked += 1;
        }
    }
    assert!(checked > 80, "{checked} links");
}

/// Checks the files that texts name in backquotes by their path in the repository.
#[test]
fn named_documents_exist() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let named = text.split('`').skip(1).step_by(2);
        let named = named.filter(|name| {
            ["docs/", "benches/", "training/", "examples/", "demo/"]
                .iter()
                .any(|folder| name.starts_with(folder))
                && name.ends_with(".md")
        });
        for name in named {
            assert!(
                repository().join(name).is_file(),
                "{}: {name}",
                page.display()
            );
        }
    }
}

#[test]
fn the_book_holds_every_page() {
    let summary = read("docs/SUMMARY.md");
    let listed: BTreeSet<String> = links(&summary).into_iter().collect();
    let docs = repository().join("docs");
    for page in pages()
        .iter()
        .filter_map(|page| page.strip_prefix(&docs).ok())
    {
        let name = page.to_str().unwrap();
        assert!(
            name == "SUMMARY.md" || listed.contains(name),
            "{name} is not in docs/SUMMARY.md"
        );
    }
    for link in read("docs/README.md").lines().flat_map(links) {
        assert!(
            listed.contains(&link),
            "docs/README.md: {link} is not in the book"
        );
    }
}

/// Links of the book stay in the book, where they work on the web as on GitHub.
#[test]
fn the_book_does_not_link_out_of_itself() {
    let docs = repository().join("docs");
    for page in pages().iter().filter(|page| page.starts_with(&docs)) {
        let depth = page.strip_prefix(&docs).unwrap().components().count() - 1;
        for link in links(&fs::read_to_string(page).unwrap()) {
            let up = link.matches("../").count();
            assert!(up <= depth, "{}: {link}", page.display());
        }
    }
}

#[test]
fn the_readme_is_short() {
    let lines = read(README).lines().count();
    assert!(lines <= 110, "{lines} lines");
}
