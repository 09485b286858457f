//! What a batch makes: results by what decides them, grouped by their difference.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::hub::model_of;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::models::captioner::CaptionerPlace;
use difference_inversion::util::digest::{sha256, sha256_of_file};
use serde_json::{Map, Value, json};

use crate::cli::exit::Exit;
use crate::cli::flags::ModelSettings;
use crate::cli::record::{file_name, text_of, weight_files};
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
/// The characters of B's name in such a name; four bytes each fit everywhere.
const LONGEST_STEM: usize = 50;
/// Settings that decide nothing.
const FREE: [&str; 1] = ["checkpoint_every"];

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
    /// The file that it makes, in the folder of the results.
    pub(super) fn file(&self, output: &Path) -> PathBuf {
        match &self.picture {
            Some(picture) => output.join(&picture.name),
            None => self.difference_file(output),
        }
    }

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
    pub(super) identity: Identity,
}

/// The identity of the weights: of a model of the Hub its name, commit and files, of another its contents.
#[derive(Debug, Default)]
pub(super) struct Identity {
    model: Vec<String>,
    clip: Vec<String>,
    captioner: Vec<String>,
}

impl Identity {
    /// Hashes what is not from the Hub.
    pub(super) fn of(paths: &ModelPaths) -> anyhow::Result<Self> {
        let mut identity = Self::default();
        for (network, file) in weight_files(paths)? {
            let of = if network.starts_with("clip") {
                &mut identity.clip
            } else if network.starts_with("captioner") {
                &mut identity.captioner
            } else {
                &mut identity.model
            };
            of.push(format!("{network}: {}", identity_of(&file)?));
        }
        if let CaptionerPlace::Server(served) = paths.captioner_place() {
            identity.captioner.push(served.address().to_string());
        }
        if paths.model.is_dir() && model_of(&paths.model).is_none() {
            let mut texts = texts_in(&paths.model);
            for folder in entries_of(&paths.model).filter(|path| path.is_dir()) {
                texts.extend(texts_in(&folder));
            }
            for text in texts {
                identity.model.push(sha256_of_file(&text)?);
            }
        }
        identity.model.sort();
        Ok(identity)
    }
}

fn identity_of(file: &Path) -> anyhow::Result<String> {
    let of_hub = file
        .ancestors()
        .find_map(|folder| Some((folder, model_of(folder)?)));
    Ok(match of_hub {
        Some((folder, id)) => format!("{id} {}", text_of(file.strip_prefix(folder)?)),
        None => sha256_of_file(file)?,
    })
}

/// The configurations and vocabularies in a folder.
fn texts_in(folder: &Path) -> Vec<PathBuf> {
    let is_text = |path: &PathBuf| {
        let extension = path.extension().unwrap_or_default();
        path.is_file() && (extension == "json" || extension == "txt")
    };
    entries_of(folder).filter(is_text).collect()
}

fn entries_of(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
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
            return Err(Failure::input(message).into());
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
        let settings = settings.with_model(self.model)?;
        let config = analogy(&settings, &place)?;
        let mut digest = |path: &Path| -> anyhow::Result<String> {
            if let Some(known) = digests.get(path) {
                return Ok(known.clone());
            }
            let found = sha256_of_file(path).map_err(|error| {
                let message = format!("{place}: {error}");
                anyhow::Error::from(Failure::ending(Exit::of(error.class()), message))
            })?;
            digests.insert(path.to_owned(), found.clone());
            Ok(found)
        };
        let identity =
            |what: Value| Ok::<_, anyhow::Error>(sha256(what.to_string())[..DIGITS].to_owned());
        let difference = match &entry.source {
            Source::File(path) => digest(path)?[..DIGITS].to_owned(),
            Source::Pairs(pairs) => {
                let digested = pairs.iter().map(|pair| {
                    let pictures = [digest(&pair.a)?, digest(&pair.a_prime)?];
                    Ok(json!([pictures, pair.caption_a, pair.caption_a_prime]))
                });
                let digested = digested.collect::<anyhow::Result<Vec<Value>>>()?;
                let captions = pairs
                    .iter()
                    .all(|pair| pair.caption_a.is_some() && pair.caption_a_prime.is_some());
                let clip = config.learn.lambda_clip > 0.0;
                let groups: [&dyn ErasedFlags; 2] = [&config.prompt, &config.learn];
                let made_with = self.made_with(&groups, clip, captions)?;
                identity(json!({ "learn": digested, "with": made_with }))?
            }
        };
        let picture = match entry.wanted {
            None => None,
            Some(wanted) => {
                let groups: [&dyn ErasedFlags; 2] = [&config.prompt, &config.generate];
                let made_with = self.made_with(&groups, false, wanted.caption.is_some())?;
                let id = identity(json!({
                    "apply": difference, "b": digest(&wanted.b)?, "caption": wanted.caption, "with": made_with,
                }))?;
                let stem = wanted.b.file_stem().unwrap_or_default().to_string_lossy();
                let stem: String = stem.chars().take(LONGEST_STEM).collect();
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

    /// The settings of these groups and the weights: the joint spaces if `clip`, the captioner unless all captions are
    /// given or the prompts are searched for.
    fn made_with(
        &self,
        groups: &[&dyn ErasedFlags],
        clip: bool,
        has_captions: bool,
    ) -> anyhow::Result<Value> {
        let mut settings: Map<String, Value> = self.models.file_settings().collect();
        for group in groups {
            settings.extend(group.values()?);
        }
        settings.retain(|name, _| !FREE.contains(&name.as_str()));
        let searches = settings.get("prompt_mode").and_then(Value::as_str);
        let searches = searches.is_some_and(|mode| mode != "caption" && mode != "text");
        let Identity {
            model,
            clip: joint,
            captioner,
        } = &self.identity;
        Ok(json!({
            "model": model, "clip": (clip || searches).then_some(joint),
            "captioner": (!has_captions).then_some(captioner), "dtype": self.models.dtype_name(), "settings": settings,
        }))
    }
}

/// The settings of the job at `place`, which errors name.
pub(super) fn analogy(settings: &Settings, place: &str) -> anyhow::Result<AnalogyConfig> {
    settings
        .analogy()
        .map_err(|error| match error.downcast::<Error>() {
            Ok(error @ Error::Setting { .. }) => Failure::input(format!("{place}: {error}")).into(),
            Ok(error) => error.into(),
            Err(error) => error,
        })
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
