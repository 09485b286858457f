//! From a picture to the noise it is regenerated from.

use serde::{Deserialize, Serialize};

/// How B's latents become the start of B′.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inversion {
    /// Deterministic DDIM steps run backwards (Song et al. 2021).
    Ddim,
    /// Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024).
    #[default]
    EditFriendly,
    /// SDEdit (Meng et al. 2022): noise B up to a strength, then denoise.
    Sdedit,
}

/// What guidance moves away from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guidance {
    /// The negative prompt (empty by default), as in classifier-free guidance.
    Ordinary,
    /// B's own prompt, so that nothing but the difference is amplified.
    #[default]
    Difference,
}
