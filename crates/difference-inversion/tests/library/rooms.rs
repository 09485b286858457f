//! The rooms of the library (ARCHITECTURE.md): which may import which, and what the method may depend on.

use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::diffusion::family;

/// Each room may import those before it.
const ROOMS: [&str; 8] = [
    "util",
    "weights",
    "image",
    "models",
    "diffusion",
    "hub",
    "method",
    "job",
];

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| {
        if path.is_dir() {
            files(&path)
        } else {
            vec![path]
        }
    });
    files.collect()
}

/// The files of a room with their code, without documentation and tests.
fn room(name: &str) -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (file, folder) = (src.join(name).with_extension("rs"), src.join(name));
    let mut paths = if folder.is_dir() {
        files(&folder)
    } else {
        Vec::new()
    };
    paths.extend(file.is_file().then_some(file));
    let is_code = |path: &PathBuf| {
        let is_test = path
            .file_stem()
            .is_some_and(|stem| stem.to_string_lossy().contains("tests"));
        path.extension().is_some_and(|extension| extension == "rs") && !is_test
    };
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let lines = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let code = lines.collect::<Vec<_>>().join("\n");
        (path, code)
    };
    paths.into_iter().filter(is_code).map(read).collect()
}

/// The paths in a pair of braces, of which the first is already open.
fn paths(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut paths) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                paths.push(group[start..at].trim_start());
                start = at + 1;
            }
            _ => {}
        }
        if c == '}' && start == at + 1 {
            break;
        }
    }
    paths
}

/// The rooms that follow `crate::` in some code, by themselves or in braces.
fn imported(code: &str) -> Vec<&'static str> {
    let after = code.split("crate::").skip(1);
    let all = after.flat_map(|rest| match rest.strip_prefix('{') {
        Some(group) => paths(group),
        None => vec![rest],
    });
    let named = all.filter_map(|path| {
        let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
        let first = &path[..end.unwrap_or(path.len())];
        ROOMS.into_iter().find(|room| *room == first)
    });
    named.collect()
}

#[test]
fn imports_are_seen_by_themselves_and_in_braces() {
    let alone = "use crate::weights::Weights; crate::hub::missing(x);";
    assert_eq!(imported(alone), ["weights", "hub"]);
    let braces = "use crate::{\n    Result, models::{layers::Linear, text::tower}, image::fit,\n};\nlet util = 1;";
    assert_eq!(imported(braces), ["models", "image"]);
}

#[test]
fn every_room_imports_those_below_it_alone() {
    for (height, name) in ROOMS.into_iter().enumerate() {
        for (path, code) in room(name) {
            for other in imported(&code) {
                let below = ROOMS.iter().position(|room| *room == other) <= Some(height);
                assert!(below, "{} imports {other}", path.display());
            }
        }
    }
    assert!(!room("util").is_empty() && !room("method").is_empty());
}

#[test]
fn the_method_imports_diffusion_and_util_alone() {
    for (path, code) in room("method") {
        for other in imported(&code) {
            let allowed = ["method", "diffusion", "util"].contains(&other);
            assert!(allowed, "{} imports {other}", path.display());
        }
    }
}

#[test]
fn the_method_names_no_network_and_no_family() {
    let classes = family::all().map(|family| family.class.to_owned());
    let parts = family::networks()
        .into_iter()
        .map(|part| format!("\"{part}\""));
    let others = [
        "STABLE_DIFFUSION",
        "INSTRUCT_PIX2PIX",
        "unet",
        "U-Net",
        "ClipText",
    ];
    let names: Vec<String> = classes
        .chain(parts)
        .chain(others.map(str::to_owned))
        .collect();
    for (path, code) in room("method") {
        for name in &names {
            assert!(
                !code.contains(name.as_str()),
                "{} names {name}",
                path.display()
            );
        }
    }
}
