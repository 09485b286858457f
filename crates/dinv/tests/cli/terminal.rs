//! What stays on a terminal, wide or narrow, when a command has ended.

use std::io::Read;
use std::path::Path;

use pty_process::Size;
use pty_process::blocking::{Command, open};

use super::{PAIR, dinv, succeed, workplace};

/// Lines of the terminal.
const ROWS: u16 = 40;
/// What bars are drawn with.
const BAR: [char; 2] = ['━', '─'];

/// Runs a command that succeeds on a terminal of `columns`, and returns the lines that it leaves there, without
/// trailing spaces.
fn left_behind(folder: &Path, arguments: &str, columns: u16) -> Vec<String> {
    let (mut terminal, inside) = open().unwrap();
    terminal.resize(Size::new(ROWS, columns)).unwrap();
    let mut command = dinv(folder);
    command.args(arguments.split_whitespace());
    command.env_remove("COLUMNS").env_remove("NO_COLOR");
    command.env("TERM", "xterm-256color");
    let mut child = Command::from(command).spawn(inside).unwrap();
    let mut screen = vt100::Parser::new(ROWS, columns, 0);
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = terminal.read(&mut bytes) {
        screen.process(&bytes[..count]);
    }
    let code = child.wait().unwrap().code();
    let lines: Vec<String> = screen.screen().rows(0, columns).collect();
    let lines = lines.into_iter().map(|line| line.trim_end().to_owned());
    let lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
    assert_eq!(code, Some(0), "{arguments}: {lines:#?}");
    lines
}

#[test]
fn results_stay_on_the_terminal_and_bars_do_not() {
    let work = workplace();
    let folder = work.path();
    succeed(
        folder,
        &format!("learn -q --config tiny.toml {PAIR} -o d.safetensors"),
    );
    let apply = "apply d.safetensors --config tiny.toml --b a.png b.png --caption-b x --caption-b y \
                 --overwrite -o out";
    let caption = "caption --model model a.png b.png";
    let again = format!("learn --overwrite --config tiny.toml {PAIR} -o d.safetensors");
    for columns in [120, 76, 50] {
        for (command, results) in [
            (apply, vec!["out/a.png", "out/b.png"]),
            (caption, vec!["a.png: ", "b.png: "]),
            (&again, vec!["d.safetensors"]),
        ] {
            let lines = left_behind(folder, command, columns);
            let told = format!("{command}, {columns} columns: {lines:#?}");
            for result in results {
                let named = lines.iter().filter(|line| line.starts_with(result));
                assert_eq!(named.count(), 1, "`{result}`: {told}");
            }
            let bars = lines.iter().filter(|line| line.contains(BAR));
            assert_eq!(bars.count(), 0, "{told}");
            assert!(!lines.concat().contains("0/0"), "{told}");
        }
    }
}
