//! Records of runs that are held against each other and joined.

use super::*;

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

/// A folder for one run after the other.
fn prepare(records: &[RunRecord]) -> Result<RunRecord> {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::at(place.path());
    let mut prepared = None;
    for record in records {
        prepared = Some(folder.prepare(record.clone())?);
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
