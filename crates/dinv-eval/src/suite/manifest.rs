//! Lists of analogies, one JSON object per line.

use std::fs;
use std::path::Path;

use difference_inversion::{Error, Result};
use serde::Deserialize;

use super::{Attributes, Captions, Entries, Entry, NO_KIND};

/// One line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: Option<String>,
    kind: Option<String>,
    a: String,
    a_prime: String,
    b: String,
    b_prime: Option<String>,
    captions: Option<Captions>,
    instruction: Option<String>,
    attributes: Option<Attributes>,
}

/// Reads the entries of a list. An entry without a name is named by its line number.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let text = text.trim_start_matches('\u{feff}'); // Windows tools prepend it
    let mut entries = Entries::of(path);
    for (number, text) in text.lines().enumerate() {
        let number = number + 1;
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = parse(text).map_err(|reason| entries.wrong(number, reason))?;
        let picture = |field, name: &str| entries.picture(number, field, name);
        let entry = Entry {
            name: line.name.unwrap_or_else(|| format!("{number:04}")),
            kind: line.kind.unwrap_or_else(|| NO_KIND.to_owned()),
            pictures: [
                picture("a", &line.a)?,
                picture("a_prime", &line.a_prime)?,
                picture("b", &line.b)?,
            ],
            b_prime: (line.b_prime.as_deref())
                .map(|name| picture("b_prime", name))
                .transpose()?,
            captions: line.captions,
            instruction: line.instruction,
            attributes: line.attributes,
        };
        entries.push(number, entry)?;
    }
    Ok(entries.entries)
}

fn parse(text: &str) -> std::result::Result<Line, String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let line = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        if error.inner().is_data() && field != "." {
            format!("`{field}`: {}", error.inner())
        } else {
            error.inner().to_string()
        }
    })?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(line)
}
