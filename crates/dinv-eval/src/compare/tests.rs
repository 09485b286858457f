//! Comparison of runs and of methods.

use serde_json::json;

use super::*;
use crate::tiny::report;

/// A run of one method called `m` whose analogies have these kinds and scores; those without a
/// score have failed.
fn run(settings: Value, scores: &[(&str, Option<f64>)]) -> Report {
    let scores = scores.iter().map(|&(kind, score)| {
        let scores = score.map(|score| vec![("mse_truth", score)]);
        (kind, scores)
    });
    report(settings, &scores.collect::<Vec<_>>())
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
fn everything_that_the_runs_were_made_with_is_held_against_each_other() {
    let mut first = run(json!({"eta": 1, "skip": 0}), &[("a", Some(1.0))]);
    let mut second = run(json!({"eta": 1, "late": true}), &[("a", Some(1.0))]);
    let hash = |digit: char| digit.to_string().repeat(64);
    let files = |pairs: &[(&str, char)]| -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|&(name, digit)| (name.to_owned(), hash(digit)))
            .collect()
    };
    let models = |unet| ("text-to-image".to_owned(), files(&[("unet", unet)]));
    first.run.models = BTreeMap::from([models('1')]);
    second.run.models =
        BTreeMap::from([models('2'), ("inpainting".into(), files(&[("vae", '3')]))]);
    first.run.measures = files(&[("judge", '4'), ("lpips", '5')]);
    second.run.measures = files(&[("dino", '6'), ("judge", '4'), ("lpips", '7')]);
    second.run.options = json!({"variant": "fp16"}).as_object().unwrap().clone();
    second.run.seed = 1;
    let (changes, _) = compare_runs(&first, &second).unwrap();
    assert_eq!(
        changes,
        [
            "seed: 0 → 1",
            "text-to-image unet: 111111111111 → 222222222222",
            "lpips (metrics): 555555555555 → 777777777777",
            "option variant: none → \"fp16\"",
            "inpainting vae: none → 333333333333",
            "dino (metrics): none → 666666666666",
            "m skip: 0 → none",
            "m late: none → true",
        ]
    );
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
fn scores_by_different_networks_are_not_compared() {
    let scores = || Some(vec![("mse_truth", 1.0), ("lpips_b", 0.5)]);
    let first = report(json!({}), &[("a", scores()), ("b", scores())]);
    let mut second = first.clone();
    let networks = BTreeMap::from([("lpips".to_owned(), "2".repeat(64))]);
    second.methods[0].results[1].measured_with = networks;
    let (_, comparisons) = compare_runs(&first, &second).unwrap();
    let differences = comparisons[0].differences.iter();
    let counts: Vec<_> = differences
        .map(|one| (one.metric, one.difference.count))
        .collect();
    assert_eq!(counts, [("lpips_b", 1), ("mse_truth", 2)]);
}

#[test]
fn what_cannot_be_compared_is_told() {
    let first = run(json!({}), &[("a", Some(1.0))]);
    let mut other = first.clone();
    other.run.suite.identity = "other".to_owned();
    let message = compare_runs(&first, &other).unwrap_err().to_string();
    assert!(message.contains("of different suites"), "{message}");
    other.clone_from(&first);
    let [before, after] = ["1", "2"].map(|pictures| {
        let mut report = first.clone();
        let made_with = &mut report.methods[0].results[0].made_with;
        made_with.insert(provenance::PICTURES.to_owned(), pictures.to_owned());
        report
    });
    let message = compare_runs(&before, &after).unwrap_err().to_string();
    assert!(message.ends_with("the pictures of `0` differ"), "{message}");
    assert!(compare_runs(&before, &before).is_ok());
    assert!(compare_runs(&first, &after).is_ok()); // an older run does not state it
    other.clone_from(&first);
    other.methods[0].record.name = "n".to_owned();
    let message = compare_runs(&first, &other).unwrap_err().to_string();
    assert_eq!(message, "the runs have no method in common");
    let message = compare_methods(&first, "n").unwrap_err().to_string();
    assert_eq!(message, "the run has no method `n`; it has m");
}
