//! Comparison and joining of run records.

use super::*;
use crate::tiny;

/// A record with these networks of the text-to-image model, and these methods.
fn record(networks: &[(&str, &str)], methods: &[MethodRecord]) -> RunRecord {
    let suite = SuiteRecord {
        name: "x".to_owned(),
        version: Value::Null,
        identity: "same".to_owned(),
        analogies: 1,
    };
    let mut record = RunRecord::new(suite, 0, "cpu, f32".to_owned());
    let networks = networks.iter().copied();
    let files = networks.map(|(network, hash)| (network.to_owned(), hash.to_owned()));
    let role = "text-to-image".to_owned();
    record.models.insert(role, files.collect());
    record.methods = methods.to_vec();
    record
}

fn method(name: &str, skipped: Option<&str>) -> MethodRecord {
    MethodRecord {
        name: name.to_owned(),
        method: name.to_owned(),
        told: Some(Told::Nothing),
        settings: Value::Null,
        skipped: skipped.map(str::to_owned),
    }
}

/// The result of an analogy whose pictures had this identity.
fn result(status: Status, pictures: &str) -> ResultRecord {
    let mut result = ResultRecord::begun(&tiny::entry(), 0, &BTreeMap::new());
    result.status = status;
    let name = provenance::PICTURES.to_owned();
    result.made_with.insert(name, pictures.to_owned());
    result
}

/// A folder for one run after another, each of which leaves a result.
fn prepare(records: &[RunRecord]) -> Result<RunRecord> {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let mut prepared = None;
    for record in records {
        prepared = Some(folder.prepare(record.clone(), &[])?);
        let failed = result(Status::Failed("no luck".to_owned()), "");
        folder.keep("m", &failed, None)?;
    }
    assert_eq!(prepared, folder.record().ok());
    Ok(prepared.unwrap())
}

#[test]
fn a_network_that_one_run_alone_reads_is_no_other_model() {
    let plain = record(&[("unet", "1"), ("clip", "2")], &[]);
    let captioned = record(&[("unet", "1"), ("captioner", "3"), ("clip", "2")], &[]);
    let networks = |records: &[RunRecord]| prepare(records).unwrap().models;
    assert_eq!(
        networks(&[plain.clone(), captioned.clone()]),
        captioned.models
    );
    assert_eq!(
        networks(&[captioned.clone(), plain.clone()]),
        captioned.models
    );
    let other = record(&[("unet", "1"), ("captioner", "4")], &[]);
    for earlier in [&[captioned.clone()][..], &[captioned, plain]] {
        let refused = prepare(&[earlier, std::slice::from_ref(&other)].concat());
        let message = refused.unwrap_err().to_string();
        let expected = "another run: text-to-image is another model: its captioner differs";
        assert!(message.ends_with(expected), "{message}");
    }
}

#[test]
fn a_method_is_skipped_until_it_runs() {
    let (ran, skipped) = (method("dia", None), method("dia", Some("no model")));
    let of_two = |methods: [&MethodRecord; 2]| {
        let records = methods.map(|method| record(&[], std::slice::from_ref(method)));
        prepare(&records).unwrap().methods[0].clone()
    };
    assert_eq!(of_two([&skipped, &ran]), ran);
    assert_eq!(of_two([&ran, &skipped]), ran);
    let first = record(&[], &[method("sdedit", None), ran.clone()]);
    let second = record(&[], &[ran, method("visii", None)]);
    let methods = prepare(&[first, second]).unwrap().methods;
    let names: Vec<&str> = methods.iter().map(|method| method.name.as_str()).collect();
    assert_eq!(names, ["sdedit", "dia", "visii"]);
}

#[test]
fn networks_of_metrics_that_an_earlier_run_had_stay_in_the_record() {
    let measured_by = |networks: &[&str]| {
        let mut record = record(&[], &[]);
        let networks = networks
            .iter()
            .map(|name| ((*name).to_owned(), "1".to_owned()));
        record.measures = networks.collect();
        record
    };
    let records = [&["judge", "lpips"][..], &["judge"], &["dino"]].map(measured_by);
    let all = measured_by(&["dino", "judge", "lpips"]);
    assert_eq!(prepare(&records).unwrap().measures, all.measures);
}

#[test]
fn a_run_without_a_result_does_not_keep_another_from_its_folder() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let first = record(&[("unet", "1")], &[]);
    folder.prepare(first.clone(), &[]).unwrap();
    let learned = folder.learned(&Value::Null, "one");
    folder.keep_learned(&learned, &Arrays::default()).unwrap();
    folder.prepare(first, &[]).unwrap();
    assert!(learned.is_file());
    // Another model learns something else.
    let other = record(&[("unet", "2")], &[]);
    folder.prepare(other.clone(), &[]).unwrap();
    assert_eq!(folder.record().unwrap(), other);
    assert!(!learned.exists());
}

#[test]
fn only_a_finished_result_holds_on_to_the_pictures_it_was_made_from() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let record = record(&[], &[]);
    let entry = [tiny::entry()];
    let prepare = || folder.prepare(record.clone(), &entry);
    let keep = |status, pictures: &str| {
        let picture = RgbImage::new(8, 8);
        let result = result(status, pictures);
        folder.keep("m", &result, Some(&picture)).unwrap();
    };
    prepare().unwrap();
    keep(Status::Failed("no luck".to_owned()), "others");
    prepare().unwrap();
    keep(Status::Done, &entry[0].identity().unwrap());
    prepare().unwrap();
    keep(Status::Done, "others");
    let message = prepare().unwrap_err().to_string();
    let expected = "another run: the pictures of `one` have changed";
    assert!(message.ends_with(expected), "{message}");
    // The provenance of an older program's result is unknown.
    let mut old = result(Status::Done, "others");
    old.made_with.clear();
    folder.keep("m", &old, None).unwrap();
    prepare().unwrap();
}

#[test]
fn pictures_that_are_shown_are_those_that_results_are_made_from() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let b = place.path().join("b.png");
    let mut entry = tiny::entry();
    entry.pictures[2].clone_from(&b);
    let show = |side: u32| {
        RgbImage::new(side, side).save(&b).unwrap();
        folder.show(&entry).unwrap();
        let shown = place.path().join(Folder::picture_name("one", "b"));
        load_image(&shown).unwrap().width()
    };
    assert_eq!([show(8), show(9)], [8, 9]);
    let done = result(Status::Done, "");
    folder.keep("m", &done, Some(&RgbImage::new(8, 8))).unwrap();
    assert_eq!(show(10), 9);
}
