//! The transformer as the denoiser of Z-Image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::Result;
use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::z_image::{ZImageConfig, ZImageTransformer2DModel};
use crate::models::denoiser::{
    Denoiser, DenoiserConfig, FLOAT, How, KERNELS, Memory, Surroundings, check_numbers,
};
use crate::util::tensors::fingerprint;
use crate::weights::{Weights, from_value};

/// The network's folder in diffusers' layout.
pub const PART: &str = "transformer";

/// Height and width of the latents that it draws by default: its configuration says none.
const SIDE: u64 = 128;

/// The most tokens of a prompt in its template.
pub const LENGTH: usize = 512;

/// Steps of training.
const TRAINING: f64 = 1000.0;

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
struct Transformer(ZImageTransformer2DModel);

impl Denoiser for Transformer {
    /// The network counts time from noise to picture and predicts x₀ − ε: both are reversed here.
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        let times: Vec<f64> = times.iter().map(|t| (TRAINING - t) / TRAINING).collect();
        let options = (&latents.device().without_autodiff(), DType::F32);
        let times = Tensor::<1>::from_data(times.as_slice(), options);
        let (context, presence) = (conditions.context.clone(), &conditions.presence);
        self.0
            .forward(latents, times, context, presence, how.memory)
            .neg()
    }

    fn multiple(&self) -> usize {
        2
    }

    fn largest(&self) -> Option<usize> {
        Some(self.0.config().largest())
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.0.telling_weights())
    }
}

/// `transformer/config.json` in its pipeline.
struct Config {
    transformer: ZImageConfig,
    /// The file, for errors.
    path: PathBuf,
}

impl DenoiserConfig for Config {
    fn trained_on(&self) -> Option<[u64; 2]> {
        Some([SIDE; 2])
    }

    fn in_channels(&self) -> usize {
        self.transformer.in_channels
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        self.transformer.check(&self.path)?;
        let (latents, qwen) = (around.latent_channels, around.encoder_widths.first());
        let numbers = [
            (
                "in_channels",
                self.transformer.in_channels,
                Some(latents),
                "the channels of the latents",
            ),
            (
                "cap_feat_dim",
                self.transformer.cap_feat_dim,
                qwen.copied(),
                "the width of Qwen3",
            ),
        ];
        check_numbers(&self.path, numbers)
    }

    fn load(&self, weights: &Weights, _: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        let network = ZImageTransformer2DModel::load(weights, &self.transformer)?;
        Ok(Arc::new(Transformer(network)))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.transformer.check(&self.path)?;
        Ok(self.transformer.step_bytes(rows, latents, memory))
    }
}

/// Tensors of `tokens × width` that a block keeps, counted from its layers and not measured: queries, keys
/// and values before and after they are normalised and turned, both halves between their norms, scaled and
/// gated, and four times the 8/3 times wider inside of the network.
const BLOCK: usize = 31;
/// Such tensors that are held besides at the same time, in the backward pass.
const AT_WORK: usize = 14;
/// Tokens of a prompt of some sentences, in its template and padded.
const PROMPT: usize = 128;
/// Layers of Qwen3, whose inputs are kept, and what computing one of them once more takes besides.
const TEXT: usize = 36 + 30;

impl ZImageConfig {
    /// About how many bytes of activations an optimisation step on the CPU holds at its peak, if
    /// `rows` latents of `height` and `width` go through the network at once, the text encoder's among them.
    fn step_bytes(&self, rows: usize, [height, width]: [usize; 2], memory: Memory) -> u64 {
        let numbers = rows * (height * width / 4 + PROMPT) * self.dim;
        let blocks = self.n_layers + self.n_refiner_layers;
        let kept = match memory {
            Memory::Normal => blocks * BLOCK,
            Memory::Low => blocks + BLOCK,
        };
        let text = rows * PROMPT * self.cap_feat_dim * TEXT;
        (((kept + AT_WORK) * numbers + text) * FLOAT + KERNELS) as u64
    }
}
