//! The library of differences: .safetensors files, each with a thumbnail and a note next to it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use axum::http::StatusCode;
use burn::tensor::Device;
use clap::ValueEnum;
use difference_inversion::Error;
use difference_inversion::image::{fit, load_image, save_png};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::util::files::{Existing, HiddenFolder, place, write, write_atomically};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::export::{Format, default_name, export, is_name};

use super::job::{now, time};
use super::problem::{Answer, Problem};
use super::store::Store;

/// The side of each picture of a thumbnail, in pixels.
const SIDE: u32 = 128;
/// The maximum number of characters of a name.
const LONGEST: usize = 64;

/// The note stored with a difference.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    created: String,
    model: Option<String>,
}

/// Checks the name of a difference, which is also that of its file.
pub(crate) fn check_name(name: &str, field: &str) -> Answer<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_- ".contains(c);
    if name.chars().all(fits) && name.trim() == name && (1..=LONGEST).contains(&name.len()) {
        return Ok(());
    }
    let message = format!(
        "{field}: expected 1 to {LONGEST} letters (A to Z), digits, `_`, `-` and spaces between them"
    );
    Err(Problem::field(field, message))
}

/// The address of a difference with a checked name.
pub(crate) fn address(name: &str) -> String {
    format!("/v1/differences/{}", name.replace(' ', "%20"))
}

/// The file of a difference with a checked name.
pub(crate) fn path(store: &Store, name: &str) -> PathBuf {
    beside(store, name, "safetensors")
}

fn beside(store: &Store, name: &str, extension: &str) -> PathBuf {
    store
        .differences_folder()
        .join(format!("{name}.{extension}"))
}

/// The file of an existing difference.
pub(crate) fn find(store: &Store, name: &str) -> Answer<PathBuf> {
    let path = path(store, name);
    match check_name(name, "name").is_ok() && path.is_file() {
        true => Ok(path),
        false => Err(Problem::not_found("difference")),
    }
}

/// The thumbnail of a difference.
pub(crate) fn thumbnail(store: &Store, name: &str) -> Answer<PathBuf> {
    find(store, name)?;
    let path = beside(store, name, "png");
    match path.is_file() {
        true => Ok(path),
        false => Err(Problem::not_found("thumbnail")),
    }
}

/// All differences, newest first.
pub(crate) fn all(store: &Store) -> Answer<Vec<Value>> {
    let folder = store.differences_folder();
    let mut all = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::io(&folder))?.flatten() {
        let path = entry.path();
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let is_one = path
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        if !is_one || check_name(&name, "name").is_err() {
            continue;
        }
        if let Ok(view) = view(store, &name) {
            all.push(view); // else it has been removed, or is invalid
        }
    }
    all.sort_by(|one, other| other["created"].as_str().cmp(&one["created"].as_str()));
    Ok(all)
}

/// The description of a difference.
pub(crate) fn view(store: &Store, name: &str) -> Answer<Value> {
    let path = find(store, name)?;
    let tokens = DifferenceTokens::load(&path, &Device::flex())?;
    let file = fs::metadata(&path).map_err(Error::io(&path))?;
    let note = fs::read(beside(store, name, "json")).ok();
    let note = note.and_then(|note| serde_json::from_slice::<Note>(&note).ok());
    let (created, model) = match note {
        Some(note) => (note.created, note.model),
        None => (
            time(file.modified().unwrap_or(SystemTime::UNIX_EPOCH)),
            None,
        ),
    };
    let address = address(name);
    let mut view = json!({
        "name": name, "created": created, "model": model, "tokens": tokens.num_tokens(), "bytes": file.len(),
        "url": address, "belongs_to": tokens.base().to_string(),
    });
    if beside(store, name, "png").is_file() {
        view["thumbnail"] = json!(format!("{address}/thumbnail"));
    }
    Ok(view)
}

/// Adds a copy of a file under the wished name, or under a free one like it; returns the name.
pub(crate) fn add(
    store: &Store,
    wish: Option<&str>,
    file: &Path,
    model: &str,
    pair: Option<(PathBuf, PathBuf)>,
) -> anyhow::Result<String> {
    let bytes = fs::read(file).map_err(Error::io(file))?;
    let wish = wish.unwrap_or("difference");
    for number in 1_u32.. {
        let name = match number {
            1 => wish.to_owned(),
            _ => {
                let end = format!(" {number}");
                let most = wish.len().min(LONGEST - end.len());
                format!("{}{end}", wish[..most].trim_end()) // names are ASCII
            }
        };
        match write(&path(store, &name), &bytes, Existing::Keep) {
            Ok(()) => {
                describe(store, &name, Some(model))?;
                if let Some((a, a_prime)) = pair {
                    let picture = beside_each_other(&a, &a_prime)?;
                    let hidden = HiddenFolder::new(&store.differences_folder())?;
                    let drawn = hidden.path().join("thumbnail.png");
                    save_png(&drawn, &picture, &[])?;
                    let to = beside(store, &name, "png");
                    place(&drawn, &to, Existing::Replace).map_err(Error::io(&to))?;
                }
                return Ok(name);
            }
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("no name is free for the difference")
}

fn describe(store: &Store, name: &str, model: Option<&str>) -> anyhow::Result<()> {
    let note = Note {
        created: now(),
        model: model.map(str::to_owned),
    };
    let path = beside(store, name, "json");
    Ok(write_atomically(&path, &serde_json::to_vec(&note)?)?)
}

/// A and A′ side by side in one picture.
fn beside_each_other(a: &Path, a_prime: &Path) -> anyhow::Result<RgbImage> {
    let mut both = RgbImage::new(2 * SIDE, SIDE);
    for (path, x) in [(a, 0), (a_prime, SIDE)] {
        let picture = fit(&load_image(path)?, SIDE, SIDE);
        image::imageops::replace(&mut both, &picture, x.into(), 0);
    }
    Ok(both)
}

/// Adds an uploaded file, after checking it.
pub(crate) fn put(store: &Store, name: &str, bytes: &[u8]) -> Answer<Value> {
    check_name(name, "name")?;
    let hidden = HiddenFolder::new(&store.differences_folder())?;
    let file = hidden.path().join("difference.safetensors");
    fs::write(&file, bytes).map_err(Error::io(&file))?;
    DifferenceTokens::load(&file, &Device::flex()).map_err(|error| {
        let error = match error {
            Error::InvalidFile { reason, .. } => anyhow::Error::msg(reason),
            error => error.into(),
        };
        Problem::about("", &error)
    })?;
    match write(&path(store, name), bytes, Existing::Keep) {
        Ok(()) => describe(store, name, None)?,
        Err(error) => return Err(taken(error, name)),
    }
    view(store, name)
}

/// Renames a difference.
pub(crate) fn rename(store: &Store, name: &str, new: &str) -> Answer<Value> {
    let path_now = find(store, name)?;
    check_name(new, "name")?;
    let to = path(store, new);
    place(&path_now, &to, Existing::Keep)
        .map_err(Error::io(&to))
        .map_err(|error| taken(error, new))?;
    for extension in ["png", "json"] {
        let from = beside(store, name, extension);
        if from.is_file() {
            let to = beside(store, new, extension);
            place(&from, &to, Existing::Replace).map_err(Error::io(&to))?;
        }
    }
    view(store, new)
}

/// How a difference is exported.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wish {
    /// The word for it in the other program.
    word: Option<String>,
    /// The way back, from A′ to A.
    #[serde(default)]
    reverse: bool,
}

impl Wish {
    /// The difference of that name, and the word for it.
    fn read(&self, store: &Store, name: &str) -> Answer<(DifferenceTokens, String)> {
        let tokens = DifferenceTokens::load(&find(store, name)?, &Device::flex())?;
        let tokens = match self.reverse {
            true => tokens.reversed(),
            false => tokens,
        };
        match &self.word {
            None => Ok((tokens, default_name(name, self.reverse))),
            Some(word) if is_name(word) => Ok((tokens, word.clone())),
            Some(_) => Err(Problem::field(
                "word",
                "word: expected letters, digits, `.`, `_` and `-`, not a dot first",
            )),
        }
    }
}

/// A difference for every program that reads it.
pub(crate) fn exports(store: &Store, name: &str, wish: &Wish) -> Answer<Vec<Value>> {
    let (tokens, word) = wish.read(store, name)?;
    let place = address(name);
    let of_format = |format: &Format| {
        let exported = export(&tokens, *format, &word).ok()?; // else the program does not read it
        let value = format.to_possible_value()?;
        let files = exported.files.iter().map(|(file, _)| {
            let reverse = wish.reverse;
            let url = format!(
                "{place}/exports/{}/{file}?word={word}&reverse={reverse}",
                value.get_name()
            );
            json!({ "name": file, "url": url })
        });
        Some(json!({
            "format": value.get_name(), "program": format.title(), "word": word,
            "files": files.collect::<Vec<_>>(), "usage": exported.usage, "notes": exported.notes,
        }))
    };
    Ok(Format::value_variants()
        .iter()
        .filter_map(of_format)
        .collect())
}

/// A file of a difference for a program.
pub(crate) fn exported(
    store: &Store,
    name: &str,
    format: &str,
    file: &str,
    wish: &Wish,
) -> Answer<Vec<u8>> {
    let (tokens, word) = wish.read(store, name)?;
    let format = Format::from_str(format, false).map_err(|_| Problem::not_found("program"))?;
    let files = export(&tokens, format, &word)
        .map_err(|error| Problem::about("format", &error))?
        .files;
    let found = files.into_iter().find(|(name, _)| name == file);
    let (_, arrays) = found.ok_or_else(|| Problem::not_found("file"))?;
    Ok(arrays.to_bytes()?)
}

fn taken(error: Error, name: &str) -> Problem {
    match error {
        Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists => Problem::new(
            StatusCode::CONFLICT,
            format!("there is a difference `{name}` already"),
        )
        .hint("choose another name, or remove that one"),
        error => error.into(),
    }
}

/// Removes a difference.
pub(crate) fn remove(store: &Store, name: &str) -> Answer<()> {
    let path = find(store, name)?;
    for extension in ["png", "json"] {
        let _ = fs::remove_file(beside(store, name, extension)); // there may be none
    }
    Ok(fs::remove_file(&path).map_err(Error::io(&path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_files_everywhere() {
        for name in ["night", "Night 2", "a_b-c", &"x".repeat(64)] {
            assert!(check_name(name, "name").is_ok(), "{name}");
        }
        for name in [
            "",
            " a",
            "a ",
            "../a",
            "a/b",
            "a.b",
            "ä",
            "a\\b",
            "a\0",
            &"x".repeat(65),
        ] {
            assert!(check_name(name, "name").is_err(), "{name}");
        }
    }
}
