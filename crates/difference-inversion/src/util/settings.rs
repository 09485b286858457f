//! Checks of settings before anything is done with them, and which of them are not read.

use std::fmt::{self, Display};

use crate::{Error, Result};

/// What a setting is, in one text: the documentation of its field and the help of its flag. Those of plain
/// generation, of which some are called like others, are named behind `text.`.
#[doc(hidden)]
#[macro_export]
macro_rules! about {
    (prompt_mode) => {
        "What stands for a picture in words"
    };
    (pez_tokens) => {
        "Words of an optimised prompt"
    };
    (pez_steps) => {
        "Steps of the search for an optimised prompt"
    };
    (pez_learning_rate) => {
        "Learning rate of that search"
    };
    (pez_weight_decay) => {
        "Weight decay of that search"
    };
    (steps) => {
        "Optimisation steps"
    };
    (num_tokens) => {
        "Difference tokens"
    };
    (learning_rate) => {
        "AdamW's learning rate"
    };
    (alpha) => {
        "Between the image delta (0) and the text delta (1)"
    };
    (lambda_clip) => {
        "Weight of the CLIP loss; 0 leaves it out"
    };
    (lambda_mse) => {
        "Weight of the token consistency loss"
    };
    (lambda_before) => {
        "Weight of explaining A by taking the difference away, beside explaining A′ by adding it"
    };
    (clip_reading) => {
        "What is read in the CLIP loss: the tokens alone, or what they change in the prompts"
    };
    (delta) => {
        "What the CLIP loss follows; `image` alone is an ablation"
    };
    (consistency) => {
        "Whether taking the difference away from A′ must explain A and point back; `false` is an ablation"
    };
    (initialisation) => {
        "How the tokens start: `zero`, `random`, or `word:TEXT`; all but zero are ablations"
    };
    (weight_decay) => {
        "AdamW's weight decay"
    };
    (samples_per_step) => {
        "Draws of timestep and noise per pair and step"
    };
    (max_norm) => {
        "Bound on a token's norm, in median norms of the vocabulary"
    };
    (prompt_dropout) => {
        "Probability with which a word of both prompts is left out of a step"
    };
    (jitter) => {
        "Latent pixels by which both pictures are moved together at random"
    };
    (select_every) => {
        "Judge the tokens every N steps and keep the best; 0 keeps the last"
    };
    (select_samples) => {
        "Draws of timestep and noise they are judged on"
    };
    (patience) => {
        "Stop after N judgements without improvement"
    };
    (checkpoint_every) => {
        "Write a checkpoint every N steps"
    };
    (inversion) => {
        "How B is turned into noise"
    };
    (guidance) => {
        "What guidance moves away from: B's own prompt, or the negative prompt"
    };
    (guidance_scale) => {
        "How far guidance goes; 1 or less is none"
    };
    (num_inference_steps) => {
        "Steps of the sampling schedule"
    };
    (strength) => {
        "How much of the difference is applied: 0 is none of it, 1 all of it"
    };
    (reverse) => {
        "Undo the difference instead of applying it"
    };
    (negative_prompt) => {
        "What guidance moves away from"
    };
    (source_guidance_scale) => {
        "Edit-friendly: guidance while B is turned into noise"
    };
    (skip) => {
        "Edit-friendly: fraction of the schedule left out at its noisy end"
    };
    (inversion_iterations) => {
        "DDIM: fixed-point iterations per inversion step"
    };
    (sdedit_strength) => {
        "SDEdit: how far B is noised"
    };
    (eta) => {
        "Edit-friendly: randomness of the sampling steps: 0 is DDIM (for a flow, Euler: FlowEdit), 1 is DDPM"
    };
    (seed) => {
        "Seed of everything random; the same seed gives the same result"
    };
    (text.prompt) => {
        "What to draw"
    };
    (text.negative_prompt) => {
        "What to stay away from"
    };
    (text.guidance_scale) => {
        "How closely to follow the prompt; 1 or less is no guidance"
    };
    (text.image_guidance_scale) => {
        "InstructPix2Pix: how closely to keep to the picture; less than 1 is no guidance at all"
    };
    (text.num_inference_steps) => {
        "Steps of the sampling schedule"
    };
    (text.scheduler) => {
        "How the noise is removed"
    };
    (text.strength) => {
        "How much of the difference tokens to use"
    };
}

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
