//! The text of every setting, their validation, and the settings without effect.

use std::fmt::{self, Display};

use crate::{Error, Result};

/// The one text of each setting: the documentation of its field, the help of its flag, and its line in
/// `docs/reference/settings.md`. Settings of plain generation, some of which share a name with others, have the prefix
/// `text.`.
#[doc(hidden)]
#[macro_export]
macro_rules! about {
    (prompt_mode) => {
        "Prompt of a picture: its `caption`, words found for it (`optimised`), both, or only your `text`"
    };
    (pez_tokens) => {
        "Length of an optimised prompt, in tokens"
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
    (learn_resolution) => {
        "Shorter side of the pictures while learning, in pixels; fewer take less time"
    };
    (clip_first) => {
        "Steps on the CLIP loss alone, before all others; they need no denoiser"
    };
    (clip_thinned) => {
        "Copies of each prompt, with half of its words left out, that the CLIP loss reads too"
    };
    (learning_rate) => {
        "AdamW's learning rate"
    };
    (learning_rate_schedule) => {
        "How the learning rate falls from the first step to the last"
    };
    (alpha) => {
        "Interpolation from the image delta (0) to the text delta (1)"
    };
    (lambda_clip) => {
        "Weight of the CLIP loss; 0 drops it"
    };
    (lambda_mse) => {
        "Weight of the token consistency loss"
    };
    (lambda_before) => {
        "Weight of explaining A by subtracting the difference, relative to explaining A′ by adding it"
    };
    (clip_reading) => {
        "What the CLIP loss reads: only the tokens (`alone`), or what they change in the `prompts`"
    };
    (delta) => {
        "Direction that the CLIP loss follows; `image` is an ablation"
    };
    (consistency) => {
        "Learn the undo too: subtracting the difference from A′ must explain A and point back"
    };
    (initialisation) => {
        "How the tokens start: `zero` (for Chroma, klein and Z-Image, noise), `random`, or `word:TEXT`; all but `zero` are ablations"
    };
    (weight_decay) => {
        "AdamW's weight decay"
    };
    (samples_per_step) => {
        "Draws of timestep and noise per pair and step"
    };
    (max_norm) => {
        "Upper bound on a token's norm, in median norms of the vocabulary"
    };
    (prompt_dropout) => {
        "Probability of dropping a word from both prompts in a step"
    };
    (jitter) => {
        "Random shift of both pictures together, in latent pixels"
    };
    (select_every) => {
        "Evaluate the tokens every N steps and keep the best; 0 keeps the last"
    };
    (select_samples) => {
        "Draws of timestep and noise for each evaluation"
    };
    (patience) => {
        "Stop after N evaluations without improvement"
    };
    (checkpoint_every) => {
        "Write a checkpoint every N steps"
    };
    (inversion) => {
        "How B is turned into noise"
    };
    (guidance) => {
        "What guidance moves away from: B's own prompt (`difference`), or the negative prompt (`ordinary`)"
    };
    (guidance_scale) => {
        "Guidance scale; 1 or less is none"
    };
    (num_inference_steps) => {
        "Steps of the sampling schedule"
    };
    (strength) => {
        "How much of the difference to apply: 0 none, 1 all"
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
        "Edit-friendly: fraction of the schedule skipped at its noisy end"
    };
    (inversion_iterations) => {
        "DDIM: fixed-point iterations per inversion step"
    };
    (sdedit_strength) => {
        "SDEdit: how much noise is added to B"
    };
    (eta) => {
        "Edit-friendly: randomness of the sampling steps: 0 is DDIM (for a flow, Euler: FlowEdit), 1 is DDPM"
    };
    (seed) => {
        "Random seed"
    };
    (model.lora) => {
        "LoRA or LoCon that changes the U-Net and the text encoders, and how much of it (1 is all): a file of diffusers, \
         PEFT, kohya or ComfyUI; repeat for several"
    };
    (model.embedding) => {
        "Textual inversion that `<NAME>` in prompts and captions stands for; NAME is the file's name unless given; \
         repeat for several"
    };
    (model.vae) => {
        "Autoencoder that replaces the model's own: a folder, or a file of weights for the model's own configuration"
    };
    (model.preview_vae) => {
        "Autoencoder for previews, such as TAESD: a folder, or a file of weights [default: approximate colours]"
    };
    (model.text_encoder) => {
        "File of weights for one of the model's own text encoders, CLIP, T5 or Qwen3: .safetensors or GGUF; repeat for several"
    };
    (model.clip_skip) => {
        "Read CLIP this many layers earlier than usual, counted as in diffusers; 1 is clip skip 2 in other programs \
         [default: 0]"
    };
    (text.prompt) => {
        "What to draw"
    };
    (text.negative_prompt) => {
        "What to avoid"
    };
    (text.guidance_scale) => {
        "How closely to follow the prompt; 1 or less is no guidance"
    };
    (text.image_guidance_scale) => {
        "InstructPix2Pix: how closely to keep to the picture; less than 1 turns all guidance off"
    };
    (text.num_inference_steps) => {
        "Steps of the sampling schedule"
    };
    (text.scheduler) => {
        "Sampler"
    };
    (text.strength) => {
        "How much of the difference to apply"
    };
}

/// Checks of settings; the first failure is the error.
#[derive(Debug, Default)]
pub struct Checks(Option<Error>);

impl Checks {
    /// Checks that a setting `holds`; otherwise the error states what was `expected` and `found`.
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

    /// Checks for a count that is not 0.
    #[must_use]
    pub fn at_least_1(self, name: &'static str, found: usize) -> Self {
        self.that(name, found > 0, "at least 1", found)
    }

    /// Checks for a learning rate: above 0, and too small to move a token out of every vocabulary in one step.
    #[must_use]
    pub fn rate(self, name: &'static str, found: f64) -> Self {
        let holds = found > 0.0 && found <= 100.0;
        self.that(name, holds, "a number above 0 and at most 100", found)
    }

    /// Checks for a weight in a sum: 0 or above, and small enough to be squared in 32 bits.
    #[must_use]
    pub fn weight(self, name: &'static str, found: f64) -> Self {
        self.that(name, (0.0..=1e6).contains(&found), "0 to 1000000", found)
    }

    /// Checks for a number from 0 to 1.
    #[must_use]
    pub fn fraction(self, name: &'static str, found: f64) -> Self {
        self.that(name, (0.0..=1.0).contains(&found), "0 to 1", found)
    }

    /// Checks for a finite number.
    #[must_use]
    pub fn finite(self, name: &'static str, found: f64) -> Self {
        self.that(name, found.is_finite(), "a number", found)
    }

    /// # Errors
    /// [`Error::Setting`] naming the first invalid setting.
    pub fn result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

/// A setting that has no effect, given the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread {
    /// Its name.
    pub setting: &'static str,
    /// What the setting depends on to have an effect.
    pub needs: &'static str,
}

impl Unread {
    /// Selects the settings that are not read; each is given with whether it is read and what it needs.
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
