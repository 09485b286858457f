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

/// How the learning rate falls from the first step to the last. Earlier steps, on the CLIP loss alone, use all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Not at all.
    #[default]
    Constant,
    /// In a straight line to 0.
    Linear,
    /// Along half a cosine to 0 (Loshchilov & Hutter 2017).
    Cosine,
}

impl Schedule {
    /// The share of the learning rate for step `step` of `steps`, from 0: 1 at the first.
    pub fn share(self, step: usize, steps: usize) -> f64 {
        let way = step as f64 / steps.max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - way,
            Self::Cosine => (1.0 + (std::f64::consts::PI * way).cos()) / 2.0,
        }
    }
}

/// The default learning rate in units of the vocabulary's root mean square: a step changes a coordinate of D̃ by about half the
/// size of a word's. The unit is each text encoder's own; the factor was found with the demo model.
pub const RELATIVE_LEARNING_RATE: f64 = 0.45;

/// The largest size at which a difference is learned.
const LARGEST_SIDE: u32 = 16384;

/// Settings of the optimisation; the defaults are ours (`docs/study.md`).
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
    ///
    /// Absent: [`RELATIVE_LEARNING_RATE`] for each text encoder.
    pub learning_rate: Option<f64>,
    #[doc = about!(learning_rate_schedule)]
    pub learning_rate_schedule: Schedule,
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
    #[doc = about!(learn_resolution)]
    ///
    /// The other side is in proportion.
    pub learn_resolution: Option<u32>,
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
            steps: 100,
            clip_first: 200,
            clip_thinned: 1,
            learning_rate: None,
            learning_rate_schedule: Schedule::default(),
            weight_decay: 0.01,
            lambda_mse: 4.0,
            lambda_before: 1.0,
            lambda_clip: 2.0,
            alpha: 0.8,
            clip_reading: ClipReading::default(),
            delta: DeltaMode::Interpolated,
            consistency: true,
            initialisation: Initialisation::Zero,
            samples_per_step: 1,
            max_norm: Some(2.0),
            prompt_dropout: 0.0,
            learn_resolution: None,
            jitter: 0,
            select_every: 0,
            select_samples: 8,
            patience: None,
            checkpoint_every: 10,
            seed: 0,
        }
    }
}

impl LearnConfig {
    /// Whether L_before is part of the loss.
    pub fn explains_before(&self) -> bool {
        self.consistency && self.lambda_before > 0.0
    }

    /// The number of latents that pass through the denoiser in a step with `pairs` pairs: none if its loss has no weight.
    pub fn rows(&self, pairs: usize) -> usize {
        if self.lambda_mse == 0.0 {
            return 0;
        }
        let halves = 1 + usize::from(self.explains_before());
        halves * self.samples_per_step * pairs
    }

    /// The settings that have no effect with the other settings.
    pub fn unread(&self) -> Vec<Unread> {
        let clip = self.lambda_clip > 0.0;
        let prompts = clip && self.clip_reading == ClipReading::Prompts;
        let interpolated = clip && self.delta == DeltaMode::Interpolated;
        let (judged, denoised) = (self.select_every > 0, self.lambda_mse > 0.0);
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
                self.consistency && denoised,
                "`consistency` and a `lambda_mse` above 0",
            ),
            ("samples_per_step", denoised, "a `lambda_mse` above 0"),
            ("prompt_dropout", denoised, "a `lambda_mse` above 0"),
            ("learn_resolution", denoised, "a `lambda_mse` above 0"),
            ("jitter", denoised, "a `lambda_mse` above 0"),
            (
                "select_samples",
                judged && denoised,
                "`select_every` and a `lambda_mse` above 0",
            ),
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
        let max_norm = self.max_norm.unwrap_or(1.0);
        Checks::default()
            .at_least_1("num_tokens", self.num_tokens)
            .at_least_1("steps", self.steps)
            .rate(
                "learning_rate",
                self.learning_rate.unwrap_or(RELATIVE_LEARNING_RATE),
            )
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
            .that(
                "learn_resolution",
                self.learn_resolution
                    .is_none_or(|side| (1..=LARGEST_SIDE).contains(&side)),
                "1 to 16384",
                self.learn_resolution.unwrap_or_default(),
            )
            .at_least_1("samples_per_step", self.samples_per_step)
            .that(
                "max_norm",
                // A bound must be a number of 32 bits.
                max_norm > 0.0 && max_norm <= 1e36,
                "a number above 0 and at most 1e36",
                max_norm,
            )
            .fraction("prompt_dropout", self.prompt_dropout)
            .at_least_1("select_samples", of_selection)
            .result()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learning_rate_falls_to_almost_nothing() {
        let shares = |schedule: Schedule| [0, 1, 2, 3].map(|step| schedule.share(step, 4));
        assert_eq!(shares(Schedule::Constant), [1.0; 4]);
        assert_eq!(shares(Schedule::Linear), [1.0, 0.75, 0.5, 0.25]);
        let half = f64::sqrt(0.5) / 2.0; // cos(π/4)/2
        let expected = [1.0, 0.5 + half, 0.5, 0.5 - half];
        for (found, expected) in shares(Schedule::Cosine).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

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
            select_every: 50,
            ..LearnConfig::default()
        };
        assert_eq!(with(true, 0.25).rows(2), 12);
        assert_eq!(with(true, 0.0).rows(2), 6);
        assert_eq!(with(false, 1.0).rows(2), 6);
        let without = LearnConfig {
            lambda_mse: 0.0,
            ..with(true, 1.0)
        };
        assert_eq!(without.rows(2), 0);
        let unread = |config: &LearnConfig| -> Vec<&str> {
            config.unread().iter().map(|one| one.setting).collect()
        };
        assert_eq!(unread(&with(true, 0.25)), [""; 0]);
        assert_eq!(unread(&with(false, 0.25)), ["lambda_before"]);
        let clip_only = LearnConfig {
            lambda_mse: 0.0,
            select_every: 50,
            ..LearnConfig::default()
        };
        let denoised = [
            "samples_per_step",
            "prompt_dropout",
            "learn_resolution",
            "jitter",
            "select_samples",
        ];
        assert_eq!(
            unread(&clip_only),
            [&["lambda_before"][..], &denoised].concat()
        );
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
        assert!(
            message(|config| config.learning_rate = Some(f64::NAN)).contains("`learning_rate`")
        );
        assert!(message(|config| config.max_norm = Some(-1.0)).contains("`max_norm`"));
        assert!(message(|config| config.max_norm = Some(1e40)).contains("at most 1e36"));
        assert!(
            message(|config| (config.lambda_mse, config.lambda_clip) = (0.0, 0.0))
                .contains("`lambda_mse`")
        );
        for change in [
            (|config| config.learning_rate = Some(1e30)) as fn(&mut LearnConfig),
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
