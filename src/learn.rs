//! The optimisation loop: difference tokens D̃ from pairs (A, A′).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::delta::DeltaMode;

/// How the difference tokens start.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Initialisation {
    /// D̃ = 0, so that nothing but the learned difference gets in (the paper's choice).
    #[default]
    Zero,
    /// Normal noise with the vocabulary's spread (ablation C).
    Random,
    /// The embeddings of these words, repeated or cut to the number of tokens (ablation C).
    Word(String),
}

/// Settings of the optimisation; the defaults are the method's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearnConfig {
    /// Number of difference tokens n.
    pub num_tokens: usize,
    /// Optimisation steps.
    pub steps: usize,
    /// AdamW's learning rate.
    pub learning_rate: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Weight of the token consistency loss.
    pub lambda_mse: f64,
    /// Weight of the CLIP loss; 0 switches it off (ablation D).
    pub lambda_clip: f64,
    /// Place of the delta between the image delta (0) and the text delta (1).
    pub alpha: f64,
    /// Which delta the CLIP loss follows.
    pub delta: DeltaMode,
    /// Whether [P_A′, −D̃] has to explain A; off is ablation B.
    pub consistency: bool,
    /// How the tokens start.
    pub initialisation: Initialisation,
    /// Draws of (timestep, noise) per pair and step.
    pub samples_per_step: usize,
    /// Bound on each token's norm, in median norms of the vocabulary's embeddings.
    pub max_norm: Option<f64>,
    /// Probability with which each word of both prompts is left out of a step.
    pub prompt_dropout: f64,
    /// Both pictures' latents are moved together by up to this many latent pixels.
    pub jitter: usize,
    /// Every so many steps the tokens are judged on a fixed set of (timestep, noise) and the best
    /// are kept; 0 keeps the last.
    pub select_every: usize,
    /// Size of that fixed set, its timesteps spread evenly.
    pub select_samples: usize,
    /// Stop after this many judgements without improvement.
    pub patience: Option<usize>,
    /// Every so many steps a checkpoint is written, where there is a file for it.
    pub checkpoint_every: usize,
    /// Seed of timesteps, noise and everything else that is drawn.
    pub seed: u64,
}

impl Default for LearnConfig {
    fn default() -> Self {
        Self {
            num_tokens: 10,
            steps: 1000,
            learning_rate: 1e-3,
            weight_decay: 0.01,
            lambda_mse: 4.0,
            lambda_clip: 0.1,
            alpha: 0.8,
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

/// The files of one learning run, all optional.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records {
    /// Where checkpoints are written (atomically, each over the last).
    pub checkpoint: Option<PathBuf>,
    /// Go on from this checkpoint.
    pub resume: Option<PathBuf>,
    /// Take timesteps and noise from this safetensors file instead of drawing them.
    pub replay: Option<PathBuf>,
    /// Write timesteps, noise, loss terms and the tokens after each step to this file.
    pub trace: Option<PathBuf>,
}
