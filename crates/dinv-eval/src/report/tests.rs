//! What the tables state about the scores.

use std::collections::BTreeMap;

use image::RgbImage;
use serde_json::Value;

use super::*;
use crate::tiny;

/// A run of one method that solved one analogy per entry of `scores`; some have no score.
fn report(scores: &[Option<f64>]) -> Report {
    let scores = scores.iter().map(|score| {
        let lpips = score.map(|score| ("lpips_b", score));
        let scores = lpips.into_iter().chain([("ssim_b", 0.5)]);
        ("a", Some(scores.collect()))
    });
    tiny::report(Value::Null, &scores.collect::<Vec<_>>())
}

#[test]
fn means_of_fewer_analogies_than_were_solved_say_of_how_many() {
    let report = report(&[Some(0.25), Some(0.25), None]);
    let row = "| m | 0.250 [0.250, 0.250] (n = 2) | 0.500 [0.500, 0.500] |";
    let tables = report.markdown();
    assert!(tables.contains(row), "{tables}");
    let page = report.page(&[(Group(None), report.summaries(Group(None)))]);
    for expected in ["\"lpips_b\":[0.25,0.25,0.25,2]", "(n = ${count})"] {
        assert!(page.contains(expected), "no `{expected}`");
    }
}

#[test]
fn results_that_were_measured_with_other_networks_are_told() {
    let mut report = report(&[Some(0.25), Some(0.25), None]);
    let title = "## Measured with other networks";
    assert!(!report.markdown().contains(title));
    let networks = BTreeMap::from([("lpips".to_owned(), "0".repeat(64))]);
    report.run.measures.clone_from(&networks);
    report.methods[0].results[0].measured_with = networks;
    let tables = report.markdown();
    assert!(tables.contains(title), "{tables}");
    assert!(tables.contains("\n- `m`: 2 of 3\n"), "{tables}");
}

#[test]
fn results_that_were_made_otherwise_are_told() {
    let mut report = report(&[Some(0.25), Some(0.25), None]);
    let made_with = report.run.made_with(&report.methods[0].record);
    report.methods[0].results[0]
        .made_with
        .clone_from(&made_with);
    assert!(report.notices().is_empty());
    assert!(!report.markdown().contains("## Made otherwise"));
    let other = &mut report.methods[0].results[1].made_with;
    *other = made_with;
    other.insert("seed".to_owned(), "1".to_owned());
    let notice = "1 of 3 results of `m` were made otherwise than run.json says: seed";
    assert_eq!(report.notices(), [notice]);
    let section = format!(
        "## Made otherwise\n\nA mean over results that were made in different \
                           ways describes no method.\n\n- {notice}\n"
    );
    assert!(report.markdown().contains(&section));
}

#[test]
fn a_method_with_results_is_not_shown_as_skipped() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let mut report = report(&[None]);
    let ran = MethodRecord {
        settings: serde_json::json!({ "steps": 3 }),
        ..report.methods[0].record.clone()
    };
    let made_with = report.run.made_with(&ran);
    report.run.methods = vec![MethodRecord {
        skipped: Some("no model".to_owned()),
        settings: serde_json::Value::Null,
        ..ran
    }];
    folder.prepare(report.run, &[]).unwrap();
    let tables = || Report::gather(&folder).unwrap().markdown();
    let skipped = "- `m` was skipped: no model";
    assert!(tables().contains(skipped));
    let picture = RgbImage::new(8, 8);
    let result = ResultRecord {
        made_with,
        ..report.methods[0].results[0].clone()
    };
    folder.keep("m", &result, Some(&picture)).unwrap();
    let tables = tables();
    assert!(!tables.contains(skipped), "{tables}");
    assert!(!tables.contains("Made otherwise"), "{tables}");
    assert!(tables.contains("| m | – | 1 | 0 |"), "{tables}");
}
