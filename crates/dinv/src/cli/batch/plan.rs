//! What a batch makes: results by what decides them, grouped by their difference.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::util::digest::{sha256, sha256_of_file};
use serde_json::{Map, Value, json};

use crate::cli::flags::ModelSettings;
use crate::cli::record::{file_name, last_names, text_of};
use crate::cli::settings::{ErasedFlags, Settings};
use crate::cli::shard::Shard;
use crate::cli::terminal::Failure;

use super::manifest::{Entry, Source, Wanted};

/// The folder of learned differences, in that of the results.
pub(super) const DIFFERENCES: &str = "differences";
/// Digits of an identity.
const DIGITS: usize = 16;
/// Those in the name of a picture that was given none.
const SHOWN: usize = 8;

/// A job with what decides its result.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) line: usize,
    pub(super) source: Source,
    pub(super) config: AnalogyConfig,
    /// The identity of its difference.
    pub(super) difference: String,
    /// `None` to learn only.
    pub(super) picture: Option<Picture>,
}

/// A picture to make.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) wanted: Wanted,
    pub(super) id: String,
    /// The name of its file.
    pub(super) name: String,
}

impl Task {
    /// The file of its difference, in the folder of the results.
    pub(super) fn difference_file(&self, output: &Path) -> PathBuf {
        match &self.source {
            Source::File(path) => path.clone(),
            Source::Pairs(_) => {
                let name = format!("{}.safetensors", self.difference);
                output.join(DIFFERENCES).join(name)
            }
        }
    }
}

/// What all jobs share.
pub(super) struct Shared<'a> {
    /// The file of the jobs.
    pub(super) manifest: &'a Path,
    pub(super) settings: &'a Settings,
    pub(super) models: &'a ModelSettings,
    /// The folder or file of the model.
    pub(super) model: &'a Path,
}

/// The tasks, those of one difference together, in the order in which the differences appear; and notes. Of equal jobs
/// only the first is a task.
pub(super) fn tasks(
    entries: Vec<Entry>,
    shared: &Shared<'_>,
) -> anyhow::Result<(Vec<Task>, Vec<String>)> {
    let mut digests = HashMap::new();
    let mut tasks: Vec<Task> = Vec::new();
    let mut notes = Vec::new();
    let mut known: HashMap<(String, String), usize> = HashMap::new();
    let mut named: BTreeMap<String, usize> = BTreeMap::new();
    for entry in entries {
        let line = entry.line;
        let task = shared.task(entry, &mut digests)?;
        let (id, name) = match &task.picture {
            Some(picture) => (picture.id.clone(), picture.name.clone()),
            None => (task.difference.clone(), String::new()),
        };
        if let Some(first) = known.get(&(id.clone(), name.clone())) {
            notes.push(format!("line {line} is the same job as line {first}"));
            continue;
        }
        // On some systems, names that differ in their case are one.
        if !name.is_empty()
            && let Some(first) = named.insert(name.to_lowercase(), line)
        {
            let message = format!(
                "{}:{line}: name: line {first} writes {name}, too",
                shared.manifest.display()
            );
            return Err(Failure::usage(message).into());
        }
        known.insert((id, name), line);
        tasks.push(task);
    }
    let mut places: HashMap<String, usize> = HashMap::new();
    for task in &tasks {
        let next = places.len();
        places.entry(task.difference.clone()).or_insert(next);
    }
    tasks.sort_by_key(|task| places[&task.difference]); // stable
    Ok((tasks, notes))
}

impl Shared<'_> {
    fn task(&self, entry: Entry, digests: &mut HashMap<PathBuf, String>) -> anyhow::Result<Task> {
        let place = format!("{}:{}", self.manifest.display(), entry.line);
        let settings = self.settings.clone().with_line(&place, &entry.settings)?;
        let config = settings.with_model(self.model)?.analogy()?;
        let mut digest = |path: &Path| -> anyhow::Result<String> {
            if let Some(known) = digests.get(path) {
                return Ok(known.clone());
            }
            let found = sha256_of_file(path).map_err(|error| {
                let message = format!("{place}: {error}");
                anyhow::Error::from(Failure::new(message))
            })?;
            digests.insert(path.to_owned(), found.clone());
            Ok(found)
        };
        let identity =
            |what: Value| Ok::<_, anyhow::Error>(sha256(what.to_string())[..DIGITS].to_owned());
        let difference = match &entry.source {
            Source::File(path) => digest(path)?[..DIGITS].to_owned(),
            Source::Pairs(pairs) => {
                let pairs = pairs.iter().map(|pair| {
                    let pictures = [digest(&pair.a)?, digest(&pair.a_prime)?];
                    Ok(json!([pictures, pair.caption_a, pair.caption_a_prime]))
                });
                let pairs = pairs.collect::<anyhow::Result<Vec<Value>>>()?;
                let made_with = self.made_with(&[&config.prompt, &config.learn])?;
                identity(json!({ "learn": pairs, "with": made_with }))?
            }
        };
        let picture = match entry.wanted {
            None => None,
            Some(wanted) => {
                let made_with = self.made_with(&[&config.prompt, &config.generate])?;
                let id = identity(json!({
                    "apply": difference, "b": digest(&wanted.b)?, "caption": wanted.caption, "with": made_with,
                }))?;
                let stem = wanted
                    .b
                    .file_stem()
                    .map_or_else(String::new, |stem| file_name(Path::new(stem)));
                let name = match &wanted.name {
                    Some(name) => format!("{name}.png"),
                    None => format!("{stem}-{}.png", &id[..SHOWN]),
                };
                Some(Picture { wanted, id, name })
            }
        };
        Ok(Task {
            line: entry.line,
            source: entry.source,
            config,
            difference,
            picture,
        })
    }

    /// The model and the settings of these groups.
    fn made_with(&self, groups: &[&dyn ErasedFlags]) -> anyhow::Result<Value> {
        let mut settings: Map<String, Value> = self.models.file_settings().collect();
        for group in groups {
            settings.extend(group.values()?);
        }
        Ok(json!({
            "model": last_names(&text_of(self.model)), "dtype": self.models.dtype_name(), "settings": settings,
        }))
    }
}

/// The seconds that earlier runs took, in files of their own.
#[derive(Debug, Default)]
pub(super) struct Times {
    pub(super) learning: Vec<f64>,
    pub(super) drawing: Vec<f64>,
}

impl Times {
    /// The name of the file of a run of this part.
    pub(super) fn file(part: Shard) -> String {
        let (number, of) = part.numbers();
        format!("times-{number}-of-{of}.jsonl")
    }

    /// A line of such a file.
    pub(super) fn line(kind: &str, seconds: f64) -> String {
        json!({ "kind": kind, "seconds": (seconds * 1000.0).round() / 1000.0 }).to_string() + "\n"
    }

    /// Reads those in a folder.
    pub(super) fn read(folder: &Path) -> Self {
        let mut times = Self::default();
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let is_one = |path: &PathBuf| {
            let name = file_name(path);
            name.starts_with("times-") && name.ends_with(".jsonl")
        };
        for path in entries.map(|entry| entry.path()).filter(is_one) {
            let text = fs::read_to_string(&path).unwrap_or_default();
            // A killed run leaves at most one partial line.
            let lines = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            for line in lines {
                let seconds = line["seconds"].as_f64();
                match line["kind"].as_str() {
                    Some("learn") => times.learning.extend(seconds),
                    Some("apply") => times.drawing.extend(seconds),
                    _ => {}
                }
            }
        }
        times
    }

    /// The estimated seconds of so much work; `None` if no run has done any such.
    pub(super) fn estimate(&self, differences: usize, pictures: usize) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let of = |times: &[f64], count: usize| match (times.len(), count) {
            (_, 0) => Some(0.0),
            (0, _) => None,
            (known, count) => Some(times.iter().sum::<f64>() / known as f64 * count as f64),
        };
        Some(of(&self.learning, differences)? + of(&self.drawing, pictures)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_estimated_from_what_was_done() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Times::read(folder.path()).estimate(1, 1), None);
        let part = folder.path().join(Times::file(Shard::default()));
        let lines = [
            Times::line("learn", 10.0),
            Times::line("apply", 1.0),
            Times::line("apply", 3.0),
        ];
        fs::write(part, lines.concat() + "{\"kind\": \"app").unwrap();
        let times = Times::read(folder.path());
        assert_eq!(times.estimate(2, 3), Some(26.0));
        assert_eq!(times.estimate(0, 0), Some(0.0));
    }
}
