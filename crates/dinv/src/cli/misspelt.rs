//! Hints for misspelt commands whose arguments show the intended one.

use std::path::Path;

use clap::error::ErrorKind;

use super::exit::Exit;
use super::terminal;

/// Prints clap's message and, if it is clear, the intended command; returns the exit code.
pub(crate) fn report(error: &clap::Error, arguments: &[String]) -> Exit {
    // Ignored: stdout or stderr may be closed.
    let _ = error.print();
    if error.kind() == ErrorKind::InvalidValue
        && arguments
            .windows(2)
            .any(|pair| pair[0] == "--device" && pair[1] == "gpu")
    {
        terminal::message("\nhint: `--device auto` takes the first GPU; docs/guide/gpu.md");
    }
    let strays = [ErrorKind::UnknownArgument, ErrorKind::InvalidSubcommand];
    if strays.contains(&error.kind())
        && let Some(command) = meant(arguments)
    {
        terminal::message(format_args!("\nhint: {command}"));
    }
    match error.use_stderr() {
        true => Exit::Usage,
        false => Exit::Done, // help, or the version
    }
}

/// The intended command, for arguments that are only words or only files.
fn meant(arguments: &[String]) -> Option<String> {
    let (first, behind) = arguments.split_first()?;
    let (command, given) = match first {
        text if text.contains(' ') => ("generate", arguments),
        path if Path::new(path).extension().is_some() => ("analogy", arguments),
        command => (command.as_str(), behind),
    };
    let bare: Vec<&str> = (given.iter().map(String::as_str))
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let rest = given[bare.len()..].iter().map(String::as_str);
    let written = match (command, bare.as_slice()) {
        ("generate", [_, ..]) => format!("--prompt \"{}\"", bare.join(" ")),
        ("analogy", [a, a_prime, b]) => {
            format!(
                "--a {} --a-prime {} --b {}",
                quoted(a),
                quoted(a_prime),
                quoted(b)
            )
        }
        ("learn", [a, a_prime]) => format!("--a {} --a-prime {}", quoted(a), quoted(a_prime)),
        ("apply", [difference, pictures @ ..]) if !pictures.is_empty() => {
            let pictures: Vec<String> = pictures.iter().map(|path| quoted(path)).collect();
            format!("{} --b {}", quoted(difference), pictures.join(" "))
        }
        _ => return None,
    };
    let rest: String = rest.map(|word| format!(" {}", quoted(word))).collect();
    Some(format!("dinv {command} {written}{rest}"))
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    if word.contains(|c: char| c.is_whitespace() || "\"'$*?&;|<>()".contains(c)) {
        format!("'{}'", word.replace('\'', "'\\''"))
    } else {
        word.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(arguments: &[&str]) -> Option<String> {
        meant(
            &arguments
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn words_are_a_prompt_and_files_are_a_b_and_so_on() {
        assert_eq!(
            hint(&["generate", "a red house", "-o", "x.png"]).unwrap(),
            "dinv generate --prompt \"a red house\" -o x.png"
        );
        assert_eq!(
            hint(&["analogy", "a.png", "my a2.png", "b.png"]).unwrap(),
            "dinv analogy --a a.png --a-prime 'my a2.png' --b b.png"
        );
        assert_eq!(
            hint(&["a.png", "a2.png", "b.png"]).unwrap(),
            "dinv analogy --a a.png --a-prime a2.png --b b.png"
        );
        assert_eq!(
            hint(&["a red house", "-q"]).unwrap(),
            "dinv generate --prompt \"a red house\" -q"
        );
        assert_eq!(
            hint(&["apply", "night.safetensors", "x.png", "y.png", "-o", "out"]).unwrap(),
            "dinv apply night.safetensors --b x.png y.png -o out"
        );
    }

    #[test]
    fn what_cannot_be_told_is_not_guessed() {
        assert_eq!(hint(&["analogy", "a.png"]), None);
        assert_eq!(hint(&["a.png"]), None);
        assert_eq!(hint(&["doctor", "x"]), None);
        assert_eq!(hint(&["generate", "--promt", "x"]), None);
        assert_eq!(hint(&[]), None);
    }
}
