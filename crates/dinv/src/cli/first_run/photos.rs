//! The photographs of a first run: a part of the suite `photos`.

use std::path::{Path, PathBuf};

use dinv_eval::suite::{Entry, Suite};

use super::report::Shown;
use crate::cli::locate::{self, PHOTOS};
use crate::cli::record::{file_name, text_of};
use crate::cli::terminal::Failure;

/// The edits that are learned: a style, a light, and something added.
pub(super) const KINDS: [&str; 3] = ["pencil", "night", "snow"];

/// The photographs and edits that are used.
pub(super) struct Photos {
    folder: PathBuf,
    /// Each photograph without an edit: its name, file and caption.
    pub(super) plain: Vec<(String, PathBuf, String)>,
    /// Of each kind, the analogies that have the same A.
    pub(super) edits: Vec<(String, Vec<Entry>)>,
}

impl Photos {
    /// Finds and opens the suite.
    pub(super) fn open() -> anyhow::Result<Self> {
        let folder = locate::suite(PHOTOS)?;
        let suite = Suite::open(&folder)?;
        let mut edits = Vec::new();
        for kind in KINDS {
            let of_kind: Vec<&Entry> = suite
                .entries
                .iter()
                .filter(|one| one.kind == kind)
                .collect();
            let Some(first) = of_kind.first() else {
                let message = format!("{}: no analogy of kind `{kind}`", folder.display());
                return Err(Failure::new(message).into());
            };
            let same = of_kind
                .iter()
                .filter(|one| one.pictures[0] == first.pictures[0]);
            edits.push((kind.to_owned(), same.map(|one| (*one).clone()).collect()));
        }
        let plain = plain(&suite);
        Ok(Self {
            folder,
            plain,
            edits,
        })
    }

    /// The analogies of a kind.
    pub(super) fn of(&self, kind: &str) -> &[Entry] {
        let found = self.edits.iter().find(|(known, _)| known == kind);
        found.map_or(&[], |(_, entries)| entries)
    }

    /// The file of a photograph without an edit.
    pub(super) fn plain_of(&self, name: &str) -> &Path {
        let found = self.plain.iter().find(|(known, ..)| known == name);
        found.map_or(Path::new(""), |(_, path, _)| path)
    }

    /// The noise that diffusers' tests draw from.
    pub(super) fn noise(&self) -> PathBuf {
        self.folder.join("noise.safetensors")
    }

    /// A picture of the suite in a strip.
    pub(super) fn shown(&self, label: &str, path: &Path) -> Shown {
        Shown {
            label: label.to_owned(),
            file: text_of(path.strip_prefix(&self.folder).unwrap_or(path)),
            of_suite: true,
        }
    }

    /// The path of a picture of a strip; `run` is the folder of the run.
    pub(super) fn path(&self, shown: &Shown, run: &Path) -> PathBuf {
        match shown.of_suite {
            true => self.folder.join(&shown.file),
            false => run.join(&shown.file),
        }
    }
}

/// Every B of a suite, once.
fn plain(suite: &Suite) -> Vec<(String, PathBuf, String)> {
    let mut plain: Vec<(String, PathBuf, String)> = Vec::new();
    for entry in &suite.entries {
        let path = &entry.pictures[2];
        let caption = entry
            .captions
            .as_ref()
            .and_then(|captions| captions.b.clone());
        if let Some(caption) = caption.filter(|_| plain.iter().all(|(_, known, _)| known != path)) {
            let name = Path::new(&file_name(path)).with_extension("");
            plain.push((text_of(name), path.clone(), caption));
        }
    }
    plain.sort();
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edit_has_two_photographs_to_be_applied_to() {
        let photos = Photos::open().unwrap();
        assert_eq!(photos.edits.len(), KINDS.len());
        for (kind, entries) in &photos.edits {
            assert_eq!(entries.len(), 2, "{kind}");
            assert_eq!(entries[0].pictures[0], entries[1].pictures[0], "{kind}");
            assert_ne!(entries[0].pictures[2], entries[1].pictures[2], "{kind}");
            assert!(entries.iter().all(|one| one.b_prime.is_some()), "{kind}");
        }
        assert_eq!(photos.plain.len(), 9);
        assert!(photos.noise().is_file());
        assert!(photos.plain_of("cat").is_file());
    }
}
