//! What a first run found, part by part: `report.json`, which the page shows and the next run continues.

use std::collections::BTreeMap;
use std::path::Path;

use difference_inversion::util::files::write_atomically;
use difference_inversion::weights::read_config;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::terminal::Failure;

/// The name of the report for programs.
pub(super) const JSON: &str = "report.json";

/// Everything that a first run found so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// What determines the results.
    pub(super) made_with: BTreeMap<String, Value>,
    /// The machine, as `dinv doctor` sees it.
    pub(super) machine: Value,
    /// The estimate of the time of learning and applying, in seconds, made before it starts.
    pub(super) estimate: Option<f64>,
    /// The parts in their order.
    pub(super) parts: Vec<Part>,
}

/// One part of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Part {
    /// Its name, unique in the run.
    pub(super) name: String,
    /// Its title for people.
    pub(super) title: String,
    pub(super) outcome: Outcome,
    pub(super) seconds: f64,
    /// The peak memory of the process during the part, in bytes.
    pub(super) peak_memory: Option<u64>,
    /// Seconds of each stage.
    pub(super) stages: BTreeMap<String, f64>,
    pub(super) notices: Vec<String>,
    #[serde(flatten)]
    pub(super) found: Found,
}

/// How a part ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    Done,
    Failed {
        message: String,
        hint: Option<String>,
    },
}

/// What a part found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) checks: Vec<Check>,
    pub(super) files: Vec<FileFound>,
    pub(super) strips: Vec<Strip>,
    /// The total loss of every step.
    pub(super) losses: Vec<f32>,
}

/// A number or text, with what it should be if that is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Check {
    pub(super) what: String,
    pub(super) found: Value,
    /// The expected value in words or numbers, if it is known.
    pub(super) expected: Option<Value>,
    /// Whether it is as expected, if that is known.
    pub(super) ok: Option<bool>,
    /// Where the expected value comes from.
    pub(super) source: Option<String>,
}

/// A file of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileFound {
    pub(super) part: String,
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// Pictures in a row, with scores of the one that was made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Strip {
    pub(super) title: String,
    pub(super) pictures: Vec<Shown>,
    pub(super) scores: Vec<Score>,
}

/// A picture of a strip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shown {
    pub(super) label: String,
    /// Its path in the folder of the run, or in the suite.
    pub(super) file: String,
    /// Whether it is one of the suite's.
    pub(super) of_suite: bool,
}

/// A metric of the picture that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    pub(super) metric: String,
    pub(super) title: String,
    pub(super) higher_is_better: bool,
    pub(super) made: f64,
    /// The same metric if nothing were changed.
    pub(super) unchanged: Option<f64>,
}

impl Check {
    /// A value of which nothing is known.
    pub(super) fn shown(what: impl Into<String>, found: impl Into<Value>) -> Self {
        Self {
            what: what.into(),
            found: found.into(),
            expected: None,
            ok: None,
            source: None,
        }
    }

    /// The same, held against what is known.
    pub(super) fn against(self, expected: impl Into<Value>, ok: bool, source: &str) -> Self {
        Self {
            expected: Some(expected.into()),
            ok: Some(ok),
            source: Some(source.to_owned()),
            ..self
        }
    }
}

impl Shown {
    /// A picture that the run made.
    pub(super) fn made(label: &str, file: impl Into<String>) -> Self {
        Self {
            label: label.to_owned(),
            file: file.into(),
            of_suite: false,
        }
    }
}

impl Part {
    pub(super) fn is_done(&self) -> bool {
        self.outcome == Outcome::Done
    }

    /// The checks that are not as expected.
    pub(super) fn off(&self) -> impl Iterator<Item = &Check> {
        self.found
            .checks
            .iter()
            .filter(|check| check.ok == Some(false))
    }
}

impl Report {
    /// The report in a folder, if there is one that continues this run.
    pub(super) fn continued(
        folder: &Path,
        made_with: &BTreeMap<String, Value>,
    ) -> anyhow::Result<Option<Self>> {
        let path = folder.join(JSON);
        if !path.is_file() {
            return Ok(None);
        }
        let report: Self = read_config(&path)?;
        let differs = |name: &&String| report.made_with.get(*name) != made_with.get(*name);
        let mut names = made_with.keys().chain(report.made_with.keys());
        match names.find(differs) {
            None => Ok(Some(report)),
            Some(name) => Err(other_run(folder, name, &report.made_with, made_with).into()),
        }
    }

    /// A part that was done, by name.
    pub(super) fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// Adds a part, in place of one of the same name.
    pub(super) fn put(&mut self, part: Part) {
        match self.parts.iter_mut().find(|known| known.name == part.name) {
            Some(known) => *known = part,
            None => self.parts.push(part),
        }
    }

    /// How many parts failed, and how many values are not as expected.
    pub(super) fn problems(&self) -> [usize; 2] {
        let failed = self.parts.iter().filter(|part| !part.is_done()).count();
        let off = self.parts.iter().map(|part| part.off().count()).sum();
        [failed, off]
    }

    /// Writes [`JSON`] to the folder of the run.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(write_atomically(&folder.join(JSON), text.as_bytes())?)
    }
}

/// The refusal to continue a run with something else.
fn other_run(
    folder: &Path,
    name: &str,
    theirs: &BTreeMap<String, Value>,
    ours: &BTreeMap<String, Value>,
) -> Failure {
    let value = |all: &BTreeMap<String, Value>| all.get(name).unwrap_or(&json!(null)).to_string();
    let message = match name {
        "settings" => format!("{} holds a run with other settings", folder.display()),
        _ => format!(
            "{} holds a run with {name} {}, not {}",
            folder.display(),
            value(theirs),
            value(ours)
        ),
    };
    Failure::usage(message).hint("write elsewhere with `-o`, or add `--overwrite` to start again")
}
