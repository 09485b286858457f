//! The interface of methods, and the built-in ones.

use std::fmt;

use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::Observer;
use difference_inversion::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::models::{INPAINTING, INSTRUCT_PIX2PIX, TEXT_TO_IMAGE};
use super::{Analogy, Captions, EvalModels};
use super::{analogist, dia, instruct_pix2pix, ours, visii, words};

/// One way to make B′: what it learns from the pictures, if anything, and how it draws.
pub trait Method: Send + Sync {
    /// Its settings except the seed, for the record; a result made with others is not valid.
    fn settings(&self) -> Value;

    /// What the method is given in addition to A, A′ and B.
    fn told(&self) -> Told;

    /// Whether an analogy with these captions and this instruction provides all that [`Method::told`] names.
    fn is_told(&self, _captions: &Captions, _instruction: Option<&str>) -> bool {
        true
    }

    /// The settings that [`Method::learn`] depends on, with the name of what is learned. Methods of
    /// a run for which this is equal share what is learned. `None` for a method that learns nothing.
    fn learning(&self) -> Option<Value> {
        None
    }

    /// Learns from the pictures of one analogy: all of the work that does not depend on the settings of
    /// drawing.
    ///
    /// # Errors
    /// As [`Method::draw`].
    fn learn(&self, _: &Analogy, _seed: u64, _: Observer<'_>) -> Result<Arrays> {
        Ok(Arrays::default())
    }

    /// Draws B′ of one analogy from what was learned with the same seed.
    ///
    /// # Errors
    /// [`Error::Missing`] if the suite does not provide what the method needs, and any other reason
    /// that prevents it from making a picture.
    fn draw(
        &self,
        analogy: &Analogy,
        learned: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage>;
}

/// What a method is given in addition to A, A′ and B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// Nothing.
    Nothing,
    /// Captions from the suite.
    Captions,
    /// The instruction from the suite.
    Instruction,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Captions => "captions",
            Self::Instruction => "the instruction",
        })
    }
}

/// Makes a method from the settings that differ from its defaults.
pub type Build = fn(&EvalModels, &Map<String, Value>) -> Result<Box<dyn Method>>;

/// A built-in method.
#[derive(Debug, Clone, Copy)]
pub struct BuiltIn {
    /// Its name.
    pub name: &'static str,
    /// What it is, in short.
    pub summary: &'static str,
    /// The role of the model it draws with: see
    /// [`EvalModelPaths::by_role`](super::EvalModelPaths::by_role).
    pub model: &'static str,
    /// The approximate time of an analogy relative to `difference-inversion`, with the demo model on two CPU
    /// cores and each method's own settings: from `dinv eval run --quick`; for `no-consistency`, `visii` and
    /// `dia` from docs/study.md and docs/eval.md. Ablations that change only what is learned count as 1.
    pub cost: f64,
    /// Makes it.
    pub build: Build,
}

/// The built-in methods, in the order of the tables.
pub const BUILT_IN: &[BuiltIn] = &[
    BuiltIn {
        name: "difference-inversion",
        summary: "the method",
        model: TEXT_TO_IMAGE,
        cost: 1.0,
        build: ours::full,
    },
    BuiltIn {
        name: "image-delta",
        summary: "ablation A: the CLIP loss follows the image delta only",
        model: TEXT_TO_IMAGE,
        cost: 1.0,
        build: ours::image_delta,
    },
    BuiltIn {
        name: "no-consistency",
        summary: "ablation B: taking the difference away need not explain A",
        model: TEXT_TO_IMAGE,
        cost: 0.68,
        build: ours::no_consistency,
    },
    BuiltIn {
        name: "random-start",
        summary: "ablation C: the difference tokens do not start at zero",
        model: TEXT_TO_IMAGE,
        cost: 1.0,
        build: ours::random_start,
    },
    BuiltIn {
        name: "no-clip",
        summary: "ablation D: no CLIP loss",
        model: TEXT_TO_IMAGE,
        cost: 0.9,
        build: ours::no_clip,
    },
    BuiltIn {
        name: "clip-alone",
        summary: "the published CLIP loss, which reads only the difference tokens",
        model: TEXT_TO_IMAGE,
        cost: 1.0,
        build: ours::clip_alone,
    },
    BuiltIn {
        name: "text-swap",
        summary: "B inverted under its caption, made again under that of B′",
        model: TEXT_TO_IMAGE,
        cost: 0.17,
        build: words::text_swap,
    },
    BuiltIn {
        name: "sdedit",
        summary: "SDEdit: B noised, denoised under the caption of B′",
        model: TEXT_TO_IMAGE,
        cost: 0.09,
        build: words::sdedit,
    },
    BuiltIn {
        name: "instruct-pix2pix",
        summary: "InstructPix2Pix: a U-Net taught to follow the instruction",
        model: INSTRUCT_PIX2PIX,
        cost: 0.23,
        build: instruct_pix2pix::instruct_pix2pix,
    },
    BuiltIn {
        name: "visii",
        summary: "VISII: an instruction for InstructPix2Pix, learned from A and A′",
        model: INSTRUCT_PIX2PIX,
        cost: 8.0,
        build: visii::visii,
    },
    BuiltIn {
        name: "analogist",
        summary: "Analogist: B′ filled into a grid by an inpainting model",
        model: INPAINTING,
        cost: 0.5,
        build: analogist::analogist,
    },
    BuiltIn {
        name: "dia",
        summary: "Diffusion Image Analogies: the difference of two inverted prompts, added to a third",
        model: TEXT_TO_IMAGE,
        cost: 11.0,
        build: dia::dia,
    },
];

/// A method under its own name, with some settings changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// Its name in tables and folders.
    pub name: String,
    /// The built-in method.
    pub method: String,
    /// The settings that differ from the method's defaults, by name.
    pub settings: Map<String, Value>,
}

impl Variant {
    /// Returns a built-in method with its defaults.
    pub fn plain(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            method: name.to_owned(),
            settings: Map::new(),
        }
    }

    /// The [cost](BuiltIn::cost) of its method; 1 for an unknown method.
    pub fn cost(&self) -> f64 {
        let known = BUILT_IN.iter().find(|known| known.name == self.method);
        known.map_or(1.0, |known| known.cost)
    }
}

/// Makes the method of a variant.
///
/// # Errors
/// [`Error::InvalidInput`] if there is no such method or a setting is invalid, [`Error::Missing`] if a
/// required model was not given, [`Error::WrongModel`] if the method cannot use the one that was, and
/// any error in the model's files.
pub fn build(variant: &Variant, models: &EvalModels) -> Result<Box<dyn Method>> {
    let known = BUILT_IN.iter().find(|known| known.name == variant.method);
    let Some(known) = known else {
        let names: Vec<&str> = BUILT_IN.iter().map(|known| known.name).collect();
        return Err(Error::invalid_input(format!(
            "there is no method `{}`; there are {}",
            variant.method,
            names.join(", ")
        )));
    };
    (known.build)(models, &variant.settings)
}
