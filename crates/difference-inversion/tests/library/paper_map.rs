//! `docs/paper-map.md` against the code: everything that it names exists.

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The text in backquotes.
fn code(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The source of a module and of its parts: `a/b.rs` and the files in `a/b` for `a::b`.
fn module(path: &[&str]) -> String {
    let path = repository()
        .join("crates/difference-inversion/src")
        .join(path.join("/"));
    let parts = fs::read_dir(&path).into_iter().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.unwrap().path()).collect();
    files.push(path.with_extension("rs"));
    let texts = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok());
    texts.collect()
}

/// Whether the last part of a path is defined in the module that the parts before it name.
fn is_defined(path: &str) -> bool {
    let parts: Vec<&str> = path.split("::").collect();
    let (last, before) = parts.split_last().unwrap();
    let modules = before.iter().copied();
    let modules = modules.take_while(|part| part.starts_with(char::is_lowercase));
    let source = module(&modules.collect::<Vec<_>>());
    ["fn", "struct", "enum"].iter().any(|kind| {
        let definition = format!("{kind} {last}");
        let places = source.split(&definition).skip(1);
        let mut ends = places.map(|rest| rest.chars().next().unwrap_or(' '));
        ends.any(|next| !next.is_alphanumeric() && next != '_')
    })
}

/// Whether a source file has a test of this name.
fn is_test(source: &str, name: &str) -> bool {
    let definition = format!("fn {name}()");
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let mut pairs = lines.windows(2);
    pairs.any(|pair| pair[0] == "#[test]" && pair[1].starts_with(&definition))
}

#[test]
fn functions_flags_and_tests_of_the_paper_map_are_there() {
    let read = |path: &str| fs::read_to_string(repository().join(path)).unwrap();
    let map = read("docs/paper-map.md");
    let help = read("crates/dinv/tests/cli/snapshots/analogy.txt");
    let rows: Vec<[&str; 3]> = (map.lines())
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| row.split(" | ").collect::<Vec<_>>().try_into().unwrap())
        .skip(1)
        .collect();
    assert!(rows.len() > 15, "{} rows", rows.len());
    for [what, functions, tests] in rows {
        for name in code(functions) {
            let found = match name.starts_with("--") {
                true => help.contains(name.split([' ', '=']).next().unwrap()),
                false => is_defined(name),
            };
            assert!(found, "{what}: `{name}` is not there");
        }
        let (mut source, mut named) = (String::new(), 0);
        for name in code(tests) {
            if name.ends_with(".rs") {
                source = read(&format!("crates/difference-inversion/{name}"));
            } else {
                assert!(is_test(&source, name), "{what}: `{name}` is not there");
                named += 1;
            }
        }
        assert!(named > 0, "{what}: no test is named");
    }
}
