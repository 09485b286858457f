//! Checks of settings before anything is done with them, and which of them are not read.

use std::fmt::{self, Display};

use crate::{Error, Result};

/// Checks one after the other, of which the first that fails is the error.
#[derive(Debug, Default)]
pub struct Checks(Option<Error>);

impl Checks {
    /// The setting `name`, found to be `found`, has to be `expected`, which it is if this `holds`.
    #[must_use]
    pub fn that(
        self,
        name: &'static str,
        holds: bool,
        expected: &str,
        found: impl Display,
    ) -> Self {
        let failed = || Error::Setting {
            name,
            expected: expected.to_owned(),
            found: found.to_string(),
        };
        Self(self.0.or_else(|| (!holds).then(failed)))
    }

    /// A count that is not 0.
    #[must_use]
    pub fn at_least_1(self, name: &'static str, found: usize) -> Self {
        self.that(name, found > 0, "at least 1", found)
    }

    /// A finite number above 0.
    #[must_use]
    pub fn positive(self, name: &'static str, found: f64) -> Self {
        let holds = found > 0.0 && found.is_finite();
        self.that(name, holds, "a positive number", found)
    }

    /// A finite number, 0 or above.
    #[must_use]
    pub fn not_negative(self, name: &'static str, found: f64) -> Self {
        let holds = found >= 0.0 && found.is_finite();
        self.that(name, holds, "0 or more", found)
    }

    /// A number from 0 to 1.
    #[must_use]
    pub fn fraction(self, name: &'static str, found: f64) -> Self {
        self.that(name, (0.0..=1.0).contains(&found), "0 to 1", found)
    }

    /// A finite number.
    #[must_use]
    pub fn finite(self, name: &'static str, found: f64) -> Self {
        self.that(name, found.is_finite(), "a number", found)
    }

    /// # Errors
    /// [`Error::Setting`] naming the first setting that is not as it has to be.
    pub fn result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

/// A setting that, with the others as they are, is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread {
    /// Its name.
    pub setting: &'static str,
    /// Without what it is not read.
    pub needs: &'static str,
}

impl Unread {
    /// Those of some settings, each with whether it is read and what it needs, that are not.
    pub fn among<const N: usize>(settings: [(&'static str, bool, &'static str); N]) -> Vec<Self> {
        let unread = settings.into_iter().filter(|(_, read, _)| !read);
        let unread = unread.map(|(setting, _, needs)| Self { setting, needs });
        unread.collect()
    }
}

impl Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { setting, needs } = self;
        write!(f, "setting `{setting}` has no effect without {needs}")
    }
}
