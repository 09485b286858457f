//! The transformer as the denoiser of Chroma.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::Result;
use crate::models::denoiser::chroma::{ChromaConfig, ChromaTransformer2DModel};
use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::flux_trunk::PATCH;
use crate::models::denoiser::{
    Denoiser, DenoiserConfig, FLOAT, How, KERNELS, Memory, Surroundings,
};
use crate::util::tensors::fingerprint;
use crate::weights::{Weights, from_value};

/// The network's folder in diffusers' layout.
pub const PART: &str = "transformer";

/// Height and width of the latents that it draws by default: its configuration does not state any.
const SIDE: u64 = 128;

/// The most tokens of a prompt.
pub const LENGTH: usize = 512;

/// Opens the configuration of the transformer.
///
/// # Errors
/// If the file is invalid.
pub fn open(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Ok(Box::new(Config {
        transformer: from_value(config, path)?,
        path: path.to_owned(),
    }))
}

/// The transformer in its pipeline.
#[derive(Debug)]
struct Transformer(ChromaTransformer2DModel);

impl Denoiser for Transformer {
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        let options = (&latents.device().without_autodiff(), DType::F32);
        let times = Tensor::<1>::from_data(times, options);
        let (context, presence) = (conditions.context.clone(), &conditions.presence);
        self.0
            .forward(latents, times, context, presence, how.memory)
    }

    fn multiple(&self) -> usize {
        PATCH
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.0.telling_weights())
    }
}

/// `transformer/config.json` in its pipeline.
struct Config {
    transformer: ChromaConfig,
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

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        self.transformer.check(&self.path)?;
        let t5 = around.encoder_widths.first().copied();
        (self.transformer.trunk).check_around(&self.path, around, t5)
    }

    fn load(&self, weights: &Weights, _: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        let network = ChromaTransformer2DModel::load(weights, &self.transformer)?;
        Ok(Arc::new(Transformer(network)))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.transformer.check(&self.path)?;
        let trunk = &self.transformer.trunk;
        let network = trunk.step_numbers(rows, latents, PROMPT, memory);
        let text = rows * PROMPT * trunk.joint_attention_dim * TEXT;
        Ok(((network + text) * FLOAT + KERNELS) as u64)
    }
}

/// Tokens of a prompt of some sentences.
const PROMPT: usize = 128;
/// Tensors of `tokens × width` that T5's layers keep, counted and not measured: 24 layers, and in each what is normalised,
/// queries, keys, values, what is attended to, both sums, and the two and a half times wider inside of the network four times.
const TEXT: usize = 24 * 18;
