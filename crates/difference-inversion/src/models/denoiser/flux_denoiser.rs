//! The transformer as the denoiser of FLUX.1.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::Result;
use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::flux::{FluxConfig, FluxTransformer2DModel, Told};
use crate::models::denoiser::flux_trunk::PATCH;
use crate::models::denoiser::{
    Denoiser, DenoiserConfig, FLOAT, GuidedBy, How, KERNELS, Memory, Surroundings, check_numbers,
};
use crate::util::tensors::fingerprint;
use crate::weights::{Weights, from_value};

/// The network's folder in diffusers' layout.
pub const PART: &str = "transformer";

/// The usual guidance scale, as in diffusers' pipeline.
const GUIDANCE: f64 = 3.5;

/// Default height and width of the latents: the configuration has none.
const SIDE: u64 = 128;

/// The number of T5's tokens for a prompt, for a network with embedded guidance and for one without
/// it.
const T5_LENGTHS: [usize; 2] = [512, 256];

/// Opens the configuration of the transformer.
///
/// # Errors
/// If the file is invalid.
pub fn open(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    let transformer = from_value(config, path)?;
    Ok(Box::new(Config {
        t5_length: length_of(&transformer),
        transformer,
        path: path.to_owned(),
    }))
}

/// The number of T5's tokens for a prompt: 512, or 256 for schnell, which has no embedded
/// guidance.
///
/// # Errors
/// If the transformer's configuration is invalid.
pub fn t5_length(config: Value, path: &Path) -> Result<usize> {
    Ok(length_of(&from_value(config, path)?))
}

fn length_of(config: &FluxConfig) -> usize {
    let [told, not] = T5_LENGTHS;
    if config.guidance_embeds { told } else { not }
}

/// The transformer in its pipeline.
#[derive(Debug)]
struct Transformer(FluxTransformer2DModel);

impl Denoiser for Transformer {
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        let options = (&latents.device().without_autodiff(), DType::F32);
        #[expect(clippy::expect_used, reason = "documented under Panics")]
        let pooled = conditions.pooled.clone().expect("a pooled prompt");
        let told = Told {
            timesteps: Tensor::<1>::from_data(times, options),
            guidance: how.guidance,
            pooled,
        };
        let context = conditions.context.clone();
        self.0.forward(latents, context, told, how.memory)
    }

    fn multiple(&self) -> usize {
        PATCH
    }

    fn guided_by(&self) -> GuidedBy {
        match self.0.config().guidance_embeds {
            true => GuidedBy::Embedding { usual: GUIDANCE },
            false => GuidedBy::Nothing,
        }
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.0.telling_weights())
    }
}

/// `transformer/config.json` in its pipeline.
struct Config {
    transformer: FluxConfig,
    t5_length: usize,
    /// The file, for errors.
    path: PathBuf,
}

impl DenoiserConfig for Config {
    fn trained_on(&self) -> Option<[u64; 2]> {
        Some([SIDE; 2])
    }

    fn in_channels(&self) -> usize {
        self.transformer.trunk.in_channels / (PATCH * PATCH)
    }

    fn set_max_sequence_length(&mut self, length: usize) {
        self.t5_length = length;
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        let network = &self.transformer;
        network.check(&self.path)?;
        let [clip, t5] = [0, 1].map(|number| around.encoder_widths.get(number).copied());
        network.trunk.check_around(&self.path, around, t5)?;
        let width = network.pooled_projection_dim;
        let numbers = [("pooled_projection_dim", width, clip, "the width of CLIP")];
        check_numbers(&self.path, numbers)
    }

    fn load(&self, weights: &Weights, _: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        let network = FluxTransformer2DModel::load(weights, &self.transformer)?;
        Ok(Arc::new(Transformer(network)))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.transformer.check(&self.path)?;
        let numbers = (self.transformer.trunk).step_numbers(rows, latents, self.t5_length, memory);
        Ok((numbers * FLOAT + KERNELS) as u64)
    }
}
