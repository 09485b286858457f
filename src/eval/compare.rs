//! What differs between two methods on the same analogies.

use std::collections::BTreeMap;
use std::fmt::Write;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::report::{Group, MethodResults, Report};
use super::statistics::{Estimate, bootstrap, mean_of_means, sign_flip_p};
use super::{Better, METRICS, Metric};
use crate::{Error, Result};

/// Differences less likely than this by chance are marked.
const SIGNIFICANT: f64 = 0.05;

/// One metric of two methods, over the analogies that both have solved.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The metric.
    pub metric: &'static str,
    /// The mean of the first.
    pub first: f64,
    /// The mean of the second.
    pub second: f64,
    /// Second less first, analogy by analogy, with its interval.
    pub difference: Estimate,
    /// How likely so large a difference is if there is none
    /// ([`sign_flip_p`]; not corrected for the number of comparisons).
    pub p: f64,
    /// Whether the second is the better one; nothing if they are equal.
    pub better: Option<bool>,
}

/// Two methods compared over one group of analogies.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// What is compared: the names of both.
    pub names: [String; 2],
    /// The group.
    pub group: Group,
    /// Every metric that both have.
    pub differences: Vec<Difference>,
}

/// Compares the methods that two runs of the same suite have in common, and tells what differs in the
/// runs' circumstances, a line for each.
///
/// # Errors
/// [`Error::InvalidInput`] if the suites differ or there is no such method.
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
    let comparisons = (pairs.iter())
        .flat_map(|(method, other)| compare(first, method, other))
        .collect();
    Ok((changes(first, second, &pairs), comparisons))
}

/// Compares every other method of a run with one of them.
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
    let score = |method: &MethodResults| -> BTreeMap<String, f64> {
        let scores = method.solved().filter(|result| group.has(result));
        let scores = scores
            .filter_map(|result| Some((result.name.clone(), *result.scores.get(metric.name)?)));
        scores.collect()
    };
    let others = score(second);
    let firsts = score(first);
    // By kind: the scores of the first, of the second, and their difference.
    let mut kinds: BTreeMap<&str, [Vec<f64>; 3]> = BTreeMap::new();
    for result in first.solved() {
        let pair = firsts.get(&result.name).zip(others.get(&result.name));
        if let Some((&one, &other)) = pair {
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

/// What the runs were made with that differs.
fn changes(
    first: &Report,
    second: &Report,
    pairs: &[(&MethodResults, &MethodResults)],
) -> Vec<String> {
    let mut lines = Vec::new();
    let mut note = |what: &str, before: String, after: String| {
        if before != after {
            lines.push(format!("{what}: {before} → {after}"));
        }
    };
    let (run, other) = (&first.run, &second.run);
    note("program", run.program.clone(), other.program.clone());
    note("seed", run.seed.to_string(), other.seed.to_string());
    note("device", run.device.clone(), other.device.clone());
    for (role, files) in &run.models {
        for (file, hash) in files {
            let of_other = other.models.get(role).and_then(|files| files.get(file));
            let short = |hash: &String| hash.chars().take(12).collect::<String>();
            let after = of_other.map_or_else(|| "none".to_owned(), short);
            note(&format!("{role} {file}"), short(hash), after);
        }
    }
    for (method, other) in pairs {
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        flatten(&method.record.settings, &mut before);
        flatten(&other.record.settings, &mut after);
        let names: std::collections::BTreeSet<&String> =
            before.keys().chain(after.keys()).collect();
        for name in names {
            let shown = |settings: &BTreeMap<String, String>| {
                settings
                    .get(name)
                    .cloned()
                    .unwrap_or_else(|| "none".to_owned())
            };
            note(
                &format!("{} {name}", method.record.name),
                shown(&before),
                shown(&after),
            );
        }
    }
    lines
}

/// Every setting by its own name.
fn flatten(settings: &Value, into: &mut BTreeMap<String, String>) {
    for (name, value) in settings.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => flatten(value, into),
            _ => {
                into.insert(name.clone(), value.to_string());
            }
        }
    }
}

/// Comparisons as tables for people.
pub fn markdown(comparisons: &[Comparison]) -> String {
    let mut text = String::new();
    for comparison in comparisons {
        let [first, second] = &comparison.names;
        let title = match first == second {
            true => first.clone(),
            false => format!("{first} → {second}"),
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
            let relative = match one.first == 0.0 {
                true => "–".to_owned(),
                false => format!("{:+.1} %", 100.0 * mean / one.first.abs()),
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
mod tests {
    use serde_json::json;

    use super::*;
    use crate::eval::{MethodRecord, ResultRecord, RunRecord, Status, SuiteRecord};

    /// A run of one method called `m` whose analogies have these kinds and scores; those without a
    /// score have failed.
    fn run(settings: Value, scores: &[(&str, Option<f64>)]) -> Report {
        let suite = SuiteRecord {
            name: "x".to_owned(),
            version: Value::Null,
            identity: "same".to_owned(),
            analogies: scores.len(),
        };
        let record = MethodRecord {
            name: "m".to_owned(),
            method: "sdedit".to_owned(),
            told: None,
            settings,
            skipped: None,
        };
        let result = |(number, (kind, score)): (usize, &(&str, Option<f64>))| ResultRecord {
            name: number.to_string(),
            kind: (*kind).to_owned(),
            changes: None,
            status: match score {
                Some(_) => Status::Done,
                None => Status::Failed("no luck".to_owned()),
            },
            seed: 0,
            seconds: 1.0,
            peak_memory: None,
            measured_with: BTreeMap::new(),
            scores: score
                .iter()
                .map(|score| ("mse_truth".to_owned(), *score))
                .collect(),
        };
        Report {
            run: RunRecord::new(suite, 0, "cpu".to_owned()),
            methods: vec![MethodResults {
                record,
                results: scores.iter().enumerate().map(result).collect(),
            }],
        }
    }

    #[test]
    fn what_both_have_solved_is_compared_by_kind() {
        let some = |kind, score| (kind, Some(score));
        let before = [
            some("a", 1.0),
            some("a", 2.0),
            some("b", 5.0),
            some("b", 9.0),
        ];
        let after = [some("a", 1.5), some("a", 2.5), some("b", 4.0), ("b", None)];
        let first = run(json!({"generate": {"eta": 1, "skip": 0}}), &before);
        let second = run(json!({"generate": {"eta": 0, "skip": 0}}), &after);
        let (changes, comparisons) = compare_runs(&first, &second).unwrap();
        assert_eq!(changes, ["m eta: 1 → 0"]);
        let [comparison] = &comparisons[..] else {
            panic!("{comparisons:?}");
        };
        let [one] = &comparison.differences[..] else {
            panic!("{comparison:?}");
        };
        assert_eq!((one.metric, one.difference.count), ("mse_truth", 3));
        // a: 1.5 → 2, b: 5 → 4; the mean of the kinds' differences is (.5 − 1) / 2.
        assert_eq!(
            (one.first, one.second, one.difference.mean),
            (3.25, 3.0, -0.25)
        );
        assert_eq!(one.better, Some(true)); // less is better
        let text = markdown(&comparisons);
        assert!(
            text.contains("| MSE to truth | 3.2500 | 3.0000 | -0.2500 ["),
            "{text}"
        );
        assert!(text.contains("| -7.7 % |"), "{text}");
    }

    #[test]
    fn only_what_is_unlikely_by_chance_is_marked() {
        let all = |score: f64| -> Vec<(&str, Option<f64>)> { vec![("a", Some(score)); 12] };
        let (first, second) = (run(json!({}), &all(0.5)), run(json!({}), &all(0.75)));
        let (_, worse) = compare_runs(&first, &second).unwrap();
        assert!(markdown(&worse).contains("| worse |"));
        let (_, equal) = compare_runs(&first, &first).unwrap();
        assert_eq!(
            (equal[0].differences[0].p, equal[0].differences[0].better),
            (1.0, None)
        );
        assert!(!markdown(&equal).contains("worse"));
    }

    #[test]
    fn what_cannot_be_compared_is_told() {
        let first = run(json!({}), &[("a", Some(1.0))]);
        let mut other = first.clone();
        other.run.suite.identity = "other".to_owned();
        let message = compare_runs(&first, &other).unwrap_err().to_string();
        assert!(message.contains("of different suites"), "{message}");
        other.clone_from(&first);
        other.methods[0].record.name = "n".to_owned();
        let message = compare_runs(&first, &other).unwrap_err().to_string();
        assert_eq!(message, "the runs have no method in common");
        let message = compare_methods(&first, "n").unwrap_err().to_string();
        assert_eq!(message, "the run has no method `n`; it has m");
    }
}
