//! Lists of analogies as comma-separated values
//! ([RFC 4180](https://www.rfc-editor.org/rfc/rfc4180)).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use difference_inversion::{Error, Result};

use super::{Captions, Entries, Entry, NO_KIND};

/// The allowed columns.
const COLUMNS: [&str; 11] = [
    "name",
    "kind",
    "a",
    "a_prime",
    "b",
    "b_prime",
    "caption_a",
    "caption_a_prime",
    "caption_b",
    "caption_b_prime",
    "instruction",
];
/// The required columns.
const NEEDED: [&str; 3] = ["a", "a_prime", "b"];

/// Reads the entries of a list whose first line names the columns. An entry without a name is named by
/// its line number.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let mut entries = Entries::of(path);
    let mut records = records(text.trim_start_matches('\u{feff}'))
        .map_err(|(line, reason)| entries.wrong(line, reason))?
        .into_iter();
    let Some((header_line, header)) = records.next() else {
        return Err(Error::invalid_file(path, "the file is empty"));
    };
    let columns: Vec<&str> = header.iter().map(|column| column.trim()).collect();
    check_columns(&columns).map_err(|reason| entries.wrong(header_line, reason))?;
    for (number, record) in records {
        if record.len() != columns.len() {
            let reason = format!(
                "expected {} values as in the first line, found {}",
                columns.len(),
                record.len()
            );
            return Err(entries.wrong(number, reason));
        }
        let values = columns.iter().copied().zip(&record);
        let values: HashMap<&str, &str> = values
            .map(|(column, value)| (column, value.trim()))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        let text = |column: &str| values.get(column).map(|&value| value.to_owned());
        let picture = |column: &str| {
            let name = values.get(column).copied().unwrap_or_default();
            entries.picture(number, column, name)
        };
        let captions = Captions {
            a: text("caption_a"),
            a_prime: text("caption_a_prime"),
            b: text("caption_b"),
            b_prime: text("caption_b_prime"),
        };
        let entry = Entry {
            name: text("name").unwrap_or_else(|| format!("{number:04}")),
            kind: text("kind").unwrap_or_else(|| NO_KIND.to_owned()),
            pictures: [picture("a")?, picture("a_prime")?, picture("b")?],
            b_prime: (values.contains_key("b_prime"))
                .then(|| picture("b_prime"))
                .transpose()?,
            captions: (captions != Captions::default()).then_some(captions),
            instruction: text("instruction"),
            attributes: None,
        };
        entries.push(number, entry)?;
    }
    Ok(entries.entries)
}

fn check_columns(columns: &[&str]) -> std::result::Result<(), String> {
    if let Some(unknown) = columns.iter().find(|column| !COLUMNS.contains(column)) {
        let known = COLUMNS.join(", ");
        return Err(format!("there is no column `{unknown}`; there are {known}"));
    }
    if let Some(missing) = NEEDED.iter().find(|column| !columns.contains(column)) {
        return Err(format!("the column `{missing}` is missing"));
    }
    let twice = (1..columns.len()).find(|&i| columns[..i].contains(&columns[i]));
    match twice {
        Some(i) => Err(format!("the column `{}` is there twice", columns[i])),
        None => Ok(()),
    }
}

/// The values of every record that has any, with the number of its first line.
type Records = Vec<(usize, Vec<String>)>;

/// Splits a text into records. Values are separated by commas, records by line ends; both may occur in
/// a value in double quotes, where `""` stands for a quote.
///
/// It is strict, which the crate `csv` (1.4) is not: that reads `"x"y` as `xy`, and an unclosed quote to
/// the end of the file, which swallows all analogies after it, without an error.
fn records(text: &str) -> std::result::Result<Records, (usize, &'static str)> {
    let mut records = Vec::new();
    let (mut record, mut value) = (Vec::new(), String::new());
    let (mut line, mut begin) = (1, 1);
    let mut chars = text.chars().peekable();
    let mut was_quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '"' if value.is_empty() && !was_quoted => {
                was_quoted = true;
                loop {
                    match chars.next() {
                        Some('"') if chars.peek() == Some(&'"') => {
                            chars.next();
                            value.push('"');
                        }
                        Some('"') => break,
                        Some(c) => {
                            line += usize::from(c == '\n');
                            value.push(c);
                        }
                        None => return Err((begin, "a quote is not closed")),
                    }
                }
            }
            ',' => {
                record.push(std::mem::take(&mut value));
                was_quoted = false;
            }
            '\n' => {
                record.push(std::mem::take(&mut value));
                records.push((begin, std::mem::take(&mut record)));
                was_quoted = false;
                line += 1;
                begin = line;
            }
            '\r' if chars.peek() == Some(&'\n') => {}
            _ if was_quoted => return Err((line, "expected a comma after the closing quote")),
            c => value.push(c),
        }
    }
    record.push(value);
    records.push((begin, record));
    // Nothing, or the commas that spreadsheets leave of emptied rows.
    let blank = |value: &String| value.trim().is_empty();
    records.retain(|(_, record)| !record.iter().all(blank));
    Ok(records)
}
