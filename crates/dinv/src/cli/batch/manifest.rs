//! The file of a batch: a job on every line.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::job::PairFiles;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cli::flags::{one_or_several, one_or_several_texts};
use crate::cli::names::{is_reserved, unused, without_reserved};
use crate::cli::output::is_named_like_a_picture;
use crate::cli::terminal::Failure;

/// The largest number of wrong lines in a message.
const NAMED: usize = 20;

/// What is wrong with lines, one below the other; of many, the first ones and the number of the others.
pub(super) fn listed(mut wrong: Vec<String>) -> String {
    let more = wrong.len().saturating_sub(NAMED);
    wrong.truncate(NAMED);
    if more > 0 {
        wrong.push(format!("and {more} more"));
    }
    wrong.join("\n")
}

/// A line: what to learn from, or a learned difference, and what to apply it to.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, deserialize_with = "one_or_several")]
    a: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "one_or_several")]
    a_prime: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "one_or_several_texts")]
    caption_a: Option<Vec<String>>,
    #[serde(default, deserialize_with = "one_or_several_texts")]
    caption_a_prime: Option<Vec<String>>,
    difference: Option<PathBuf>,
    b: Option<PathBuf>,
    caption_b: Option<String>,
    name: Option<String>,
    #[serde(default)]
    settings: Map<String, Value>,
}

/// Where the difference of a job comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    Pairs(Vec<PairFiles>),
    File(PathBuf),
}

/// The picture of a job, and its result.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) b: PathBuf,
    pub(super) caption: Option<String>,
    /// The name of the result, without its extension.
    pub(super) name: Option<String>,
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// The line, from 1.
    pub(super) line: usize,
    pub(super) source: Source,
    /// `None` to learn only.
    pub(super) wanted: Option<Wanted>,
    pub(super) settings: Map<String, Value>,
}

impl Entry {
    /// Whether no caption of it has to be made.
    pub(super) fn has_captions(&self) -> bool {
        let of_pairs = match &self.source {
            Source::Pairs(pairs) => pairs.iter().all(PairFiles::has_captions),
            Source::File(_) => true,
        };
        let wanted = self.wanted.as_ref();
        of_pairs && wanted.is_none_or(|wanted| wanted.caption.is_some())
    }

    /// Checks that its files are there.
    fn checked(self) -> Result<Self, String> {
        let difference = match &self.source {
            Source::File(path) => Some(path.as_path()),
            Source::Pairs(_) => None,
        };
        let absent = self
            .pictures()
            .chain(difference)
            .find(|path| !path.is_file());
        match absent {
            Some(path) => Err(format!("{}: there is no such file", path.display())),
            None => Ok(self),
        }
    }

    /// Its pictures.
    pub(super) fn pictures(&self) -> impl Iterator<Item = &Path> {
        let pairs = match &self.source {
            Source::Pairs(pairs) => pairs.as_slice(),
            Source::File(_) => &[],
        };
        let of_pairs = pairs.iter().flat_map(|pair| [&pair.a, &pair.a_prime]);
        let b = self.wanted.as_ref().map(|wanted| &wanted.b);
        of_pairs.chain(b).map(PathBuf::as_path)
    }
}

/// Reads a file of jobs. Its paths are relative to it. All wrong lines are named together.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Entry>> {
    if path.is_dir() {
        let message = format!("{}: a folder, expected a file of jobs", path.display());
        let hint = format!("`dinv batch --from {}` makes the file", path.display());
        return Err(Failure::input(message).hint(hint).into());
    }
    let text = fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::InvalidData => {
            let failure = Failure::input(format!("{}: not a text in UTF-8", path.display()));
            anyhow::Error::from(failure.hint("save it as UTF-8"))
        }
        _ => Error::io(path)(error).into(),
    })?;
    let text = text.trim_start_matches('\u{feff}'); // Windows editors add it
    let folder = path.parent().unwrap_or(Path::new(""));
    let (mut entries, mut wrong) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        match entry(number, line, folder).and_then(Entry::checked) {
            Ok(entry) => entries.push(entry),
            Err(reason) => wrong.push(format!("{}:{number}: {reason}", path.display())),
        }
    }
    match (wrong.is_empty(), entries.is_empty()) {
        (false, _) => Err(Failure::input(listed(wrong))
            .hint("a job is like {\"a\": \"day.png\", \"a_prime\": \"night.png\", \"b\": \"street.png\"}")
            .into()),
        (true, true) => {
            let message = format!("{}: there is no job in this file", path.display());
            Err(Failure::input(message).hint("`dinv batch --from FOLDER` makes such a file").into())
        }
        (true, false) => Ok(entries),
    }
}

fn entry(number: usize, line: &str, folder: &Path) -> Result<Entry, String> {
    if line.trim_start().starts_with('[') {
        return Err("expected an object, found a list".to_owned());
    }
    let json = &mut serde_json::Deserializer::from_str(line);
    let line: Line = serde_path_to_error::deserialize(&mut *json).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner().to_string();
        let reason = reason.split(" at line ").next().unwrap_or(&reason); // it is one line
        match path.as_str() {
            "." | "?" => reason.to_owned(),
            _ => format!("{path}: {reason}"),
        }
    })?;
    json.end()
        .map_err(|_| "expected one object on the line".to_owned())?;
    let there = |path: PathBuf| folder.join(path);
    let (a, a_prime) = (line.a.unwrap_or_default(), line.a_prime.unwrap_or_default());
    if a.len() != a_prime.len() {
        return Err(format!(
            "expected one a_prime for every a, found {} and {}",
            a_prime.len(),
            a.len()
        ));
    }
    let captions = |name: &str, given: Option<Vec<String>>| match given {
        Some(_) if a.is_empty() => Err(format!("{name} is given, but no a")),
        Some(given) if given.len() != a.len() => Err(format!(
            "{name}: expected one for every a, found {} and {}",
            given.len(),
            a.len()
        )),
        Some(given) => Ok(given.into_iter().map(Some).collect()),
        None => Ok(vec![None; a.len()]),
    };
    let before = captions("caption_a", line.caption_a)?;
    let after = captions("caption_a_prime", line.caption_a_prime)?;
    let pairs = a
        .into_iter()
        .zip(a_prime)
        .zip(before.into_iter().zip(after));
    let pairs = pairs.map(|((a, a_prime), (caption_a, caption_a_prime))| PairFiles {
        a: there(a),
        a_prime: there(a_prime),
        caption_a,
        caption_a_prime,
    });
    let pairs: Vec<PairFiles> = pairs.collect();
    let source = match (line.difference, pairs.is_empty()) {
        (None, false) => Source::Pairs(pairs),
        (Some(file), true) => Source::File(there(file)),
        (Some(_), false) => {
            return Err("expected a and a_prime, or a difference, found both".to_owned());
        }
        (None, true) => {
            return Err("expected a and a_prime, or a difference, found neither".to_owned());
        }
    };
    let beside = [
        ("caption_b", line.caption_b.is_some()),
        ("name", line.name.is_some()),
    ];
    if let (None, Some((name, _))) = (&line.b, beside.iter().find(|(_, given)| *given)) {
        return Err(format!("{name} is given, but no b"));
    }
    if line.b.is_none() && matches!(source, Source::File(_)) {
        return Err("there is nothing to do: b is missing".to_owned());
    }
    if let Some(name) = &line.name {
        check_name(name)?;
    }
    let wanted = line.b.map(|b| Wanted {
        b: there(b),
        caption: line.caption_b,
        name: line.name,
    });
    Ok(Entry {
        line: number,
        source,
        wanted,
        settings: line.settings,
    })
}

/// Checks that a name can be that of a file on every system.
fn check_name(name: &str) -> Result<(), String> {
    let ends = name.starts_with(['.', ' ']) || name.ends_with(['.', ' ']);
    if name.is_empty() || name.len() > 200 || ends || name.chars().any(is_reserved) {
        return Err(format!("name: `{name}` cannot be the name of a file"));
    }
    Ok(())
}

/// The lines for a folder: in it, and in each of its folders, a pair called a and `a_prime`, and the pictures to change:
/// all others there but `b_prime`, and those of a folder b beside the pair. Paths are relative to the folder.
pub(super) fn of_folder(root: &Path) -> anyhow::Result<Vec<Value>> {
    let mut lines = Vec::new();
    let mut names = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    let mut seen = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        if !seen.insert(fs::canonicalize(&folder).map_err(Error::io(&folder))?) {
            continue; // by a link
        }
        let (mut inside, mut pictures): (Vec<PathBuf>, Vec<PathBuf>) = entries(&folder)?
            .into_iter()
            .partition(|path| path.is_dir());
        pictures.retain(|path| is_named_like_a_picture(path));
        let pair = [take(&mut pictures, "a")?, take(&mut pictures, "a_prime")?];
        take(&mut pictures, "b_prime")?; // what is expected
        if let [Some(a), Some(a_prime)] = pair {
            if let Some(place) = inside.iter().position(|path| is_called(path, "b")) {
                let b = entries(&inside.remove(place))?;
                pictures.splice(
                    0..0,
                    b.into_iter().filter(|path| is_named_like_a_picture(path)),
                );
            }
            let pair = json!({ "a": below(root, &a)?, "a_prime": below(root, &a_prime)? });
            for b in &pictures {
                let mut line = pair.clone();
                line["b"] = json!(below(root, b)?);
                line["name"] = json!(name_of(root, b, &mut names));
                lines.push(line);
            }
            if pictures.is_empty() {
                lines.push(pair);
            }
        }
        folders.extend(inside.into_iter().rev());
    }
    if lines.is_empty() {
        let message = format!("{}: there is no pair in this folder", root.display());
        let hint = "a pair is two pictures called a and a_prime, such as a.png and a_prime.jpg, in the folder or in \
                    a subfolder; the pictures to change are next to them";
        return Err(Failure::input(message).hint(hint).into());
    }
    Ok(lines)
}

/// What is in a folder and not hidden, sorted by name.
fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let found = fs::read_dir(folder).map_err(Error::io(folder))?;
    let found = found.map(|entry| Ok(entry.map_err(Error::io(folder))?.path()));
    let mut found = found.collect::<anyhow::Result<Vec<_>>>()?;
    found.retain(|path| {
        let name = path.file_name().unwrap_or_default();
        !name.as_encoded_bytes().starts_with(b".") && (path.is_file() || path.is_dir())
    });
    found.sort();
    Ok(found)
}

/// Takes the picture of this name; there may be only one.
fn take(pictures: &mut Vec<PathBuf>, stem: &str) -> anyhow::Result<Option<PathBuf>> {
    let mut found = pictures.extract_if(.., |path| is_called(path, stem));
    match (found.next(), found.next()) {
        (Some(one), Some(other)) => {
            let message = format!(
                "{} and {}: which is {stem}?",
                one.display(),
                other.display()
            );
            Err(Failure::input(message)
                .hint("rename or move one of them")
                .into())
        }
        (one, _) => Ok(one),
    }
}

fn is_called(path: &Path, stem: &str) -> bool {
    path.file_stem()
        .is_some_and(|found| found.eq_ignore_ascii_case(stem))
}

/// A path relative to the folder of the jobs.
fn below(root: &Path, path: &Path) -> anyhow::Result<String> {
    let relative = path.strip_prefix(root).unwrap_or(path);
    match relative.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => {
            let message = format!("{}: the name is no Unicode", path.display());
            Err(Failure::input(message).hint("rename it").into())
        }
    }
}

/// The most bytes of a name that is made of a path.
const LONGEST_NAME: usize = 100;

/// A name for the result of B that no other has: its path without a folder b and without its extension.
fn name_of(root: &Path, b: &Path, taken: &mut BTreeSet<String>) -> String {
    let relative = b.strip_prefix(root).unwrap_or(b);
    let folders = relative.parent().unwrap_or(Path::new("")).iter();
    let folders = folders.filter(|name| !name.eq_ignore_ascii_case("b"));
    let stem = relative.file_stem().unwrap_or_default();
    let parts = folders.chain([stem]).map(|part| part.to_string_lossy());
    let name = parts.collect::<Vec<_>>().join("-");
    let name = without_reserved(&name);
    let name = name.trim_start_matches(['.', ' ']);
    let name = &name[..name.floor_char_boundary(LONGEST_NAME.min(name.len()))];
    let name = match name.trim_end_matches(['.', ' ']) {
        "" => "picture",
        name => name,
    };
    unused(taken, |number| match number {
        1 => name.to_owned(),
        number => format!("{name}-{number}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_job() {
        let folder = Path::new("set");
        let read = |line: &str| entry(3, line, folder).unwrap();
        let job = read(
            r#"{"a": "a.png", "a_prime": "/x/a2.png", "b": "b.png", "settings": {"strength": 0.5}}"#,
        );
        let Source::Pairs(pairs) = &job.source else {
            panic!("{job:?}");
        };
        assert_eq!(pairs[0].a, Path::new("set/a.png"));
        assert_eq!(pairs[0].a_prime, Path::new("/x/a2.png"));
        assert_eq!(job.wanted.as_ref().unwrap().b, Path::new("set/b.png"));
        assert_eq!(job.settings["strength"], 0.5);
        assert!(!job.has_captions());
        let two = r#"{"a": ["1.png", "2.png"], "a_prime": ["3.png", "4.png"],
            "caption_a": ["one", "two"], "caption_a_prime": ["three", "four"]}"#;
        let two = read(two);
        assert_eq!(two.pictures().count(), 4);
        assert!(two.has_captions() && two.wanted.is_none());
    }

    #[test]
    fn names_made_of_paths_can_be_those_of_files() {
        let mut taken = BTreeSet::new();
        let long = format!("{} and more.png", "x".repeat(99));
        for (path, expected) in [
            ("set/b/cat.png", "cat".to_owned()),
            ("set/one/b/CAT.png", "one-CAT".to_owned()),
            ("set/Cat.png", "Cat-2".to_owned()),
            (&format!("set/{long}"), "x".repeat(99)),
            ("set/b/ . .png", "picture".to_owned()),
        ] {
            let name = name_of(Path::new("set"), Path::new(path), &mut taken);
            assert_eq!(name, expected);
            check_name(&name).unwrap();
        }
    }

    #[test]
    fn wrong_lines_say_what_is_wrong() {
        for (line, expected) in [
            ("x", "expected value"),
            ("{} {}", "expected one object on the line"),
            (r#"{"b": "b.png"}"#, "found neither"),
            (
                r#"{"a": "a.png", "a_prime": "c.png", "difference": "d.safetensors"}"#,
                "found both",
            ),
            (
                r#"{"a": "a.png"}"#,
                "expected one a_prime for every a, found 0 and 1",
            ),
            (r#"{"difference": "d.safetensors"}"#, "b is missing"),
            (
                r#"{"a": "a.png", "a_prime": "c.png", "name": "x"}"#,
                "name is given, but no b",
            ),
            (
                r#"{"a": "a.png", "a_prime": "c.png", "caption_a": ["x", "y"]}"#,
                "caption_a: expected one for every a",
            ),
            (
                r#"{"a": "a.png", "a_prime": "c.png", "b": "b.png", "name": "../x"}"#,
                "cannot be the name of a file",
            ),
            (
                r#"{"a": "a.png", "aprime": "c.png"}"#,
                "unknown field `aprime`",
            ),
            (r#"{"a": 3, "a_prime": "c.png"}"#, "a: "),
        ] {
            let reason = entry(1, line, Path::new("")).unwrap_err();
            assert!(reason.contains(expected), "{line}: {reason}");
        }
    }
}
