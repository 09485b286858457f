//! The report of a run: tables for people and for programs, and a page with the pictures.

mod page;
mod tables;

pub use self::page::{COLOURS, escaped};

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use difference_inversion::util::files::write_atomically;
use difference_inversion::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

use super::statistics::{Estimate, bootstrap};
use super::{Folder, METRICS, MethodRecord, Metric, ResultRecord, RunRecord, Status};

/// The files of a report.
pub const FILES: [&str; 4] = ["report.md", "results.csv", "report.json", "report.html"];

/// The results of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// What the run was made with.
    pub run: RunRecord,
    /// The results of each method, in the order of the run.
    pub methods: Vec<MethodResults>,
}

/// The results of one method.
#[derive(Debug, Clone)]
pub struct MethodResults {
    /// The method.
    pub record: MethodRecord,
    /// The result of each analogy, by name.
    pub results: Vec<ResultRecord>,
}

/// The analogies whose edits change this number of attributes, or all if it is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Group(pub Option<usize>);

/// The means of one method over one group of analogies.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The method's name.
    pub method: String,
    /// Analogies that were solved.
    pub solved: usize,
    /// Analogies that failed.
    pub failed: usize,
    /// Mean seconds of an analogy.
    pub seconds: Option<f64>,
    /// Mean evaluations of the denoiser, if known of every analogy.
    pub evaluations: Option<f64>,
    /// The most memory of any analogy, in bytes.
    pub peak_memory: Option<u64>,
    /// The estimate of every metric that was measured, in the order of [`METRICS`].
    pub scores: Vec<(&'static str, Estimate)>,
}

impl MethodResults {
    /// The results that have scores.
    pub fn solved(&self) -> impl Iterator<Item = &ResultRecord> {
        let done = |result: &&ResultRecord| result.status == Status::Done;
        self.results.iter().filter(done)
    }

    /// The values of a metric in a group, by kind.
    pub fn by_kind(&self, metric: &str, group: Group) -> Vec<(&str, Vec<f64>)> {
        let mut kinds: Vec<(&str, Vec<f64>)> = Vec::new();
        for result in self.solved().filter(|result| group.has(result)) {
            let Some(&score) = result.scores.get(metric) else {
                continue;
            };
            match kinds.iter_mut().find(|(kind, _)| *kind == result.kind) {
                Some((_, scores)) => scores.push(score),
                None => kinds.push((&result.kind, vec![score])),
            }
        }
        kinds
    }

    fn summary(&self, group: Group, seed: u64) -> Summary {
        let of_group = self.results.iter().filter(|result| group.has(result));
        let (solved, failed): (Vec<_>, Vec<_>) =
            of_group.partition(|result| result.status == Status::Done);
        let seconds: f64 = solved.iter().map(|result| result.seconds).sum();
        let evaluations: Option<u64> = solved.iter().map(|result| result.evaluations).sum();
        let evaluations = evaluations.filter(|_| !solved.is_empty());
        let estimate = |metric: &Metric| {
            let kinds = self.by_kind(metric.name, group);
            let groups: Vec<Vec<f64>> = kinds.into_iter().map(|(_, scores)| scores).collect();
            Some((metric.name, bootstrap(&groups, seed)?))
        };
        Summary {
            method: self.record.name.clone(),
            solved: solved.len(),
            failed: failed.len(),
            seconds: (!solved.is_empty()).then(|| seconds / solved.len() as f64),
            evaluations: evaluations.map(|sum| sum as f64 / solved.len() as f64),
            peak_memory: solved.iter().filter_map(|result| result.peak_memory).max(),
            scores: METRICS.par_iter().filter_map(estimate).collect(),
        }
    }
}

impl Group {
    /// Whether an analogy with this result is in the group.
    pub fn has(self, result: &ResultRecord) -> bool {
        self.0.is_none() || self.0 == result.changes
    }

    /// Its title for people.
    pub fn title(self) -> String {
        match self.0 {
            None => "All analogies".to_owned(),
            Some(1) => "Edits of one attribute".to_owned(),
            Some(count) => format!("Edits of {count} attributes"),
        }
    }

    /// The title with the number of analogies run.
    fn counted(self, summaries: &[Summary]) -> String {
        let tried = summaries.iter().map(|one| one.solved + one.failed);
        let count = tried.max().unwrap_or(0);
        let analogies = if count == 1 { "analogy" } else { "analogies" };
        match self.0 {
            None => format!("{count} {analogies}"),
            _ => format!("{}: {count} {analogies}", self.title()),
        }
    }
}

impl Report {
    /// Reads the results in a folder. A method with results was not skipped, whatever the record
    /// says: the record may be that of one part of the run, the results those of another.
    ///
    /// # Errors
    /// As [`Folder::record`].
    pub fn gather(folder: &Folder) -> Result<Self> {
        let run = folder.record()?;
        let methods = (run.methods.iter())
            .map(|record| {
                let results = folder.results(&record.name);
                let mut record = record.clone();
                if !results.is_empty() {
                    record.skipped = None;
                }
                MethodResults { record, results }
            })
            .collect();
        Ok(Self { run, methods })
    }

    /// Notes for readers of the tables: how many of a method's results do not match the record of the run, as
    /// happens when folders of different runs are merged.
    pub fn notices(&self) -> Vec<String> {
        let of_method = |method: &MethodResults| {
            let made_with = self.run.made_with(&method.record);
            let mut names = BTreeSet::new();
            let others = method.results.iter().filter(|result| {
                let otherwise = result.made_otherwise(&made_with);
                names.extend(otherwise.iter().map(|name| (*name).to_owned()));
                !otherwise.is_empty()
            });
            let (count, all) = (others.count(), method.results.len());
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            (count > 0).then(|| {
                format!(
                    "{count} of {all} results of `{}` were made otherwise than run.json says: {names}",
                    method.record.name
                )
            })
        };
        self.methods.iter().filter_map(of_method).collect()
    }

    /// The groups of analogies that are averaged.
    pub fn groups(&self) -> Vec<Group> {
        let results = self.methods.iter().flat_map(|method| &method.results);
        let told: BTreeSet<Option<usize>> = results.map(|result| result.changes).collect();
        if told.iter().all(Option::is_some) && !told.is_empty() {
            told.into_iter().map(Group).collect()
        } else {
            vec![Group(None)]
        }
    }

    /// The means of every method over a group.
    pub fn summaries(&self, group: Group) -> Vec<Summary> {
        let methods = self.methods.par_iter();
        let summaries = methods.map(|method| method.summary(group, self.run.seed));
        summaries.collect()
    }

    /// Writes [`FILES`] to the folder of the run, each atomically; returns their paths.
    ///
    /// # Errors
    /// [`Error::Io`] if one cannot be written.
    pub fn write(&self, folder: &Folder) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(folder.path()).map_err(Error::io(folder.path()))?;
        let summaries: Vec<(Group, Vec<Summary>)> = (self.groups().into_iter())
            .map(|group| (group, self.summaries(group)))
            .collect();
        let texts = [
            self.markdown_of(&summaries),
            self.csv(),
            self.json_of(&summaries),
            self.page(&summaries),
        ];
        let mut paths = Vec::new();
        for (name, text) in FILES.iter().zip(texts) {
            let path = folder.path().join(name);
            write_atomically(&path, text.as_bytes())?;
            paths.push(path);
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests;
