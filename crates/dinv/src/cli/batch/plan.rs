//! What a batch makes: results by what decides them, grouped by their difference.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::hub::model_of;
use difference_inversion::job::PairFiles;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::models::captioner::CaptionerPlace;
use difference_inversion::util::digest::{sha256, sha256_of_file};
use serde::{Deserialize, Serialize};
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
    /// What learning its difference takes, and making its picture.
    pub(super) learning: Effort,
    pub(super) drawing: Effort,
}

/// What decides how long something takes: the identity of its settings, of the number of pairs, and of how the model runs.
/// What the pictures show hardly matters.
pub(super) type Effort = String;

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
                let captions = pairs.iter().all(PairFiles::has_captions);
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
        let pairs = match &entry.source {
            Source::Pairs(pairs) => pairs.len(),
            Source::File(_) => 0,
        };
        let effort = |groups: &[&dyn ErasedFlags], pairs: usize| -> anyhow::Result<Effort> {
            let settings = groups.iter().map(|group| group.values());
            let settings = settings.collect::<anyhow::Result<Vec<_>>>()?;
            let models = self.models;
            let runs = [
                models.device_name(),
                models.dtype_name(),
                models.memory_name(),
            ];
            identity(json!([
                settings,
                pairs,
                self.identity.model,
                models.resolution,
                runs
            ]))
        };
        Ok(Task {
            line: entry.line,
            source: entry.source,
            learning: effort(&[&config.prompt, &config.learn], pairs)?,
            drawing: effort(&[&config.prompt, &config.generate], 0)?,
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
pub(super) struct Times(Vec<Time>);

/// One of them: what was done, and its effort.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Time {
    pub(super) kind: TaskKind,
    /// Unknown in the files of earlier versions.
    #[serde(default)]
    pub(super) effort: Effort,
    pub(super) seconds: f64,
}

/// What takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TaskKind {
    Learn,
    Apply,
}

impl Time {
    /// As a line of such a file.
    pub(super) fn line(&self) -> String {
        let seconds = (self.seconds * 1000.0).round() / 1000.0;
        let rounded = Self {
            seconds,
            ..self.clone()
        };
        serde_json::to_string(&rounded).unwrap_or_default() + "\n"
    }
}

impl Times {
    /// The name of the file of a run of this part.
    pub(super) fn file(part: Shard) -> String {
        let (number, of) = part.numbers();
        format!("times-{number}-of-{of}.jsonl")
    }

    /// Reads those in a folder.
    pub(super) fn read(folder: &Path) -> Self {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let is_one = |path: &PathBuf| {
            let name = file_name(path);
            name.starts_with("times-") && name.ends_with(".jsonl")
        };
        let texts = entries.map(|entry| entry.path()).filter(is_one);
        let texts: Vec<String> = texts
            .filter_map(|path| fs::read_to_string(path).ok())
            .collect();
        // A killed run leaves at most one partial line.
        let lines = texts.iter().flat_map(|text| text.lines());
        Self(
            lines
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        )
    }

    /// The estimated seconds of so much work: the mean of the same effort, else of all efforts of this kind; `None` if
    /// there are none.
    pub(super) fn estimate<'a>(
        &self,
        work: impl IntoIterator<Item = (TaskKind, &'a Effort)>,
    ) -> Option<f64> {
        let mut work = work.into_iter();
        work.try_fold(0.0, |sum, (kind, effort)| {
            let of_kind = || self.0.iter().filter(move |time| time.kind == kind);
            let same = mean(of_kind().filter(|time| time.effort == *effort));
            Some(sum + same.or_else(|| mean(of_kind()))?)
        })
    }
}

/// The mean of the seconds, if there are any.
fn mean<'a>(times: impl Iterator<Item = &'a Time>) -> Option<f64> {
    let seconds: Vec<f64> = times.map(|time| time.seconds).collect();
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let count = seconds.len() as f64;
    (count > 0.0).then(|| seconds.iter().sum::<f64>() / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_estimated_from_what_was_done() {
        let folder = tempfile::tempdir().unwrap();
        let estimate = |work: &[(TaskKind, &str)]| {
            let work: Vec<_> = work
                .iter()
                .map(|(kind, effort)| (*kind, (*effort).to_owned()))
                .collect();
            let work = work.iter().map(|(kind, effort)| (*kind, effort));
            Times::read(folder.path()).estimate(work)
        };
        assert_eq!(estimate(&[(TaskKind::Learn, "much")]), None);
        let part = folder.path().join(Times::file(Shard::default()));
        let lines = [
            (TaskKind::Learn, "much", 10.0),
            (TaskKind::Apply, "little", 1.0),
            (TaskKind::Apply, "little", 3.0),
            (TaskKind::Apply, "much", 8.0),
        ];
        let lines = lines.map(|(kind, effort, seconds)| {
            Time {
                kind,
                effort: effort.to_owned(),
                seconds,
            }
            .line()
        });
        let old = "{\"kind\": \"apply\", \"seconds\": 4.0}\n";
        fs::write(part, old.to_owned() + &lines.concat() + "{\"kind\": \"app").unwrap();
        assert_eq!(
            estimate(&[(TaskKind::Learn, "much"), (TaskKind::Apply, "little")]),
            Some(12.0)
        );
        // An effort that is new: the mean of all.
        assert_eq!(estimate(&[(TaskKind::Apply, "other")]), Some(4.0));
        assert_eq!(estimate(&[]), Some(0.0));
    }
}
