//! Suites in every layout, valid and invalid.

use std::fs;

use image::{Rgb, RgbImage};
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// A folder with small pictures of different sizes.
fn folder(pictures: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (number, name) in pictures.iter().enumerate() {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let side = 12 + u32::try_from(number).unwrap();
        let picture = RgbImage::from_pixel(side, 16, Rgb([u8::try_from(side).unwrap(); 3]));
        picture.save(&path).unwrap();
    }
    folder
}

const FOUR: [&str; 4] = ["a.png", "a2.png", "b.png", "b2.png"];

/// The suite in a file with this text, or its error.
fn list(name: &str, text: &str) -> std::result::Result<Suite, String> {
    let folder = folder(&FOUR);
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    Suite::open(&path).map_err(|error| {
        let shown = format!("{}/", folder.path().display());
        error.to_string().replace(&shown, "")
    })
}

const LINE: &str = r#"{"a": "a.png", "a_prime": "a2.png", "b": "b.png"}"#;

#[test]
fn a_list_needs_no_more_than_three_pictures() {
    let suite = list("my.jsonl", &format!("{LINE}\n\n{LINE}\n")).unwrap();
    assert_eq!(suite.about.name, "my");
    let names: Vec<&str> = suite.entries.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["0001", "0003"]);
    assert_eq!(suite.entries[0].kind, "all");
    assert_eq!(suite.entries[0].b_prime, None);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_list() {
    let suite = list("windows.jsonl", &format!("\u{feff}{LINE}\r\n{LINE}\r\n")).unwrap();
    assert_eq!(suite.entries.len(), 2);
}

#[test]
fn a_line_may_tell_everything() {
    let line = json!({
        "name": "x", "kind": "colour", "a": "a.png", "a_prime": "a2.png", "b": "./b.png",
        "b_prime": "b2.png", "captions": {"b": "a house", "b_prime": "a red house"},
        "instruction": "make it red",
        "attributes": {"b": {"colour": "blue", "sky": "day"},
                       "b_prime": {"colour": "red", "sky": "day"}},
    });
    let suite = list("full.jsonl", &line.to_string()).unwrap();
    let entry = &suite.entries[0];
    assert_eq!((entry.name.as_str(), entry.kind.as_str()), ("x", "colour"));
    assert_eq!(entry.changes(), Some(1));
    assert_eq!(entry.named_pictures().count(), 4);
}

#[test]
fn what_is_wrong_with_a_line_is_told_with_its_number() {
    let line = |field: &str, value: serde_json::Value| {
        let mut line: serde_json::Value = serde_json::from_str(LINE).unwrap();
        line[field] = value;
        format!("{LINE}\n{line}\n")
    };
    let cases = [
        ("{", "line 1: EOF while parsing"),
        ("[]", "line 1: invalid"),
        (r#"{"a": "a.png"}"#, "line 1: missing field `a_prime`"),
        (
            &line("colour", json!(1)),
            "line 2: `colour`: unknown field `colour`",
        ),
        (&line("a", json!(7)), "line 2: `a`: invalid type"),
        (
            &line("captions", json!({"c": "x"})),
            "line 2: `captions.c`: unknown field `c`",
        ),
        (
            &line("b", json!("gone.png")),
            "line 2: `b`: there is no picture `gone.png`",
        ),
        (
            &line("b", json!("../b.png")),
            "line 2: `b`: `../b.png` is not inside",
        ),
        (
            &line("b", json!("/tmp/b.png")),
            "line 2: `b`: `/tmp/b.png` is not inside",
        ),
        (&line("b_prime", json!("")), "line 2: `b_prime` is empty"),
        (
            &line("name", json!("0001")),
            "line 2: `name`: `0001` is there twice",
        ),
        (
            &line("name", json!("a/b")),
            "line 2: `name`: `a/b` cannot be the name of a folder",
        ),
        (&line("name", json!(".x")), "line 2: `name`: `.x` cannot be"),
        (&line("kind", json!("")), "line 2: `kind` is empty"),
        ("", "there is no analogy in it"),
    ];
    for (text, expected) in cases {
        let message = list("bad.jsonl", text).unwrap_err();
        assert!(message.starts_with("bad.jsonl: "), "{message}");
        assert!(message.contains(expected), "{message}: no `{expected}`");
    }
}

#[test]
fn names_that_differ_in_case_alone_are_one_folder_on_some_disks() {
    let line = |name: &str| LINE.replacen('{', &format!("{{\"name\": \"{name}\", "), 1);
    let message = list("case.jsonl", &format!("{}\n{}", line("X"), line("x"))).unwrap_err();
    assert!(
        message.contains("line 2: `name`: `x` is there twice"),
        "{message}"
    );
}

#[test]
fn values_may_be_separated_by_commas() {
    let text = "\u{feff}name,a,a_prime,b,b_prime,caption_b,instruction\r\n\
                one,a.png,a2.png,b.png,b2.png,\"a \"\"big\"\", red\nhouse\",make it red\r\n\
                \r\n\
                ,,,,,,\r\n\
                two, a.png , a2.png ,b.png,,,\r\n\
                , ,,,,,\r\n";
    let suite = list("my.csv", text).unwrap();
    let [one, two] = &suite.entries[..] else {
        panic!("{suite:?}");
    };
    let captions = one.captions.as_ref().unwrap();
    assert_eq!(captions.b.as_deref(), Some("a \"big\", red\nhouse"));
    assert_eq!(one.instruction.as_deref(), Some("make it red"));
    assert!(one.b_prime.is_some());
    assert_eq!(
        (two.name.as_str(), &two.b_prime, &two.captions),
        ("two", &None, &None)
    );
}

#[test]
fn what_is_wrong_with_a_record_is_told_with_the_line_it_begins_in() {
    let cases = [
        ("", "the file is empty"),
        ("a,b\n", "line 1: the column `a_prime` is missing"),
        (
            "a,a_prime,b,colour\n",
            "line 1: there is no column `colour`; there are name",
        ),
        ("a,a_prime,b,a\n", "line 1: the column `a` is there twice"),
        (
            "a,a_prime,b\n\na.png,a2.png\n",
            "line 3: expected 3 values as in the first line, found 2",
        ),
        (
            "a,a_prime,b\na.png,a2.png,gone.png\n",
            "line 2: `b`: there is no picture",
        ),
        ("a,a_prime,b\na.png,,b.png\n", "line 2: `a_prime` is empty"),
        (
            "a,a_prime,b\n\"a.png,a2.png,b.png\n",
            "line 2: a quote is not closed",
        ),
        (
            "a,a_prime,b\n\"a.png\"x,a2.png,b.png\n",
            "line 2: expected a comma after",
        ),
    ];
    for (text, expected) in cases {
        let message = list("bad.csv", text).unwrap_err();
        assert!(message.contains(expected), "{message}: no `{expected}`");
    }
}

#[test]
fn other_files_and_folders_are_no_suites() {
    let message = list("list.txt", LINE).unwrap_err();
    assert!(message.ends_with("expected the folder of a suite, or a .jsonl or .csv file"));
    let folder = tempfile::tempdir().unwrap();
    let message = Suite::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("not a suite: expected suite.json"),
        "{message}"
    );
    let gone = Suite::open(&folder.path().join("gone")).unwrap_err();
    assert!(gone.to_string().contains("gone: No such file"), "{gone}");
    fs::write(folder.path().join(SUITE), r#"{"name": "x"}"#).unwrap();
    let message = Suite::open(folder.path()).unwrap_err().to_string();
    let expected = format!("{MANIFEST}: No such file");
    assert!(message.contains(&expected), "{message}");
}

/// A small data set in InstructPix2Pix's layout.
fn data_set(seeds: &serde_json::Value, prompt: &str) -> TempDir {
    let folder = folder(&[
        "0000007/11_0.jpg",
        "0000007/11_1.jpg",
        "0000007/22_0.jpg",
        "0000007/22_1.jpg",
    ]);
    fs::write(folder.path().join("seeds.json"), seeds.to_string()).unwrap();
    fs::write(folder.path().join("0000007/prompt.json"), prompt).unwrap();
    folder
}

const PROMPT: &str = r#"{"input": "a lake", "edit": "make it snow", "output": "a snowy lake"}"#;

#[test]
fn two_seeds_of_a_prompt_make_an_analogy_with_its_truth() {
    let seeds = json!([["0000003", ["5"]], ["0000007", ["11", "22", "33"]]]);
    let folder = data_set(&seeds, PROMPT);
    let suite = Suite::open(folder.path()).unwrap();
    let [entry] = &suite.entries[..] else {
        panic!("{suite:?}");
    };
    assert_eq!(entry.name, "0000007-11-22");
    assert_eq!(entry.instruction.as_deref(), Some("make it snow"));
    let captions = entry.captions.as_ref().unwrap();
    assert_eq!(captions.a_prime.as_deref(), Some("a snowy lake"));
    let files = entry
        .named_pictures()
        .map(|(_, path)| path.file_name().unwrap().to_owned());
    assert_eq!(
        files.collect::<Vec<_>>(),
        ["11_0.jpg", "11_1.jpg", "22_0.jpg", "22_1.jpg"]
    );
    let analogy = entry.read().unwrap();
    let b_prime = analogy.b_prime.unwrap();
    assert_eq!(b_prime.dimensions(), (15, 16));
    assert_eq!(b_prime.get_pixel(7, 7).0, [15; 3]);
}

#[test]
fn what_is_wrong_with_a_data_set_is_told() {
    let good = json!([["0000007", ["11", "22"]]]);
    let cases = [
        (
            json!({"x": 1}),
            PROMPT,
            "seeds.json: field `.`: invalid type: map",
        ),
        (
            json!([["0000007", ["11"]]]),
            PROMPT,
            "no prompt has two seeds",
        ),
        (
            json!([["0000007", ["11", true]]]),
            PROMPT,
            "line 1: expected a seed, found true",
        ),
        (
            json!([["0000007", [11, 44]]]),
            PROMPT,
            "there is no picture `0000007/44_0.jpg`",
        ),
        (
            json!([["../x", ["1", "2"]]]),
            PROMPT,
            "`../x/prompt.json` is not inside",
        ),
        (
            good.clone(),
            "{}",
            "prompt.json: field `.`: missing field `input`",
        ),
        (good, "[", "prompt.json: not valid JSON"),
    ];
    for (seeds, prompt, expected) in cases {
        let folder = data_set(&seeds, prompt);
        let message = Suite::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}: no `{expected}`");
    }
}

#[test]
fn any_suite_is_written_out_as_a_folder() {
    let original = data_set(&json!([["0000007", ["11", "22"]]]), PROMPT);
    let suite = Suite::open(original.path()).unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("deep/out");
    suite.export(&out).unwrap();
    let copy = Suite::open(&out).unwrap();
    assert_eq!(copy.about, suite.about);
    assert_eq!(copy.identity(), suite.identity());
    let of_pictures = |suite: &Suite| suite.entries[0].identity().unwrap();
    assert_eq!(of_pictures(&copy), of_pictures(&suite));
    assert_eq!(fs::read_dir(place.path().join("deep")).unwrap().count(), 1);

    let message = suite.export(&out).unwrap_err().to_string();
    assert!(message.ends_with("something is there already"), "{message}");
    fs::remove_file(&suite.entries[0].pictures[2]).unwrap();
    let failed = place.path().join("failed");
    let message = suite.export(&failed).unwrap_err().to_string();
    assert!(message.contains("22_0.jpg: No such file"), "{message}");
    assert!(!failed.exists());
}

#[test]
fn a_suite_is_told_by_its_words_and_an_analogy_by_its_pixels() {
    let line = |from: &str, to: &str| LINE.replace(from, to);
    let folder = folder(&FOUR);
    let identities = |text: &str| {
        let path = folder.path().join("my.jsonl");
        fs::write(&path, text).unwrap();
        let suite = Suite::open(&path).unwrap();
        (suite.identity(), suite.entries[0].identity().unwrap())
    };
    let (words, pixels) = identities(LINE);
    let same = (words.clone(), pixels.clone());
    assert_eq!(same, identities(&line("a.png", "./a.png")));
    let other = identities(&line("b.png", "b2.png"));
    assert!(other.0 == words && other.1 != pixels);
    let other = identities(&line("}", ", \"instruction\": \"x\"}"));
    assert!(other.0 != words && other.1 == pixels);
    let other = identities(&line("}", ", \"b_prime\": \"b2.png\"}"));
    assert!(other.0 != words && other.1 != pixels);
}

#[test]
fn a_suite_is_told_without_reading_its_pictures() {
    let folder = folder(&FOUR);
    let path = folder.path().join("my.jsonl");
    fs::write(&path, LINE).unwrap();
    let suite = Suite::open(&path).unwrap();
    let before = suite.identity();
    fs::remove_file(folder.path().join("b.png")).unwrap();
    assert_eq!(suite.identity(), before);
    let message = suite.entries[0].identity().unwrap_err().to_string();
    assert!(message.contains("b.png: No such file"), "{message}");
}

#[test]
fn any_first_part_is_like_the_whole_and_begins_with_what_changes_least() {
    let entry = |name: &str, kind: &str, changes: usize| {
        let attributes = |value: &str| {
            (0..changes)
                .map(|i| (format!("attribute {i}"), value.to_owned()))
                .collect()
        };
        Entry {
            name: name.to_owned(),
            kind: kind.to_owned(),
            pictures: Default::default(),
            b_prime: None,
            captions: None,
            instruction: None,
            attributes: Some(Attributes {
                b: attributes("old"),
                b_prime: attributes("new"),
                ..Attributes::default()
            }),
        }
    };
    let suite = Suite {
        about: About {
            name: "x".to_owned(),
            version: Value::Null,
            more: Map::new(),
        },
        entries: vec![
            entry("0", "both", 2),
            entry("1", "sky", 1),
            entry("2", "sky", 1),
            entry("3", "colour", 1),
            entry("4", "sky", 1),
        ],
    };
    let names = |limit| -> String {
        let chosen = suite.balanced(limit);
        chosen.iter().map(|entry| entry.name.as_str()).collect()
    };
    // Three of `sky`, one of each other kind, one of which changes two attributes.
    assert_eq!(names(None), "12304");
    assert_eq!(names(Some(3)), "123");
    assert_eq!(names(Some(0)), "");
    assert_eq!(names(Some(9)), "12304");
}

#[test]
fn the_photographs_are_36_analogies_whose_answers_are_known() {
    let folder = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../demo/benchmark/photos"
    ));
    let suite = Suite::open(folder).unwrap();
    assert_eq!(
        (suite.about.name.as_str(), suite.entries.len()),
        ("photos", 36)
    );
    let kinds: HashSet<&str> = suite.entries.iter().map(|one| one.kind.as_str()).collect();
    assert_eq!(kinds.len(), 12);
    for entry in &suite.entries {
        let analogy = entry.read().unwrap();
        let name = &analogy.name;
        let b_prime = analogy.b_prime.unwrap();
        for picture in [&analogy.a, &analogy.a_prime, &analogy.b, &b_prime] {
            assert_eq!(picture.dimensions(), (512, 512), "{name}");
        }
        // The edit is to be seen: not a trace of compression, which is below 0.001.
        for [before, after] in [[&analogy.a, &analogy.a_prime], [&analogy.b, &b_prime]] {
            assert!(crate::metrics::mse(before, after) > 0.005, "{name}");
        }
        assert_ne!(analogy.a, analogy.b, "{name}");
        let captions = analogy.captions.unwrap();
        assert!(
            captions.of_a().is_some() && captions.of_b().is_some(),
            "{name}"
        );
        assert!(analogy.instruction.is_some(), "{name}");
    }
}
