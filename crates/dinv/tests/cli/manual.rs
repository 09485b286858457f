//! `dinv completions` and `dinv man`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{entries, refused, run, succeed};

/// The subcommands, from the help.
fn subcommands(folder: &Path) -> Vec<String> {
    let help = succeed(folder, "--help").stdout;
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty());
    let names = listed.filter_map(|line| line.split_whitespace().next());
    names.map(ToOwned::to_owned).collect()
}

/// The output of another program, unless it is not installed.
fn ask(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let done = Command::new(program).args(arguments).output().ok()?;
    let text = [done.stdout, done.stderr].concat();
    Some((
        done.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

#[test]
fn every_shell_gets_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let commands = subcommands(folder.path());
    assert!(commands.len() > 12, "{commands:?}");
    for (shell, sign) in [
        ("bash", "complete -F _dinv"),
        ("zsh", "#compdef dinv"),
        ("fish", "complete -c dinv"),
        (
            "powershell",
            "Register-ArgumentCompleter -Native -CommandName 'dinv'",
        ),
        ("elvish", "edit:completion:arg-completer[dinv]"),
    ] {
        let script = succeed(folder.path(), &format!("completions {shell}")).stdout;
        assert!(script.contains(sign), "{shell}: {script}");
        for name in commands.iter().map(String::as_str).chain(["skip-existing"]) {
            assert!(script.contains(name), "{shell}: {name}");
        }
        let path = folder.path().join(shell);
        fs::write(&path, &script).unwrap();
        let path = path.to_str().unwrap();
        let checked = match shell {
            "bash" | "zsh" => ask(shell, &["-n", path]),
            "fish" => ask(shell, &["--no-execute", path]),
            _ => None,
        };
        if let Some((is_valid, said)) = checked {
            assert!(is_valid && said.is_empty(), "{shell}: {said}");
        }
    }
    refused(
        folder.path(),
        "completions tcsh",
        64,
        &["possible values: bash, elvish, fish"],
    );
}

/// Sources the script and asks bash for the words that it would offer.
#[test]
fn bash_offers_commands_flags_and_values() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("dinv.bash");
    fs::write(&script, succeed(folder.path(), "completions bash").stdout).unwrap();
    let offered = |words: &[&str]| -> Option<BTreeSet<String>> {
        let last = words.len() - 1;
        let previous = words[last - 1];
        let line = format!(
            "source '{}'; COMP_WORDS=({}); COMP_CWORD={last}; _dinv dinv '{}' '{previous}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script.display(),
            words.join(" "),
            words[last],
        );
        let (done, said) = ask("bash", &["--norc", "-c", &line])?;
        assert!(done, "{said}");
        Some(said.lines().map(|line| line.trim().to_owned()).collect())
    };
    for (words, expected) in [
        (&["dinv", "le"][..], "learn"),
        (&["dinv", "eval", "comp"], "compare"),
        (&["dinv", "apply", "--skip-e"], "--skip-existing"),
        (&["dinv", "learn", "--device", "c"], "cpu"),
    ] {
        let Some(offered) = offered(words) else {
            return; // no bash here
        };
        assert!(offered.contains(expected), "{words:?}: {offered:?}");
    }
}

#[test]
fn manual_pages_are_complete_and_render() {
    let folder = tempfile::tempdir().unwrap();
    succeed(folder.path(), "man -o pages");
    let pages = folder.path().join("pages");
    let names = entries(&pages);
    for name in subcommands(folder.path()) {
        if name != "help" {
            assert!(
                names.contains(&format!("dinv-{name}.1")),
                "{name}: {names:?}"
            );
        }
    }
    assert!(names.contains(&"dinv.1".to_owned()) && names.contains(&"dinv-eval-run.1".to_owned()));
    let read = |name: &str| fs::read_to_string(pages.join(name)).unwrap();
    let learn = read("dinv-learn.1");
    for part in [
        ".SH SYNOPSIS",
        "\\fBdinv learn\\fR",
        "day.png",
        "textual\\-inversion",
    ] {
        assert!(learn.contains(part), "no `{part}` in {learn}");
    }
    assert!(read("dinv.1").contains("Exit codes"));
    // Printed, it is the same page.
    assert_eq!(
        succeed(folder.path(), "man eval run").stdout,
        read("dinv-eval-run.1")
    );
    assert_eq!(succeed(folder.path(), "man").stdout, read("dinv.1"));
    for name in names {
        let path = pages.join(&name);
        let path = path.to_str().unwrap();
        if let Some((is_valid, said)) = ask("mandoc", &["-T", "lint", "-W", "error", path]) {
            assert!(is_valid, "{name}: {said}");
        }
        // A stand-in for `man`, as in small images, prints no page.
        if let Some((true, said)) = ask("man", &["--warnings", "-l", path])
            && said.contains("SYNOPSIS")
        {
            assert!(!said.contains("warning:"), "{name}: {said}");
        }
    }
    refused(
        folder.path(),
        "man -o pages",
        64,
        &["exists already", "`--overwrite`"],
    );
    succeed(folder.path(), "man -o pages --overwrite");
    refused(folder.path(), "man lern", 64, &["no command `dinv lern`"]);
    assert!(run(folder.path(), "man").stderr.is_empty());
}
