//! The tables of a report, as Markdown, CSV and JSON.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{Group, Report, Summary};
use crate::statistics::{Estimate, RESAMPLES, mean_of_means};
use crate::{METRICS, Metric, Question, Status};

/// The questions, with the headings of their tables.
const QUESTIONS: [(Question, &str); 4] = [
    (Question::Edit, "Is the change made?"),
    (Question::Preservation, "Is everything else kept?"),
    (Question::Truth, "Is it the true B′?"),
    (Question::Further, "The same, as others compute it"),
];

impl Report {
    /// All tables for people.
    pub fn markdown(&self) -> String {
        let groups = self.groups().into_iter();
        let summaries: Vec<_> = groups.map(|group| (group, self.summaries(group))).collect();
        self.markdown_of(&summaries)
    }

    pub(super) fn markdown_of(&self, summaries: &[(Group, Vec<Summary>)]) -> String {
        let mut text = format!("# {}\n", self.title());
        let notes = format!(
            "\nSeed {}; {}; {}. Means over the analogies of each kind first, then over kinds, with \
             95 % intervals (percentile bootstrap within kinds, {RESAMPLES} resamples).\n",
            self.run.seed, self.run.program, self.run.device
        );
        text += &notes;
        for (group, summaries) in summaries {
            text += &format!("\n## {}\n", group.title());
            text += &overview(self, summaries);
            for (question, title) in QUESTIONS {
                text += &metrics_table(summaries, question, title);
            }
            text += &self.kinds_table(*group);
        }
        text + &self.remarks()
    }

    /// The means in a few lines, for a terminal: what a reader checks first.
    pub fn brief(&self) -> String {
        let judged = [("right", "all right"), ("edit", "shown"), ("kept", "kept")];
        let unjudged = [
            ("clip_direction", "CLIP direction"),
            ("clip_i_b", "CLIP-I to B"),
            ("ssim_b", "SSIM to B"),
        ];
        let mut text = String::new();
        for group in self.groups() {
            let summaries = self.summaries(group);
            let has = |name: &str| {
                let mut scores = summaries.iter().flat_map(|one| &one.scores);
                scores.any(|(metric, _)| *metric == name)
            };
            let columns = if has("right") { judged } else { unjudged };
            let width = summaries
                .iter()
                .map(|one| one.method.len())
                .max()
                .unwrap_or(0);
            let heads = columns.map(|(_, title)| format!("{title:>14}")).concat();
            text += &format!(
                "{}\n{:width$}{heads}{:>10}\n",
                group.counted(&summaries),
                "",
                "seconds"
            );
            let tried = |one: &Summary| one.solved + one.failed;
            let most = summaries.iter().map(tried).max().unwrap_or(0);
            for summary in summaries.iter().filter(|one| tried(one) > 0) {
                let cells = columns.map(|(name, _)| {
                    let found = summary.scores.iter().find(|(metric, _)| *metric == name);
                    let cell = found.map_or_else(
                        || "–".to_owned(),
                        |(_, score)| match has("right") {
                            true => format!("{:.0} %", 100.0 * score.mean),
                            false => format!("{:.3}", score.mean),
                        },
                    );
                    format!("{cell:>14}")
                });
                let seconds = summary
                    .seconds
                    .map_or_else(|| "–".to_owned(), |s| format!("{s:.1}"));
                let mut others = String::new();
                if tried(summary) < most {
                    others += &format!("  {} of {most}", tried(summary));
                }
                if summary.failed > 0 {
                    others += &format!("  {} failed", summary.failed);
                }
                text += &format!(
                    "{:width$}{}{seconds:>10}{others}\n",
                    summary.method,
                    cells.concat()
                );
            }
        }
        text
    }

    /// The title of the results.
    pub(super) fn title(&self) -> String {
        let suite = &self.run.suite;
        let split = match &suite.version {
            Value::Null => String::new(),
            Value::String(version) => format!(", version {version}"),
            version => format!(", version {version}"),
        };
        let results = self.methods.iter().flat_map(|method| &method.results);
        let tried: BTreeSet<&str> = results.map(|result| result.name.as_str()).collect();
        let part = match tried.len() {
            count if count < suite.analogies => format!("{count} of "),
            _ => String::new(),
        };
        format!(
            "Picture analogies: {}{split}, {part}{} analogies",
            suite.name, suite.analogies
        )
    }

    /// The edit and preservation scores by kind; CLIP's direction if there are no judge's scores.
    fn kinds_table(&self, group: Group) -> String {
        let judged = self
            .methods
            .iter()
            .any(|method| !method.by_kind("edit", group).is_empty());
        let (metrics, title): (&[&str], _) = if judged {
            (&["edit", "kept"], "edit shown / others kept, %")
        } else {
            (&["clip_direction"], "CLIP direction")
        };
        let ran = self
            .methods
            .iter()
            .filter(|method| method.solved().next().is_some());
        let ran: Vec<_> = ran.collect();
        let mut kinds: Vec<&str> = Vec::new();
        for method in &ran {
            for (kind, _) in method.by_kind(metrics[0], group) {
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
        }
        if kinds.len() < 2 {
            return String::new();
        }
        let names = ran.iter().map(|method| method.record.name.as_str());
        let mut text = table_head(std::iter::once(title).chain(names));
        for kind in kinds {
            let cells = ran.iter().map(|method| {
                let shares = metrics.iter().map(|metric| {
                    let all = method.by_kind(metric, group);
                    let own = all.into_iter().find(|(other, _)| *other == kind);
                    let mean = own.and_then(|(_, scores)| mean_of_means(&[scores]));
                    match (mean, judged) {
                        (None, _) => "–".to_owned(),
                        (Some(mean), true) => format!("{:.0}", 100.0 * mean),
                        (Some(mean), false) => format!("{mean:.3}"),
                    }
                });
                shares.collect::<Vec<_>>().join(" / ")
            });
            text += &table_row(std::iter::once(kind.to_owned()).chain(cells));
        }
        text
    }

    /// Skipped methods, failures and settings.
    fn remarks(&self) -> String {
        /// Failures listed for each method.
        const SHOWN: usize = 10;
        let mut text = String::new();
        for method in &self.methods {
            let name = &method.record.name;
            if let Some(reason) = &method.record.skipped {
                let _ = writeln!(text, "- `{name}` was skipped: {reason}");
            }
            let failures = method
                .results
                .iter()
                .filter_map(|result| match &result.status {
                    Status::Failed(reason) => Some((&result.name, reason)),
                    Status::Done => None,
                });
            for (analogy, reason) in failures.take(SHOWN) {
                let _ = writeln!(text, "- `{name}` failed on `{analogy}`: {reason}");
            }
        }
        if !text.is_empty() {
            text = format!("\n## Skipped and failed\n\n{text}");
        }
        let notices = self.notices().into_iter();
        let notices: String = notices.map(|notice| format!("- {notice}\n")).collect();
        if !notices.is_empty() {
            text += &format!(
                "\n## Made otherwise\n\nA mean over results that were made in different ways \
                 describes no method.\n\n{notices}"
            );
        }
        text += &self.measured_otherwise();
        text += "\n## Settings\n\n";
        for method in self
            .methods
            .iter()
            .filter(|method| !method.record.settings.is_null())
        {
            let record = &method.record;
            let _ = writeln!(
                text,
                "- `{}` ({}): `{}`",
                record.name, record.method, record.settings
            );
        }
        for (role, files) in &self.run.models {
            for (file, hash) in files {
                let _ = writeln!(
                    text,
                    "- {role} `{file}`: SHA-256 `{}…`",
                    &hash[..hash.len().min(16)]
                );
            }
        }
        for (network, hash) in &self.run.measures {
            let _ = writeln!(
                text,
                "- {network} (metrics): SHA-256 `{}…`",
                &hash[..hash.len().min(16)]
            );
        }
        text
    }

    /// The results measured with networks other than those in the record of the run.
    fn measured_otherwise(&self) -> String {
        let mut text = String::new();
        for method in &self.methods {
            let other = method
                .solved()
                .filter(|result| result.measured_with != self.run.measures);
            let (other, solved) = (other.count(), method.solved().count());
            if other > 0 {
                let name = &method.record.name;
                let _ = writeln!(text, "- `{name}`: {other} of {solved}");
            }
        }
        if text.is_empty() {
            text
        } else {
            format!(
                "\n## Measured with other networks\n\nThese results were not measured with \
                 exactly the networks named below; a run of the method with these networks measures \
                 them again.\n\n{text}"
            )
        }
    }

    /// One row per analogy and method.
    pub fn csv(&self) -> String {
        let head = [
            "method",
            "given",
            "name",
            "kind",
            "changes",
            "status",
            "reason",
            "seed",
            "seconds",
            "evaluations",
            "peak_memory",
        ];
        let names = METRICS.iter().map(|metric| metric.name);
        let mut text = head.into_iter().chain(names).collect::<Vec<_>>().join(",") + "\n";
        for method in &self.methods {
            for result in &method.results {
                let (status, reason) = match &result.status {
                    Status::Done => ("done", ""),
                    Status::Failed(reason) => ("failed", reason.as_str()),
                };
                let own = [
                    method.record.name.clone(),
                    cell(method.record.told),
                    result.name.clone(),
                    result.kind.clone(),
                    cell(result.changes),
                    status.to_owned(),
                    reason.to_owned(),
                    result.seed.to_string(),
                    result.seconds.to_string(),
                    cell(result.evaluations),
                    cell(result.peak_memory),
                ];
                let scores = METRICS
                    .iter()
                    .map(|metric| cell(result.scores.get(metric.name)));
                let cells = own.into_iter().chain(scores).map(|cell| quoted(&cell));
                text += &(cells.collect::<Vec<_>>().join(",") + "\n");
            }
        }
        text
    }

    pub(super) fn json_of(&self, summaries: &[(Group, Vec<Summary>)]) -> String {
        let groups: Vec<Value> = (summaries.iter())
            .map(|(group, summaries)| {
                let methods = summaries.iter().map(|summary| {
                    let scores: Map<String, Value> = (summary.scores.iter())
                        .map(|(name, estimate)| ((*name).to_owned(), json!(estimate)))
                        .collect();
                    json!({
                        "method": summary.method, "solved": summary.solved,
                        "failed": summary.failed, "seconds": summary.seconds,
                        "evaluations": summary.evaluations,
                        "peak_memory": summary.peak_memory, "scores": scores,
                    })
                });
                json!({ "changes": group.0, "methods": methods.collect::<Vec<_>>() })
            })
            .collect();
        let results: Map<String, Value> = (self.methods.iter())
            .map(|method| (method.record.name.clone(), json!(method.results)))
            .collect();
        let report = json!({ "run": self.run, "groups": groups, "results": results });
        serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"
    }
}

/// What a cell of the list says: nothing of what is unknown.
fn cell(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// The methods with what they are given, what they solved, and their time and memory.
fn overview(report: &Report, summaries: &[Summary]) -> String {
    let head = [
        "method",
        "given",
        "solved",
        "failed",
        "s per analogy",
        "evaluations",
        "peak memory",
    ];
    let mut text = table_head(head);
    for (summary, method) in summaries.iter().zip(&report.methods) {
        let record = &method.record;
        let known = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
        text += &table_row([
            record.name.clone(),
            match record.skipped {
                Some(_) => "skipped, see below".to_owned(),
                None => known(record.told.map(|told| told.to_string())),
            },
            summary.solved.to_string(),
            summary.failed.to_string(),
            known(summary.seconds.map(|seconds| format!("{seconds:.1}"))),
            known(summary.evaluations.map(|count| format!("{count:.0}"))),
            known(
                summary
                    .peak_memory
                    .map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9)),
            ),
        ]);
    }
    text
}

/// The estimates of all metrics of one question.
fn metrics_table(summaries: &[Summary], question: Question, title: &str) -> String {
    let estimate = |summary: &Summary, metric: &Metric| {
        let scores = summary.scores.iter();
        let own = scores.filter(|(name, _)| *name == metric.name);
        own.map(|(_, estimate)| *estimate).next()
    };
    let metrics: Vec<&Metric> = (METRICS.iter())
        .filter(|metric| metric.question == question)
        .filter(|metric| summaries.iter().any(|one| estimate(one, metric).is_some()))
        .collect();
    if metrics.is_empty() {
        return String::new();
    }
    let mut text = table_head(std::iter::once(title).chain(metrics.iter().map(|one| one.title)));
    for summary in summaries.iter().filter(|summary| summary.solved > 0) {
        let cells = metrics
            .iter()
            .map(|metric| match estimate(summary, metric) {
                Some(estimate) => shown(&estimate, summary.solved),
                None => "–".to_owned(),
            });
        text += &table_row(std::iter::once(summary.method.clone()).chain(cells));
    }
    text
}

/// An estimate with its interval, with as many digits as are meaningful, and its number of analogies
/// if that is not the number solved.
fn shown(estimate: &Estimate, solved: usize) -> String {
    let Estimate {
        mean,
        low,
        high,
        count,
    } = *estimate;
    let digits = if mean.abs() < 0.05 { 4 } else { 3 };
    let fewer = if count == solved {
        String::new()
    } else {
        format!(" (n = {count})")
    };
    format!("{mean:.digits$} [{low:.digits$}, {high:.digits$}]{fewer}")
}

fn table_head<'a>(cells: impl IntoIterator<Item = &'a str>) -> String {
    let cells: Vec<&str> = cells.into_iter().collect();
    format!(
        "\n| {} |\n|{}\n",
        cells.join(" | "),
        "---|".repeat(cells.len())
    )
}

fn table_row(cells: impl IntoIterator<Item = String>) -> String {
    let cells: Vec<String> = cells.into_iter().collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Quotes a value for a CSV file (RFC 4180).
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}
