//! Suites of analogies, in every supported layout.

mod csv;
mod export;
mod manifest;
mod pix2pix_dataset;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use difference_inversion::image::load_image;
use difference_inversion::util::digest::hex;
use difference_inversion::weights::read_config;
use difference_inversion::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Analogy, Attributes, Captions};

/// The file that makes a folder a suite.
pub const SUITE: &str = "suite.json";
/// The list of a suite's analogies, in its folder.
pub const MANIFEST: &str = "manifest.jsonl";
/// The list of prompts and seeds of InstructPix2Pix's data set.
const SEEDS: &str = "seeds.json";
/// The kind of edits whose kind is not stated.
const NO_KIND: &str = "all";

/// The contents of `suite.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The suite's name.
    pub name: String,
    /// Its version, if it has one.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub version: Value,
    /// Its other fields.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// One analogy of a suite, without its pictures loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name, unique in the suite.
    pub name: String,
    /// The kind of edit.
    pub kind: String,
    /// A, A′ and B.
    pub pictures: [PathBuf; 3],
    /// The true B′, if known.
    pub b_prime: Option<PathBuf>,
    /// What the pictures show, in words.
    pub captions: Option<Captions>,
    /// The edit as an instruction.
    pub instruction: Option<String>,
    /// What the pictures show, attribute by attribute.
    pub attributes: Option<Attributes>,
}

/// Analogies that methods are measured on.
#[derive(Debug, Clone)]
pub struct Suite {
    /// Its description of itself.
    pub about: About,
    /// Its analogies.
    pub entries: Vec<Entry>,
}

impl Entry {
    /// Reads the pictures. They may differ in size: every method fits them to its own size, and metrics
    /// fit B and the true B′ to the size of the B′ that was made.
    ///
    /// # Errors
    /// As [`load_image`].
    pub fn read(&self) -> Result<Analogy> {
        let [a, a_prime, b] = &self.pictures;
        Ok(Analogy {
            name: self.name.clone(),
            kind: self.kind.clone(),
            a: load_image(a)?,
            a_prime: load_image(a_prime)?,
            b: load_image(b)?,
            b_prime: self.b_prime.as_deref().map(load_image).transpose()?,
            captions: self.captions.clone(),
            instruction: self.instruction.clone(),
            attributes: self.attributes.clone(),
        })
    }

    /// The identity of its pictures: SHA-256 of their contents.
    ///
    /// # Errors
    /// [`Error::Io`] if one cannot be read.
    pub fn identity(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, path) in self.named_pictures() {
            hash.update(name);
            let mut file = File::open(path).map_err(Error::io(path))?;
            let mut picture = Sha256::new();
            std::io::copy(&mut file, &mut picture).map_err(Error::io(path))?;
            hash.update(picture.finalize());
        }
        Ok(hex(hash))
    }

    /// The edit in words, such as `sky: day → night`: the changed attributes, else the instruction, else the captions.
    pub fn edit(&self) -> Option<String> {
        let attributes = self
            .attributes
            .as_ref()
            .map(|Attributes { b, b_prime, .. }| {
                let changed = b_prime.iter().filter_map(|(name, after)| {
                    let before = b.get(name).filter(|before| *before != after)?;
                    Some(format!("{name}: {before} → {after}"))
                });
                changed.collect::<Vec<_>>().join(", ")
            });
        let captions = self.captions.as_ref().and_then(|captions| {
            Some(format!(
                "{} → {}",
                captions.a.as_ref()?,
                captions.a_prime.as_ref()?
            ))
        });
        let edits = [attributes, self.instruction.clone(), captions];
        edits.into_iter().flatten().find(|text| !text.is_empty())
    }

    /// How many attributes the edit changes, if the suite states attributes.
    pub fn changes(&self) -> Option<usize> {
        let Attributes { b, b_prime, .. } = self.attributes.as_ref()?;
        let changed = b_prime
            .iter()
            .filter(|&(name, after)| b.get(name).is_some_and(|before| before != after));
        Some(changed.count())
    }

    /// All pictures with their names.
    pub fn named_pictures(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let names = ["a", "a_prime", "b"];
        let pictures = names.into_iter().zip(&self.pictures);
        let truth = self.b_prime.iter().map(|path| ("b_prime", path));
        pictures
            .chain(truth)
            .map(|(name, path)| (name, path.as_path()))
    }
}

impl Suite {
    /// Opens a suite: a folder with `suite.json` and `manifest.jsonl`; a folder in the layout of
    /// InstructPix2Pix's data set, in which two seeds of one prompt make an analogy; or a list of
    /// analogies, a `.jsonl` or `.csv` file, with pictures relative to it.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] naming file and line: for an invalid line, a picture that
    /// is missing or outside the folder, a name that occurs twice or cannot name a folder, and a suite
    /// without analogies.
    pub fn open(path: &Path) -> Result<Self> {
        let suite = if path.join(SUITE).is_file() {
            Self {
                about: read_config(&path.join(SUITE))?,
                entries: manifest::read(&path.join(MANIFEST))?,
            }
        } else if path.join(SEEDS).is_file() {
            Self::bare(path, pix2pix_dataset::read(path)?)
        } else if path.is_dir() {
            let reason = format!(
                "not a suite: expected {SUITE} and {MANIFEST}, or {SEEDS} of the InstructPix2Pix \
                 data set"
            );
            return Err(Error::invalid_file(path, reason));
        } else {
            let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
            match extension.to_str() {
                Some("csv") => Self::bare(path, csv::read(path)?),
                Some("jsonl") => Self::bare(path, manifest::read(path)?),
                _ => {
                    let reason = "expected the folder of a suite, or a .jsonl or .csv file";
                    File::open(path).map_err(Error::io(path))?;
                    return Err(Error::invalid_file(path, reason));
                }
            }
        };
        if suite.entries.is_empty() {
            Err(Error::invalid_file(path, "there is no analogy in it"))
        } else {
            Ok(suite)
        }
    }

    /// A suite without a description: its name is that of its file or folder.
    fn bare(path: &Path, entries: Vec<Entry>) -> Self {
        let name = path.file_stem().unwrap_or(path.as_os_str());
        let about = About {
            name: name.to_string_lossy().into_owned(),
            version: Value::Null,
            more: Map::new(),
        };
        Self { about, entries }
    }

    /// The identity of this suite: SHA-256 of everything stated about the analogies. The pictures,
    /// which may be many, are not read: see [`Entry::identity`].
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for entry in &self.entries {
            let said = (
                (&entry.name, &entry.kind, &entry.instruction),
                (&entry.captions, &entry.attributes),
            );
            hash.update(serde_json::to_vec(&said).unwrap_or_default());
            for (name, _) in entry.named_pictures() {
                hash.update(name);
            }
        }
        hex(hash)
    }

    /// The first `limit` analogies in an order of which any prefix represents the whole: each kind has its
    /// share of it. Among equals, kinds that change fewer attributes come first.
    pub fn balanced(&self, limit: Option<usize>) -> Vec<Entry> {
        let mut sizes: HashMap<&str, u64> = HashMap::new();
        for entry in &self.entries {
            *sizes.entry(&entry.kind).or_default() += 1;
        }
        let mut before: HashMap<&str, u64> = HashMap::new();
        let mut placed: Vec<(u64, &Entry)> = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let kind = entry.kind.as_str();
            let count = before.entry(kind).or_default();
            // The middle of its part of the kind, in whole millionths.
            placed.push(((2 * *count + 1) * 500_000 / sizes[kind], entry));
            *count += 1;
        }
        placed.sort_by_key(|(place, entry)| (*place, entry.changes()));
        let limit = limit.unwrap_or(usize::MAX);
        placed
            .into_iter()
            .map(|(_, entry)| entry.clone())
            .take(limit)
            .collect()
    }
}

/// Collects the entries of one list and rejects invalid ones.
struct Entries<'a> {
    list: &'a Path,
    folder: &'a Path,
    names: HashSet<String>,
    entries: Vec<Entry>,
}

impl<'a> Entries<'a> {
    /// For the list at `list`, with pictures relative to its folder.
    fn of(list: &'a Path) -> Self {
        Self {
            list,
            folder: list.parent().unwrap_or(Path::new("")),
            names: HashSet::new(),
            entries: Vec::new(),
        }
    }

    /// An error in a line.
    fn wrong(&self, line: usize, reason: impl std::fmt::Display) -> Error {
        Error::invalid_file(self.list, format!("line {line}: {reason}"))
    }

    /// The path of a picture named in a line; it must exist inside the folder.
    fn picture(&self, line: usize, field: &str, name: &str) -> Result<PathBuf> {
        if name.trim().is_empty() {
            return Err(self.wrong(line, format!("`{field}` is empty")));
        }
        let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !Path::new(name).components().all(inside) {
            let reason = format!(
                "`{field}`: `{name}` is not inside the suite's folder; paths are relative to it"
            );
            return Err(self.wrong(line, reason));
        }
        let path = self.folder.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(self.wrong(line, format!("`{field}`: there is no picture `{name}`")))
        }
    }

    fn push(&mut self, line: usize, entry: Entry) -> Result<()> {
        let name = &entry.name;
        let odd = |c: char| c.is_control() || "/\\:*?\"<>|".contains(c);
        if name.is_empty() || name.len() > 100 || name.starts_with('.') || name.contains(odd) {
            let reason = format!(
                "`name`: `{name}` cannot be the name of a folder; use letters, digits, - and _"
            );
            return Err(self.wrong(line, reason));
        }
        if !self.names.insert(name.to_lowercase()) {
            return Err(self.wrong(line, format!("`name`: `{name}` is there twice")));
        }
        if entry.kind.is_empty() {
            return Err(self.wrong(line, "`kind` is empty"));
        }
        self.entries.push(entry);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
