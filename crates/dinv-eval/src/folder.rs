//! The folder of a run: `run.json`; for every method and analogy `METHOD/NAME/b_prime.png` and
//! `result.json`; and what methods learned in `learned/WHAT/NAME.safetensors`. Every file is written
//! atomically, and `result.json` last, so every result there is valid however the program ended.

pub(super) mod provenance;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::image::{fit, load_image, save_png};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::digest::sha256;
use difference_inversion::util::files::{Claim, is_empty, sweep, write_atomically};
use difference_inversion::weights::read_config;
use difference_inversion::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::metrics::derive;
use super::suite::Entry;
use super::{Scores, Told};

/// The version of the folder's format.
const FORMAT: u32 = 1;
const RUN: &str = "run.json";
const RESULT: &str = "result.json";
const B_PRIME: &str = "b_prime.png";
/// The folder of what methods learned, shared by methods that learn the same.
const LEARNED: &str = "learned";
/// The suite's pictures, for the report.
const PICTURES: &str = "pictures";
/// The longest side of a picture for the report.
const SHOWN_SIDE: u32 = 512;

/// What a run is made with. Results made with anything else are not mixed with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The version of the folder's format.
    pub format: u32,
    /// The program and its version.
    pub program: String,
    /// The suite.
    pub suite: SuiteRecord,
    /// The seed from which the seed of every analogy is derived.
    pub seed: u64,
    /// The device and number format of the models.
    pub device: String,
    /// How the text-to-image model's files were interpreted, if stated.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub options: Map<String, Value>,
    /// SHA-256 of the files of every model, by the model's role and the network; networks that no
    /// method of the run reads may be absent.
    pub models: BTreeMap<String, BTreeMap<String, String>>,
    /// SHA-256 of the networks of metrics, in this run and earlier ones.
    pub measures: BTreeMap<String, String>,
    /// The methods in the order of the tables.
    pub methods: Vec<MethodRecord>,
}

/// Which suite was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuiteRecord {
    /// Its name.
    pub name: String,
    /// Its version, if it has one.
    pub version: Value,
    /// [`Suite::identity`](super::suite::Suite::identity).
    pub identity: String,
    /// How many analogies it has.
    pub analogies: usize,
}

/// A method of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodRecord {
    /// Its name in tables and folders.
    pub name: String,
    /// The built-in method.
    pub method: String,
    /// What it is given in addition to A, A′ and B.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub told: Option<Told>,
    /// All of its settings.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub settings: Value,
    /// The reason it was skipped, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// How an analogy ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// B′ was made and measured.
    Done,
    /// It failed for this reason; another run tries again.
    Failed(String),
}

/// The result of one method on one analogy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultRecord {
    /// The analogy.
    pub name: String,
    /// Its kind of edit.
    pub kind: String,
    /// How many attributes the edit changes, if the suite states attributes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changes: Option<usize>,
    /// The edit in words; absent in results of older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edit: Option<String>,
    /// How it ended.
    pub status: Status,
    /// The seed of everything drawn.
    pub seed: u64,
    /// Time to make B′, without opening the model.
    pub seconds: f64,
    /// Latents that passed through the denoiser, in learning and drawing; absent in results of older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluations: Option<u64>,
    /// Peak memory of the process while B′ was made, in bytes, if the system reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// What it was made with: [`RunRecord::made_with`], and under `pictures`
    /// [`Entry::identity`]. Empty for results of older programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub made_with: BTreeMap<String, String>,
    /// SHA-256 of the networks of metrics that measured it.
    pub measured_with: BTreeMap<String, String>,
    /// The scores.
    pub scores: Scores,
}

impl RunRecord {
    /// Returns a record of this program and this version of the format.
    pub fn new(suite: SuiteRecord, seed: u64, device: String) -> Self {
        Self {
            format: FORMAT,
            program: format!("dinv {}", env!("CARGO_PKG_VERSION")),
            suite,
            seed,
            device,
            options: Map::new(),
            models: BTreeMap::new(),
            measures: BTreeMap::new(),
            methods: Vec::new(),
        }
    }

    /// States the difference that keeps results of this record and another from being compared.
    /// Methods, models and networks of models that only one of them has do not matter. Neither do the
    /// networks of metrics: results can be measured again.
    fn conflict(&self, there: &Self) -> Option<String> {
        let differs = |what: &str, here: &dyn std::fmt::Display, there: &dyn std::fmt::Display| {
            let (here, there) = (here.to_string(), there.to_string());
            (here != there).then(|| format!("{what} was {there}, and is {here}"))
        };
        let suite = |record: &Self| match &record.suite.version {
            Value::Null => record.suite.name.clone(),
            version => format!("{} (version {version})", record.suite.name),
        };
        let plain = differs("the form of the folder", &self.format, &there.format)
            .or_else(|| differs("the program", &self.program, &there.program))
            .or_else(|| differs("the suite", &suite(self), &suite(there)))
            .or_else(|| differs("the seed", &self.seed, &there.seed))
            .or_else(|| differs("the device", &self.device, &there.device));
        if plain.is_some() {
            return plain;
        }
        if self.options != there.options {
            return Some("the model's files are understood in another way".to_owned());
        }
        if self.suite != there.suite {
            return Some("the analogies of the suite have changed".to_owned());
        }
        for (role, files) in &self.models {
            let others = there.models.get(role);
            let differs = |(network, hash): &(&String, &String)| {
                let other = others.and_then(|others| others.get(*network));
                other.is_some_and(|other| other != *hash)
            };
            if let Some((network, _)) = files.iter().find(differs) {
                return Some(format!("{role} is another model: its {network} differs"));
            }
        }
        let of_methods = self.methods.iter().find(|method| {
            let same_name = there.methods.iter().find(|other| other.name == method.name);
            let ran = same_name.filter(|other| other.skipped.is_none() && method.skipped.is_none());
            ran.is_some_and(|other| other != *method)
        });
        of_methods.map(|method| format!("the method `{}` has other settings", method.name))
    }

    /// Adds the methods, models and networks that only the other record has. Its methods come first,
    /// as they did in the tables.
    fn join(&mut self, there: Self) {
        provenance::join(&mut self.measures, there.measures);
        let own = std::mem::replace(&mut self.methods, there.methods);
        for method in own {
            match self
                .methods
                .iter_mut()
                .find(|other| other.name == method.name)
            {
                Some(other) if other.skipped.is_some() => *other = method,
                Some(_) => {}
                None => self.methods.push(method),
            }
        }
        for (role, files) in there.models {
            let own = self.models.entry(role).or_default();
            for (network, hash) in files {
                own.entry(network).or_insert(hash);
            }
        }
    }
}

/// The folder of a run.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Returns the folder at a path, whatever its contents.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Prepares the folder for a run of these analogies, or checks that it can hold more of the same.
    /// Returns the updated record, with the methods of earlier runs. A different earlier run without
    /// results is discarded.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] for a folder with the results of another suite, seed, program or
    /// model, or of a method with other settings, and for one that contains anything else.
    pub fn prepare(&self, mut record: RunRecord, entries: &[Entry]) -> Result<RunRecord> {
        fs::create_dir_all(&self.path).map_err(Error::io(&self.path))?;
        self.sweep();
        let run = self.path.join(RUN);
        if run.is_file() {
            let there = self.record()?;
            let conflict = record
                .conflict(&there)
                .or_else(|| self.changed_pictures(entries));
            match conflict {
                Some(conflict) if self.has_results() => {
                    let reason = format!("holds results of another run: {conflict}");
                    return Err(Error::invalid_file(&self.path, reason));
                }
                Some(_) => self.forget()?,
                None => record.join(there),
            }
        } else if !is_empty(&self.path) {
            let reason = format!("is not empty and holds no {RUN} of an evaluation");
            return Err(Error::invalid_file(&self.path, reason));
        }
        write_json(&run, &record)?;
        Ok(record)
    }

    /// Locks the folder, creating it if needed, against other runs; `None` if one already works in it.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn claim(&self) -> Result<Option<Claim>> {
        fs::create_dir_all(&self.path).map_err(Error::io(&self.path))?;
        Claim::on(&self.path.join(RUN))
    }

    /// Removes hidden files that killed processes left in it.
    fn sweep(&self) {
        sweep(&self.path);
        for what in names_in(&self.path) {
            let folder = self.path.join(what);
            sweep(&folder);
            for name in names_in(&folder) {
                sweep(&folder.join(name));
            }
        }
    }

    /// The reason an existing B′ does not match the current pictures of its analogy, if there is one.
    fn changed_pictures(&self, entries: &[Entry]) -> Option<String> {
        let methods = names_in(&self.path);
        let changed = entries.iter().find(|entry| {
            let finished = methods
                .iter()
                .filter_map(|method| self.finished(method, &entry.name));
            let made_from =
                finished.filter_map(|mut result| result.made_with.remove(provenance::PICTURES));
            let made_from: BTreeSet<String> = made_from.collect();
            let now = || entry.identity().ok(); // unreadable pictures fail on their own
            !made_from.is_empty() && now().is_some_and(|now| made_from != BTreeSet::from([now]))
        });
        changed.map(|entry| format!("the pictures of `{}` have changed", entry.name))
    }

    /// Whether it has any result.
    fn has_results(&self) -> bool {
        let methods = names_in(&self.path);
        methods.iter().any(|name| !self.results(name).is_empty())
    }

    /// Removes the files of a run that left no result.
    fn forget(&self) -> Result<()> {
        let left = [LEARNED, PICTURES].map(|name| self.path.join(name));
        for folder in left.iter().filter(|folder| folder.is_dir()) {
            fs::remove_dir_all(folder).map_err(Error::io(folder))?;
        }
        Ok(())
    }

    /// What the run was made with.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if there is no such record or it is damaged.
    pub fn record(&self) -> Result<RunRecord> {
        let path = self.path.join(RUN);
        let form: Value = read_config(&path)?;
        match form.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => read_config(&path),
            Some(format) => {
                let reason = format!(
                    "of another version of the program: format {format}, expected {FORMAT}"
                );
                Err(Error::invalid_file(path, reason))
            }
            None => Err(Error::invalid_file(path, "not the record of an evaluation")),
        }
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The result of an analogy, if it was tried: its file must be readable and, if it is done, its B′
    /// must exist.
    pub fn result(&self, method: &str, name: &str) -> Option<ResultRecord> {
        let folder = self.path.join(method).join(name);
        let mut result: ResultRecord = read_config(&folder.join(RESULT)).ok()?;
        derive(&mut result.scores); // an older program may derive fewer
        let there = result.status != Status::Done || folder.join(B_PRIME).is_file();
        there.then_some(result)
    }

    /// The result of an analogy that is done.
    pub fn finished(&self, method: &str, name: &str) -> Option<ResultRecord> {
        let result = self.result(method, name)?;
        (result.status == Status::Done).then_some(result)
    }

    /// All results of a method, by name.
    pub fn results(&self, method: &str) -> Vec<ResultRecord> {
        let names = names_in(&self.path.join(method));
        names
            .iter()
            .filter_map(|name| self.result(method, name))
            .collect()
    }

    /// The B′ that a method made.
    ///
    /// # Errors
    /// As [`load_image`].
    pub fn b_prime(&self, method: &str, name: &str) -> Result<RgbImage> {
        load_image(&self.path.join(Self::b_prime_name(method, name)))
    }

    /// The path of a method's B′, relative to the folder.
    pub fn b_prime_name(method: &str, name: &str) -> String {
        format!("{method}/{name}/{B_PRIME}")
    }

    /// The path of the report's copy of a picture of the suite, relative to the folder.
    pub fn picture_name(name: &str, picture: &str) -> String {
        format!("{PICTURES}/{name}/{picture}.png")
    }

    /// Stores the result of an analogy.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn keep(
        &self,
        method: &str,
        result: &ResultRecord,
        b_prime: Option<&RgbImage>,
    ) -> Result<()> {
        let folder = self.path.join(method).join(&result.name);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        if let Some(b_prime) = b_prime {
            save_png(&folder.join(B_PRIME), b_prime, &[])?;
        }
        write_json(&folder.join(RESULT), result)
    }

    /// The path of what `learning` learned from an analogy.
    pub fn learned(&self, learning: &Value, name: &str) -> PathBuf {
        let what = &sha256(learning.to_string())[..16];
        let file = format!("{name}.safetensors");
        self.path.join(LEARNED).join(what).join(file)
    }

    /// Stores what was learned at its [path](Self::learned).
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn keep_learned(&self, path: &Path, learned: &Arrays) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        learned.write(path)
    }

    /// Copies the pictures of an analogy for the report, shrunk if they are large. Existing copies stay
    /// if a B′ was made from them.
    ///
    /// # Errors
    /// As [`load_image`], and [`Error::Io`] if a file cannot be written.
    pub fn show(&self, entry: &Entry) -> Result<()> {
        let folder = self.path.join(PICTURES).join(&entry.name);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let mut methods = names_in(&self.path).into_iter();
        let stays = methods.any(|method| self.finished(&method, &entry.name).is_some());
        for (name, path) in entry.named_pictures() {
            let shown = folder.join(format!("{name}.png"));
            if !stays || !shown.is_file() {
                save_png(&shown, &at_most(&load_image(path)?, SHOWN_SIDE), &[])?;
            }
        }
        Ok(())
    }

    /// Checks that a method can have this name.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if it cannot name a folder among the others.
    pub fn check_method_name(name: &str) -> Result<()> {
        let odd = |c: char| !(c.is_alphanumeric() || "-_.+=".contains(c));
        if name.is_empty()
            || name.starts_with('.')
            || name.contains(odd)
            || [PICTURES, LEARNED].contains(&name.to_lowercase().as_str())
        {
            return Err(Error::invalid_input(format!(
                "`{name}` cannot be the name of a method; use letters, digits, - and _"
            )));
        }
        Ok(())
    }
}

/// The names in a folder, sorted, without hidden files; empty if there is no such folder.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// The picture, shrunk if its longer side has more pixels than `side`.
fn at_most(image: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let long = width.max(height);
    if long <= side {
        return image.clone();
    }
    let scaled = |length: u32| (length * side).div_ceil(long).max(1);
    fit(image, scaled(width), scaled(height))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::invalid_input(format!("cannot be written as JSON: {error}")))?;
    write_atomically(path, (text + "\n").as_bytes())
}

#[cfg(test)]
mod tests;
