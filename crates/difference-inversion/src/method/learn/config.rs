//! Settings of the optimisation.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::method::delta::DeltaMode;
use crate::util::settings::{Checks, Unread};

/// How the difference tokens are initialised.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Initialisation {
    /// D̃ = 0, so that only the learned difference has an effect (the paper's choice). As `Random` for a text
    /// encoder that [reads directions](crate::diffusion::text_encoder::TextEncoder::reads_directions), since zeros
    /// have none.
    #[default]
    Zero,
    /// Normal noise with the vocabulary's spread (ablation C).
    Random,
    /// The embeddings of these words, repeated or cut to the number of tokens (ablation C).
    Word(String),
}

/// The text that the CLIP loss encodes; see [`ClipLoss`](crate::method::loss::ClipLoss).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClipReading {
    /// The prompts with and without the difference tokens: the loss uses what the tokens change.
    #[default]
    Prompts,
    /// Only the difference tokens (the paper's choice).
    Alone,
}

/// Settings of the optimisation; the defaults are the method's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearnConfig {
    #[doc = about!(num_tokens)]
    ///
    /// n in the paper.
    pub num_tokens: usize,
    #[doc = about!(steps)]
    pub steps: usize,
    #[doc = about!(clip_first)]
    ///
    /// The optimiser's moments stay for the steps that follow.
    pub clip_first: usize,
    #[doc = about!(clip_thinned)]
    ///
    /// Drawn anew in each step.
    pub clip_thinned: usize,
    #[doc = about!(learning_rate)]
    pub learning_rate: f64,
    #[doc = about!(weight_decay)]
    pub weight_decay: f64,
    #[doc = about!(lambda_mse)]
    pub lambda_mse: f64,
    #[doc = about!(lambda_before)]
    ///
    /// The weight of L_before relative to L_after, 1 in the paper.
    pub lambda_before: f64,
    #[doc = about!(lambda_clip)]
    ///
    /// 0 is ablation D.
    pub lambda_clip: f64,
    #[doc = about!(alpha)]
    pub alpha: f64,
    #[doc = about!(clip_reading)]
    pub clip_reading: ClipReading,
    #[doc = about!(delta)]
    pub delta: DeltaMode,
    #[doc = about!(consistency)]
    ///
    /// [P_A′, −D̃] has to explain A as far as `lambda_before` says, and to point back in the CLIP loss; off is
    /// ablation B.
    pub consistency: bool,
    #[doc = about!(initialisation)]
    pub initialisation: Initialisation,
    #[doc = about!(samples_per_step)]
    pub samples_per_step: usize,
    #[doc = about!(max_norm)]
    pub max_norm: Option<f64>,
    #[doc = about!(prompt_dropout)]
    pub prompt_dropout: f64,
    #[doc = about!(jitter)]
    ///
    /// Up to this many.
    pub jitter: usize,
    #[doc = about!(select_every)]
    ///
    /// They are judged on a fixed set of (timestep, noise).
    pub select_every: usize,
    #[doc = about!(select_samples)]
    ///
    /// Their timesteps are spread evenly.
    pub select_samples: usize,
    #[doc = about!(patience)]
    pub patience: Option<usize>,
    #[doc = about!(checkpoint_every)]
    ///
    /// Where there is a file for it.
    pub checkpoint_every: usize,
    #[doc = about!(seed)]
    ///
    /// Timesteps, noise and everything else that learning draws.
    pub seed: u64,
}

impl Default for LearnConfig {
    fn default() -> Self {
        Self {
            num_tokens: 10,
            steps: 1000,
            clip_first: 0,
            clip_thinned: 0,
            learning_rate: 1e-3,
            weight_decay: 0.01,
            lambda_mse: 4.0,
            lambda_before: 1.0,
            lambda_clip: 0.1,
            alpha: 0.8,
            clip_reading: ClipReading::default(),
            delta: DeltaMode::Interpolated,
            consistency: true,
            initialisation: Initialisation::Zero,
            samples_per_step: 1,
            max_norm: None,
            prompt_dropout: 0.0,
            jitter: 0,
            select_every: 50,
            select_samples: 8,
            patience: None,
            checkpoint_every: 50,
            seed: 0,
        }
    }
}

impl LearnConfig {
    /// Whether L_before is part of the loss.
    pub fn explains_before(&self) -> bool {
        self.consistency && self.lambda_before > 0.0
    }

    /// The number of latents that pass through the denoiser in a step with `pairs` pairs.
    pub fn rows(&self, pairs: usize) -> usize {
        let halves = 1 + usize::from(self.explains_before());
        halves * self.samples_per_step * pairs
    }

    /// The settings that have no effect with the other settings.
    pub fn unread(&self) -> Vec<Unread> {
        let clip = self.lambda_clip > 0.0;
        let prompts = clip && self.clip_reading == ClipReading::Prompts;
        let interpolated = clip && self.delta == DeltaMode::Interpolated;
        let judged = self.select_every > 0;
        Unread::among([
            (
                "alpha",
                interpolated,
                "a CLIP loss that follows the delta `interpolated`",
            ),
            ("delta", clip, "a CLIP loss: its weight is 0"),
            ("clip_reading", clip, "a CLIP loss: its weight is 0"),
            ("clip_first", clip, "a CLIP loss: its weight is 0"),
            (
                "clip_thinned",
                prompts,
                "a CLIP loss that reads the `prompts`",
            ),
            (
                "lambda_before",
                self.consistency && self.lambda_mse > 0.0,
                "`consistency` and a `lambda_mse` above 0",
            ),
            ("select_samples", judged, "`select_every`"),
            ("patience", judged, "`select_every`"),
        ])
    }

    /// Checks that the settings are valid.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) naming the first invalid one.
    pub fn validate(&self) -> Result<()> {
        let of_selection = match self.select_every {
            0 => 1, // there is none
            _ => self.select_samples,
        };
        Checks::default()
            .at_least_1("num_tokens", self.num_tokens)
            .at_least_1("steps", self.steps)
            .rate("learning_rate", self.learning_rate)
            .weight("weight_decay", self.weight_decay)
            .weight("lambda_mse", self.lambda_mse)
            .that(
                "lambda_mse",
                self.lambda_mse > 0.0 || self.lambda_clip > 0.0,
                "above 0, as there is nothing else in the loss",
                self.lambda_mse,
            )
            .weight("lambda_before", self.lambda_before)
            .weight("lambda_clip", self.lambda_clip)
            .fraction("alpha", self.alpha)
            .at_least_1("samples_per_step", self.samples_per_step)
            .positive("max_norm", self.max_norm.unwrap_or(1.0))
            .fraction("prompt_dropout", self.prompt_dropout)
            .at_least_1("select_samples", of_selection)
            .result()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_make_sense() {
        LearnConfig::default().validate().unwrap();
    }

    #[test]
    fn the_second_half_of_the_loss_is_left_out_where_it_has_no_weight() {
        let with = |consistency, lambda_before| LearnConfig {
            consistency,
            lambda_before,
            samples_per_step: 3,
            ..LearnConfig::default()
        };
        assert_eq!(with(true, 0.25).rows(2), 12);
        assert_eq!(with(true, 0.0).rows(2), 6);
        assert_eq!(with(false, 1.0).rows(2), 6);
        let unread = |config: &LearnConfig| -> Vec<&str> {
            config.unread().iter().map(|one| one.setting).collect()
        };
        assert_eq!(unread(&with(true, 0.25)), [""; 0]);
        assert_eq!(unread(&with(false, 0.25)), ["lambda_before"]);
        let clip_only = LearnConfig {
            lambda_mse: 0.0,
            ..LearnConfig::default()
        };
        assert_eq!(unread(&clip_only), ["lambda_before"]);
    }

    #[test]
    fn the_setting_that_makes_no_sense_is_named() {
        let message = |change: fn(&mut LearnConfig)| {
            let mut config = LearnConfig::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(
            message(|config| config.alpha = 1.5),
            "setting `alpha`: expected 0 to 1, found 1.5"
        );
        assert!(message(|config| config.num_tokens = 0).contains("`num_tokens`"));
        assert!(message(|config| config.lambda_before = -1.0).contains("`lambda_before`"));
        assert!(message(|config| config.learning_rate = f64::NAN).contains("`learning_rate`"));
        assert!(message(|config| config.max_norm = Some(-1.0)).contains("`max_norm`"));
        assert!(
            message(|config| (config.lambda_mse, config.lambda_clip) = (0.0, 0.0))
                .contains("`lambda_mse`")
        );
        for change in [
            (|config| config.learning_rate = 1e30) as fn(&mut LearnConfig),
            |config| config.weight_decay = 1e30,
            |config| config.lambda_mse = 1e30,
            |config| config.lambda_clip = 1e30,
        ] {
            assert!(
                message(change).contains("found 1000000000000000000"),
                "{}",
                message(change)
            );
        }
    }
}
