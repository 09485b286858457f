//! The name of a model on the Hub.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// The default branch.
const MAIN: &str = "main";
/// The longest owner, name or revision.
const LONGEST: usize = 96;

/// `OWNER/NAME` or `OWNER/NAME@REVISION`; a revision is a branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId {
    repository: String,
    revision: String,
}

impl ModelId {
    /// `OWNER/NAME`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The revision; `main` unless given.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The same model at another revision.
    pub(super) fn at(&self, revision: &str) -> Self {
        Self {
            repository: self.repository.clone(),
            revision: revision.to_owned(),
        }
    }
}

impl FromStr for ModelId {
    type Err = Error;

    /// Parses a name. Names that could lead out of a folder are invalid.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let parts: Vec<&str> = repository.split('/').collect();
        let is_repository = parts.len() == 2 && parts.into_iter().all(is_name);
        let is_revision = revision.len() <= LONGEST && revision.split('/').all(is_name);
        if is_repository && is_revision {
            return Ok(Self {
                repository: repository.to_owned(),
                revision: revision.to_owned(),
            });
        }
        Err(Error::invalid_input(format!(
            "expected OWNER/NAME or OWNER/NAME@REVISION, found `{text}`"
        )))
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// Letters, digits, `-`, `_` and `.`; not hidden, and without `--` and `..`, which have other meanings in
/// the cache.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=LONGEST).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with(['.', '-'])
        && !name.ends_with(['.', '-'])
        && !name.contains("--")
        && !name.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for text in [
            "stabilityai/stable-diffusion-xl-base-1.0",
            "a/b@fp16",
            "a/b@refs/pr/32",
            "a/b@462165984030d82259a11f4367a4eed129e94a7b",
        ] {
            assert_eq!(text.parse::<ModelId>().unwrap().to_string(), text);
        }
        let id: ModelId = "a/b@main".parse().unwrap();
        assert_eq!((id.repository(), id.revision()), ("a/b", "main"));
        assert_eq!(id.to_string(), "a/b");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "", "a", "a/", "/a", "a/b/c", "a//b", "../b", "a/..", "a/b@", "a/b@../x", "a/b@/x",
            "a/b@x/", "a/.b", "a--x/b", "a/b c", "a/b@x@y", "~/a", "./a", "a\\b/c", "a/b?c", "ü/b",
        ] {
            assert!(text.parse::<ModelId>().is_err(), "{text}");
        }
    }
}
