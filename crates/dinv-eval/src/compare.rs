//! Comparison of two methods on the same analogies.

use std::collections::BTreeMap;
use std::fmt::Write;

use difference_inversion::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::folder::provenance;
use super::report::{Group, MethodResults, Report};
use super::statistics::{Estimate, bootstrap, mean_of_means, sign_flip_p};
use super::{Better, METRICS, Metric, ResultRecord, RunRecord};

/// The p-value below which a difference is marked.
const SIGNIFICANT: f64 = 0.05;

/// One metric of two methods, over the analogies that both have solved. If a judge, DINO-v2 or LPIPS
/// measures it, the same network must have measured both.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The metric.
    pub metric: &'static str,
    /// The mean of the first method.
    pub first: f64,
    /// The mean of the second method.
    pub second: f64,
    /// Second minus first, analogy by analogy, with its interval.
    pub difference: Estimate,
    /// The probability of a difference at least this large if there is none
    /// ([`sign_flip_p`]; not corrected for the number of comparisons).
    pub p: f64,
    /// Whether the second is better; `None` if they are equal.
    pub better: Option<bool>,
}

/// Two methods compared over one group of analogies.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The names of both methods.
    pub names: [String; 2],
    /// The group.
    pub group: Group,
    /// Every metric that both methods have.
    pub differences: Vec<Difference>,
}

/// Compares the methods that two runs of the same suite have in common, and lists the differences
/// between the runs' circumstances, one per line.
///
/// # Errors
/// [`Error::InvalidInput`] if the suites or the pictures of an analogy differ, or the runs have no
/// method in common.
pub fn compare_runs(first: &Report, second: &Report) -> Result<(Vec<String>, Vec<Comparison>)> {
    let (suite, other) = (&first.run.suite, &second.run.suite);
    if suite.identity != other.identity {
        return Err(Error::invalid_input(format!(
            "the runs are of different suites: {} and {}",
            suite.name, other.name
        )));
    }
    let pairs: Vec<_> = (first.methods.iter())
        .filter_map(|method| {
            let mut others = second.methods.iter();
            let other = others.find(|other| other.record.name == method.record.name)?;
            Some((method, other))
        })
        .collect();
    if pairs.is_empty() {
        return Err(Error::invalid_input("the runs have no method in common"));
    }
    if let Some(name) = pairs.iter().find_map(|(one, other)| repainted(one, other)) {
        let reason = format!("the runs are of different suites: the pictures of `{name}` differ");
        return Err(Error::invalid_input(reason));
    }
    let comparisons = (pairs.iter())
        .flat_map(|(method, other)| compare(first, method, other))
        .collect();
    Ok((changes(first, second, &pairs), comparisons))
}

/// The first analogy that both have solved, but with different pictures.
fn repainted<'a>(one: &'a MethodResults, other: &MethodResults) -> Option<&'a str> {
    let others: BTreeMap<&str, &String> = (other.solved())
        .filter_map(|result| Some((result.name.as_str(), pictures(result)?)))
        .collect();
    let differs = |result: &&ResultRecord| {
        let both = pictures(result).zip(others.get(result.name.as_str()));
        both.is_some_and(|(own, other)| own != *other)
    };
    let repainted = one.solved().find(differs);
    repainted.map(|result| result.name.as_str())
}

/// The identity of the pictures of an analogy.
fn pictures(result: &ResultRecord) -> Option<&String> {
    result.made_with.get(provenance::PICTURES)
}

/// Compares every other method of a run with the one called `name`.
///
/// # Errors
/// [`Error::InvalidInput`] if the run has no method of that name.
pub fn compare_methods(report: &Report, name: &str) -> Result<Vec<Comparison>> {
    let named = report
        .methods
        .iter()
        .find(|method| method.record.name == name);
    let Some(named) = named else {
        let names = report
            .methods
            .iter()
            .map(|method| method.record.name.as_str());
        let names = names.collect::<Vec<_>>().join(", ");
        let reason = format!("the run has no method `{name}`; it has {names}");
        return Err(Error::invalid_input(reason));
    };
    let others = report
        .methods
        .iter()
        .filter(|method| method.record.name != name);
    Ok(others
        .flat_map(|other| compare(report, named, other))
        .collect())
}

/// Compares two methods, group by group.
fn compare(report: &Report, first: &MethodResults, second: &MethodResults) -> Vec<Comparison> {
    let names = [&first.record.name, &second.record.name].map(Clone::clone);
    let groups = report.groups().into_iter().map(|group| Comparison {
        names: names.clone(),
        group,
        differences: (METRICS.par_iter())
            .filter_map(|metric| difference(metric, [first, second], group, report.run.seed))
            .collect(),
    });
    groups
        .filter(|comparison| !comparison.differences.is_empty())
        .collect()
}

fn difference(
    metric: &Metric,
    [first, second]: [&MethodResults; 2],
    group: Group,
    seed: u64,
) -> Option<Difference> {
    let score = |result: &ResultRecord| result.scores.get(metric.name).copied();
    let others: BTreeMap<&str, &ResultRecord> = (second.solved())
        .map(|result| (result.name.as_str(), result))
        .collect();
    // By kind: the scores of the first, those of the second, and their differences.
    let mut kinds: BTreeMap<&str, [Vec<f64>; 3]> = BTreeMap::new();
    for result in first.solved().filter(|result| group.has(result)) {
        let other = others.get(result.name.as_str());
        let other = other.filter(|other| result.measured_like(other, metric.name));
        let scores = score(result).zip(other.and_then(|other| score(other)));
        if let Some((one, other)) = scores {
            let groups = kinds.entry(&result.kind).or_default();
            for (group, value) in groups.iter_mut().zip([one, other, other - one]) {
                group.push(value);
            }
        }
    }
    let column =
        |i: usize| -> Vec<Vec<f64>> { kinds.values().map(|groups| groups[i].clone()).collect() };
    let differences = column(2);
    let estimate = bootstrap(&differences, seed)?;
    let better =
        (estimate.mean != 0.0).then(|| (estimate.mean > 0.0) == (metric.better == Better::Higher));
    Some(Difference {
        metric: metric.name,
        first: mean_of_means(&column(0))?,
        second: mean_of_means(&column(1))?,
        difference: estimate,
        p: sign_flip_p(&differences, seed)?,
        better,
    })
}

/// The differences between the circumstances of two runs.
fn changes(
    first: &Report,
    second: &Report,
    pairs: &[(&MethodResults, &MethodResults)],
) -> Vec<String> {
    let runs = [&first.run, &second.run];
    let mut lines = differences("", runs.map(circumstances));
    for (method, other) in pairs {
        let settings = [method, other].map(|one| flat(&one.record.settings));
        lines.extend(differences(&method.record.name, settings));
    }
    lines
}

/// The circumstances of a run, by name.
fn circumstances(run: &RunRecord) -> Vec<(String, String)> {
    let short = |hash: &String| hash.chars().take(12).collect::<String>();
    let mut all = vec![
        ("program".to_owned(), run.program.clone()),
        ("seed".to_owned(), run.seed.to_string()),
        ("device".to_owned(), run.device.clone()),
    ];
    let options = run.options.iter();
    all.extend(options.map(|(name, value)| (format!("option {name}"), value.to_string())));
    for (role, files) in &run.models {
        let files = files.iter();
        all.extend(files.map(|(network, hash)| (format!("{role} {network}"), short(hash))));
    }
    let measures = run.measures.iter();
    all.extend(measures.map(|(network, hash)| (format!("{network} (metrics)"), short(hash))));
    all
}

/// One line for every name whose values differ or that only one side has; names that only the second
/// has come last.
fn differences(of: &str, [before, after]: [Vec<(String, String)>; 2]) -> Vec<String> {
    let value = |among: &[(String, String)], name: &String| {
        let found = among.iter().find(|(other, _)| other == name);
        found.map_or_else(|| "none".to_owned(), |(_, value)| value.clone())
    };
    let known = |name: &String| before.iter().any(|(other, _)| other == name);
    let added = after.iter().filter(|(name, _)| !known(name));
    let lines = before.iter().chain(added).filter_map(|(name, _)| {
        let (before, after) = (value(&before, name), value(&after, name));
        let line = format!("{of} {name}: {before} → {after}");
        (before != after).then(|| line.trim_start().to_owned())
    });
    lines.collect()
}

/// Every setting by its own name, without its group.
fn flat(settings: &Value) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (name, value) in settings.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => all.extend(flat(value)),
            _ => all.push((name.clone(), value.to_string())),
        }
    }
    all
}

/// Formats comparisons as Markdown tables.
pub fn markdown(comparisons: &[Comparison]) -> String {
    let mut text = String::new();
    for comparison in comparisons {
        let [first, second] = &comparison.names;
        let title = if first == second {
            first.clone()
        } else {
            format!("{first} → {second}")
        };
        let _ = writeln!(
            text,
            "## {title}: {}\n",
            comparison.group.title().to_lowercase()
        );
        text += "| metric | first | second | difference | relative | p | n | |\n|---|---|---|---|---|---|---|---|\n";
        for one in &comparison.differences {
            let title = METRICS.iter().find(|metric| metric.name == one.metric);
            let Estimate {
                mean,
                low,
                high,
                count,
            } = one.difference;
            let verdict = match (one.p < SIGNIFICANT, one.better) {
                (true, Some(true)) => "better",
                (true, Some(false)) => "worse",
                _ => "",
            };
            let relative = if one.first == 0.0 {
                "–".to_owned()
            } else {
                format!("{:+.1} %", 100.0 * mean / one.first.abs())
            };
            let _ = writeln!(
                text,
                "| {} | {:.4} | {:.4} | {mean:+.4} [{low:+.4}, {high:+.4}] | {relative} | {:.4} | {count} | {verdict} |",
                title.map_or(one.metric, |metric| metric.title),
                one.first,
                one.second,
                one.p,
            );
        }
        text.push('\n');
    }
    text + "Second less first, analogy by analogy; 95 % bootstrap intervals within kinds; p by sign \
            flips, not corrected for the number of comparisons.\n"
}

#[cfg(test)]
mod tests;
