//! The words that describe a picture: captions, optimised prompts, and the Full Prompt.

use serde::{Deserialize, Serialize};

/// Where a picture's prompt comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptMode {
    /// The caption, written by the captioner or given by the user.
    #[default]
    Caption,
    /// Words found by PEZ for the picture, without the caption.
    Optimised,
    /// The caption followed by words found by PEZ.
    #[serde(rename = "caption+optimised")]
    CaptionOptimised,
    /// The user's own text only: nothing is captioned, a missing text is an error.
    Text,
}

/// How prompts are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    /// Where prompts come from.
    pub prompt_mode: PromptMode,
    /// Number of words (vocabulary entries) PEZ looks for.
    pub pez_tokens: usize,
    /// PEZ's optimisation steps.
    pub pez_steps: usize,
    /// PEZ's AdamW learning rate.
    pub pez_learning_rate: f64,
    /// PEZ's AdamW weight decay.
    pub pez_weight_decay: f64,
    /// Seed of PEZ's starting words.
    pub seed: u64,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            prompt_mode: PromptMode::Caption,
            pez_tokens: 10,
            pez_steps: 200,
            pez_learning_rate: 0.1,
            pez_weight_decay: 0.1,
            seed: 0,
        }
    }
}
