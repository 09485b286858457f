//! One analogy with everything known about it.

use std::collections::BTreeMap;

use difference_inversion::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// One analogy of a suite with its pictures loaded.
#[derive(Debug, Clone)]
pub struct Analogy {
    /// Its name: unique in the suite, and valid as the name of a folder.
    pub name: String,
    /// The kind of edit; results are averaged within each kind first.
    pub kind: String,
    /// A, the picture before.
    pub a: RgbImage,
    /// A′, the picture after.
    pub a_prime: RgbImage,
    /// B, the picture to change.
    pub b: RgbImage,
    /// The true B′, if known.
    pub b_prime: Option<RgbImage>,
    /// What the pictures show, in words.
    pub captions: Option<Captions>,
    /// The edit as an instruction, such as "make it snow".
    pub instruction: Option<String>,
    /// What the pictures show, attribute by attribute.
    pub attributes: Option<Attributes>,
}

/// What the pictures of an analogy show, in words.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Captions {
    /// Caption of A.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a: Option<String>,
    /// Caption of A′.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a_prime: Option<String>,
    /// Caption of B.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b: Option<String>,
    /// Caption of the true B′.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b_prime: Option<String>,
}

impl Captions {
    /// The captions of A and A′, if both are given.
    pub fn of_a(&self) -> Option<[&str; 2]> {
        Some([self.a.as_deref()?, self.a_prime.as_deref()?])
    }

    /// The captions of B and of the true B′, if both are given.
    pub fn of_b(&self) -> Option<[&str; 2]> {
        Some([self.b.as_deref()?, self.b_prime.as_deref()?])
    }
}

/// The value of each attribute of one picture, by the attribute's name.
pub type SceneAttributes = BTreeMap<String, String>;

/// The attributes of the pictures of an analogy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Attributes {
    /// Attributes of A.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub a: SceneAttributes,
    /// Attributes of A′.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub a_prime: SceneAttributes,
    /// Attributes of B.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub b: SceneAttributes,
    /// Attributes of the true B′.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub b_prime: SceneAttributes,
}

impl Analogy {
    /// The captions of A and A′.
    ///
    /// # Errors
    /// [`Error::Missing`] if the suite does not state them.
    pub fn captions_of_a(&self) -> Result<[&str; 2]> {
        let both = self.captions.as_ref().and_then(Captions::of_a);
        both.ok_or_else(|| Error::Missing {
            what: "a caption".to_owned(),
            reason: "the method needs captions of A and A′, and the suite has none".to_owned(),
        })
    }

    /// The captions of B and of the true B′.
    ///
    /// # Errors
    /// [`Error::Missing`] if the suite does not state them.
    pub fn captions_of_b(&self) -> Result<[&str; 2]> {
        let both = self.captions.as_ref().and_then(Captions::of_b);
        both.ok_or_else(|| Error::Missing {
            what: "a caption".to_owned(),
            reason: "the method needs captions of B and B′, and the suite has none".to_owned(),
        })
    }

    /// The instruction.
    ///
    /// # Errors
    /// [`Error::Missing`] if the suite has none.
    pub fn told_instruction(&self) -> Result<&str> {
        self.instruction.as_deref().ok_or_else(|| Error::Missing {
            what: "an instruction".to_owned(),
            reason: "the method needs an instruction, and the suite has none".to_owned(),
        })
    }
}
