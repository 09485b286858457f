//! The output of `--help`, word for word: tests/cli/snapshots. To accept a change, run the tests with
//! `UPDATE_SNAPSHOTS=1` and check the difference.

use std::path::Path;

use super::run;

const COMMANDS: &[&str] = &[
    "",
    "analogy",
    "learn",
    "apply",
    "generate",
    "batch",
    "caption",
    "export",
    "import",
    "first-run",
    "eval",
    "eval run",
    "eval report",
    "eval compare",
    "eval export",
    #[cfg(feature = "serve")]
    "serve",
    #[cfg(feature = "serve")]
    "jobs",
    #[cfg(feature = "serve")]
    "jobs list",
    #[cfg(feature = "serve")]
    "jobs show",
    #[cfg(feature = "serve")]
    "jobs watch",
    #[cfg(feature = "serve")]
    "jobs cancel",
    #[cfg(feature = "serve")]
    "jobs first",
    #[cfg(feature = "serve")]
    "jobs retry",
    #[cfg(feature = "serve")]
    "jobs remove",
    "doctor",
    "models",
    "models list",
    "models pull",
    "models check",
    "completions",
    "man",
];

#[test]
fn help_is_as_agreed() {
    let folder = tempfile::tempdir().unwrap();
    for command in COMMANDS {
        let done = run(folder.path(), &format!("{command} --help"));
        assert_eq!(done.code, Some(0));
        assert_eq!(done.stderr, "");
        let name = match *command {
            "" => "dinv".to_owned(),
            command => command.replace(' ', "-"),
        };
        let name = format!("{name}.txt");
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/cli/snapshots")
            .join(name);
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &done.stdout).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert!(
            done.stdout == expected,
            "{} differs:\n{}",
            path.display(),
            done.stdout
        );
    }
}

#[test]
fn the_version_is_the_packages() {
    let folder = tempfile::tempdir().unwrap();
    let done = run(folder.path(), "--version");
    assert_eq!(done.stdout, format!("dinv {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_subcommand_shows_an_example_and_every_line_fits() {
    let folder = tempfile::tempdir().unwrap();
    for command in &COMMANDS[1..] {
        for flag in ["-h", "--help"] {
            let help = run(folder.path(), &format!("{command} {flag}")).stdout;
            assert!(help.contains(&format!("  dinv {command}")), "{help}");
            assert!(
                help.lines().all(|line| line.chars().count() <= 100),
                "{help}"
            );
        }
    }
}
