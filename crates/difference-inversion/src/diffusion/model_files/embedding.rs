//! Names of learned words in prompts: `<name>`.

use std::path::PathBuf;

/// A file with a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingFile {
    /// The text between `<` and `>` in prompts; by default the file's name without its extension.
    pub name: Option<String>,
    /// The file.
    pub path: PathBuf,
}

impl EmbeddingFile {
    /// The text between `<` and `>` in prompts.
    pub fn name(&self) -> String {
        let stem = || {
            self.path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        let name = self.name.clone().unwrap_or_else(stem);
        name.trim_start_matches('<')
            .trim_end_matches('>')
            .to_owned()
    }

    /// Whether a text contains the word; CLIP ignores case.
    pub fn is_in(&self, text: &str) -> bool {
        text.to_lowercase()
            .contains(&format!("<{}>", self.name().to_lowercase()))
    }
}

/// Parts of a text that are written like learned words, with their brackets.
pub(crate) fn written_in(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('<').filter_map(|(start, _)| {
        let rest = &text[start + 1..];
        let name = &rest[..rest.find('>')?];
        is_name(name).then(|| &text[start..start + name.len() + 2])
    })
}

/// Whether a word can have this name in a prompt.
pub(crate) fn is_name(name: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || ['.', '_', '-'].contains(&c);
    !name.is_empty() && name.chars().all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_in_a_text() {
        let found: Vec<&str> = written_in("a <night-x.2> and <a b>, 1 < 2, <>, <<cat>").collect();
        assert_eq!(found, ["<night-x.2>", "<cat>"]);
    }

    #[test]
    fn a_name_is_given_or_the_files() {
        let file = |name: Option<&str>, path: &str| EmbeddingFile {
            name: name.map(str::to_owned),
            path: path.into(),
        };
        assert_eq!(file(None, "x/night.v2.safetensors").name(), "night.v2");
        assert_eq!(file(None, "<cat-toy>.safetensors").name(), "cat-toy");
        assert_eq!(file(Some("toy"), "cat.safetensors").name(), "toy");
        assert!(file(None, "Night.safetensors").is_in("a <night>"));
        assert!(!file(None, "night.safetensors").is_in("a night"));
    }
}
