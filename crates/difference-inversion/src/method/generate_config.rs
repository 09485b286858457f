//! Settings of an analogy: how B′ is generated, and all of them together.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::diffusion::guide::{self, GuidedBy};
use crate::method::learn::LearnConfig;
use crate::method::prompt::PromptConfig;
use crate::method::regenerate::{Guidance, Inversion};
use crate::util::settings::{Checks, Unread};

/// How B′ is generated from B.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateConfig {
    #[doc = about!(inversion)]
    pub inversion: Inversion,
    #[doc = about!(guidance)]
    pub guidance: Guidance,
    #[doc = about!(guidance_scale)]
    ///
    /// Absent: see [`GenerateConfig::guidance_scale`].
    pub guidance_scale: Option<f64>,
    #[doc = about!(source_guidance_scale)]
    pub source_guidance_scale: f64,
    #[doc = about!(num_inference_steps)]
    pub num_inference_steps: usize,
    #[doc = about!(skip)]
    pub skip: f64,
    #[doc = about!(inversion_iterations)]
    ///
    /// 1 is the plain inversion.
    pub inversion_iterations: usize,
    #[doc = about!(sdedit_strength)]
    ///
    /// 0 to 1.
    pub sdedit_strength: f64,
    #[doc = about!(eta)]
    ///
    /// Absent: see [`Noising::usual_eta`](crate::diffusion::sample::Noising::usual_eta).
    pub eta: Option<f64>,
    #[doc = about!(strength)]
    ///
    /// See [`FullPrompt::with_difference`](crate::diffusion::words::FullPrompt::with_difference).
    pub strength: f64,
    #[doc = about!(reverse)]
    ///
    /// [P_B, −D̃].
    pub reverse: bool,
    #[doc = about!(negative_prompt)]
    pub negative_prompt: String,
    #[doc = about!(seed)]
    pub seed: u64,
    /// Whether a [`Preview`](crate::util::progress::Progress::Preview) is reported after every step. The picture stays the same.
    #[serde(skip)]
    pub previews: bool,
}

impl GenerateConfig {
    /// The guidance scale: the one that is set, or else the default for the inversion and the guidance.
    pub fn guidance_scale(&self) -> f64 {
        let usual = match (self.guidance, self.inversion) {
            (Guidance::Difference, Inversion::Ddim) => 3.0,
            (Guidance::Difference, _) => 2.0,
            (Guidance::Ordinary, Inversion::Ddim) => 1.0,
            (Guidance::Ordinary, Inversion::EditFriendly) => 15.0,
            (Guidance::Ordinary, Inversion::Sdedit) => 7.5,
        };
        self.guidance_scale.unwrap_or(usual)
    }

    /// The same for a network with this kind of guidance: with [ordinary](Guidance::Ordinary) guidance, an
    /// embedded scale is smaller, as in FlowEdit (Kulikov et al. 2025).
    pub fn guidance_scale_with(&self, guided_by: GuidedBy) -> f64 {
        let ordinary = self.guidance == Guidance::Ordinary;
        match (guided_by, self.guidance_scale, self.inversion) {
            (GuidedBy::Embedding { .. }, None, Inversion::EditFriendly) if ordinary => 5.5,
            (GuidedBy::Embedding { usual }, None, Inversion::Sdedit) if ordinary => usual,
            _ => self.guidance_scale(),
        }
    }

    /// Checks that the settings of guidance are valid for a network with this kind of guidance.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) as [`guide::check`], with
    /// [ordinary](Guidance::Ordinary) guidance.
    pub fn check_guidance(&self, guided_by: GuidedBy) -> Result<()> {
        match self.guidance {
            Guidance::Ordinary => {
                guide::check(guided_by, self.guidance_scale, &self.negative_prompt)
            }
            Guidance::Difference => Ok(()),
        }
    }

    /// The strength, negative for the reverse edit.
    pub fn signed_strength(&self) -> f64 {
        if self.reverse {
            -self.strength
        } else {
            self.strength
        }
    }

    /// The settings that have no effect with the other settings.
    pub fn unread(&self) -> Vec<Unread> {
        let ordinary = self.guidance == Guidance::Ordinary;
        let by = |inversion| self.inversion == inversion;
        let edit_friendly = by(Inversion::EditFriendly);
        let needs_edit_friendly = "the inversion `edit-friendly`";
        Unread::among([
            ("negative_prompt", ordinary, "guidance `ordinary`"),
            (
                "source_guidance_scale",
                ordinary && edit_friendly,
                "guidance `ordinary` and the inversion `edit-friendly`",
            ),
            ("skip", edit_friendly, needs_edit_friendly),
            ("eta", edit_friendly, needs_edit_friendly),
            (
                "inversion_iterations",
                by(Inversion::Ddim),
                "the inversion `ddim`",
            ),
            (
                "sdedit_strength",
                by(Inversion::Sdedit),
                "the inversion `sdedit`",
            ),
        ])
    }

    /// Checks that the settings are valid. Whether the schedule has enough steps is checked with the schedule.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) naming the first invalid one.
    pub fn validate(&self) -> Result<()> {
        let skip = (0.0..1.0).contains(&self.skip);
        Checks::default()
            .finite("guidance_scale", self.guidance_scale())
            .finite("source_guidance_scale", self.source_guidance_scale)
            .that("skip", skip, "0 or more, less than 1", self.skip)
            .fraction("sdedit_strength", self.sdedit_strength)
            .fraction("eta", self.eta.unwrap_or(0.0))
            .finite("strength", self.strength)
            .at_least_1("inversion_iterations", self.inversion_iterations)
            .at_least_1("num_inference_steps", self.num_inference_steps)
            .result()
    }
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            inversion: Inversion::EditFriendly,
            guidance: Guidance::Difference,
            guidance_scale: None,
            source_guidance_scale: 3.5,
            num_inference_steps: 100,
            skip: 0.36,
            inversion_iterations: 1,
            sdedit_strength: 0.8,
            eta: None,
            strength: 1.0,
            reverse: false,
            negative_prompt: String::new(),
            seed: 0,
            previews: false,
        }
    }
}

/// All settings of one analogy.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnalogyConfig {
    /// How prompts are made.
    pub prompt: PromptConfig,
    /// How the difference is learned.
    pub learn: LearnConfig,
    /// How B′ is generated.
    pub generate: GenerateConfig,
}

impl AnalogyConfig {
    /// The settings that have no effect with the other settings.
    pub fn unread(&self) -> Vec<Unread> {
        [
            self.prompt.unread(),
            self.learn.unread(),
            self.generate.unread(),
        ]
        .concat()
    }

    /// Sets the seed of everything that is drawn.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.prompt.seed = seed;
        self.learn.seed = seed;
        self.generate.seed = seed;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::prompt::PromptMode;

    fn names(unread: &[Unread]) -> Vec<&'static str> {
        unread.iter().map(|unread| unread.setting).collect()
    }

    #[test]
    fn settings_without_effect_are_told() {
        let config = GenerateConfig::default();
        let unread = config.unread();
        assert_eq!(
            unread[0].to_string(),
            "setting `negative_prompt` has no effect without guidance `ordinary`"
        );
        let others = ["inversion_iterations", "sdedit_strength"];
        assert_eq!(names(&unread[2..]), others);
        let ordinary = GenerateConfig {
            guidance: Guidance::Ordinary,
            ..config
        };
        assert_eq!(names(&ordinary.unread()), others);
        let ddim = GenerateConfig {
            inversion: Inversion::Ddim,
            ..ordinary
        };
        let others = ["source_guidance_scale", "skip", "eta", "sdedit_strength"];
        assert_eq!(names(&ddim.unread()), others);

        let mut config = AnalogyConfig::default();
        config.learn.lambda_clip = 0.0;
        config.learn.select_every = 0;
        let unread = [config.prompt.unread(), config.learn.unread()].concat();
        assert_eq!(unread.len(), 4 + 7);
        config.prompt.prompt_mode = PromptMode::Optimised;
        config.learn.lambda_clip = 0.1;
        config.learn.select_every = 10;
        assert!(
            [config.prompt.unread(), config.learn.unread()]
                .concat()
                .is_empty()
        );
    }
}
