//! Names of files that are made of other names.

use std::collections::BTreeSet;

/// Characters that some system does not allow in the name of a file.
const RESERVED: &str = r#"/\:*?"<>|"#;

/// Whether some system does not allow the character in the name of a file.
pub(crate) fn is_reserved(c: char) -> bool {
    c.is_control() || RESERVED.contains(c)
}

/// The text with a dash for every reserved character.
pub(crate) fn without_reserved(text: &str) -> String {
    text.replace(is_reserved, "-")
}

/// The first of the names that `nth` gives, from 1 on, that is not taken, and takes it. Some systems do not tell upper
/// case from lower case.
pub(crate) fn unused(taken: &mut BTreeSet<String>, nth: impl Fn(usize) -> String) -> String {
    let mut number = 1;
    loop {
        let name = nth(number);
        if taken.insert(name.to_lowercase()) {
            return name;
        }
        number += 1;
    }
}
