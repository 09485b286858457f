//! A : A′ :: B : B′, end to end.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::learn::LearnConfig;
use crate::noise::{Guidance, Inversion};
use crate::prompt::PromptConfig;

/// How B′ is generated from B.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateConfig {
    /// How B becomes noise.
    pub inversion: Inversion,
    /// What guidance moves away from.
    pub guidance: Guidance,
    /// Strength of guidance; 1 is none. Absent: see [`GenerateConfig::guidance_scale`].
    pub guidance_scale: Option<f64>,
    /// Guidance while B is turned into noise.
    pub source_guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Edit-friendly inversion: the fraction of the schedule that is skipped at its noisy end.
    pub skip: f64,
    /// DDIM inversion: fixed-point iterations per step; 1 is the plain inversion.
    pub inversion_iterations: usize,
    /// SDEdit: how far B is noised, 0 to 1.
    pub sdedit_strength: f64,
    /// Stochasticity of the sampling steps: 0 is DDIM, 1 is DDPM.
    pub eta: f64,
    /// Scale of the difference tokens.
    pub strength: f64,
    /// Undo the difference instead: [P_B, −D̃].
    pub reverse: bool,
    /// What ordinary guidance moves away from.
    pub negative_prompt: String,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            inversion: Inversion::EditFriendly,
            guidance: Guidance::Difference,
            guidance_scale: None,
            source_guidance_scale: 1.0,
            num_inference_steps: 100,
            skip: 0.36,
            inversion_iterations: 1,
            sdedit_strength: 0.8,
            eta: 1.0,
            strength: 1.0,
            reverse: false,
            negative_prompt: String::new(),
            seed: 0,
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

/// Where the models of an analogy are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The diffusers pipeline folder.
    pub model: PathBuf,
    /// The joint space: a transformers `CLIPModel` folder; `<model>/clip` by default.
    pub clip: Option<PathBuf>,
    /// A transformers `Blip2ForConditionalGeneration` folder; `<model>/captioner` by default.
    pub captioner: Option<PathBuf>,
}
