//! Difference Inversion, in the order of the paper.
//!
//! | | |
//! |---|---|
//! | [`prompt`], [`pez`] | P_A, P_A′, P_B: captions, optimised prompts |
//! | [`delta`] | image delta, text delta, and their interpolation |
//! | [`difference`] | the difference tokens D̃ |
//! | [`loss`] | the token consistency loss and the CLIP loss |
//! | [`learn`](mod@learn) | the optimisation loop |
//! | [`regenerate`](mod@regenerate) | B′ from B's inverted noise under the Full Prompt |
//! | [`generate`](mod@generate), [`generate_config`] | drawing from words and D̃; settings |
//! | [`analogy`] | all of it, end to end |

pub mod analogy;
pub mod delta;
pub mod difference;
pub mod generate;
pub mod generate_config;
pub mod learn;
pub mod loss;
pub mod pez;
pub mod prompt;
pub mod regenerate;
