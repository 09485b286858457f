//! The U-Net as the denoiser of Stable Diffusion 1, 2 and XL.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use serde_json::Value;

use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::unet::{AddedConditions, UNet2DConditionModel, UNetConfig};
use crate::models::denoiser::{Denoiser, DenoiserConfig, GuidedBy, How, Memory, Surroundings};
use crate::util::tensors::fingerprint;
use crate::weights::Weights;
use crate::weights::from_value;
use crate::{Error, Result};

/// The network's folder in diffusers' layout.
pub const PART: &str = "unet";

/// The usual guidance scale of a latent consistency model that is told it, as in diffusers' pipeline.
const GUIDANCE: f64 = 8.5;

/// Length of [`time_ids`].
const TIME_IDS: usize = 6;

/// Opens the configuration of a U-Net that reads only a prompt.
///
/// # Errors
/// If the file is invalid.
pub fn open(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Config::open(config, path, false)
}

/// Opens the configuration of SDXL's U-Net, which also receives a pooled prompt and sizes.
///
/// # Errors
/// If the file is invalid.
pub fn open_xl(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Config::open(config, path, true)
}

/// SDXL's sizes for a picture that was never cropped: original height and width, crop top and left, target
/// height and width.
pub fn time_ids([height, width]: [usize; 2]) -> [f32; TIME_IDS] {
    let [height, width] = [height, width].map(|side| side as f32);
    [height, width, 0.0, 0.0, height, width]
}

/// A U-Net in its pipeline.
#[derive(Debug)]
struct UNet {
    network: UNet2DConditionModel,
    /// Pixels for each side of a latent pixel.
    pixels: usize,
}

impl Denoiser for UNet {
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        how: How<'_>,
    ) -> Tensor<4> {
        let [b, _, h, w] = latents.dims();
        let options = (&latents.device().without_autodiff(), DType::F32);
        let added = conditions.pooled.as_ref().map(|pooled| AddedConditions {
            text_embeds: pooled.clone(),
            time_ids: Tensor::from_data([time_ids([h, w].map(|side| side * self.pixels))], options)
                .repeat_dim(0, b),
        });
        let sample = match &conditions.image {
            Some(image) => Tensor::cat(vec![latents, image.clone()], 1), // [b, in_channels, h, w]
            None => latents,
        };
        let timesteps = Tensor::<1>::from_data(times, options);
        let context = conditions.context.clone();
        (self.network).forward_with(sample, timesteps, context, added.as_ref(), how)
    }

    fn multiple(&self) -> usize {
        self.network.config().downsampling_factor()
    }

    fn guided_by(&self) -> GuidedBy {
        match self.network.config().time_cond_proj_dim {
            Some(_) => GuidedBy::Embedding { usual: GUIDANCE },
            None => GuidedBy::Reference,
        }
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.network.telling_weights())
    }

    fn attention_layers(&self) -> usize {
        self.network.transformer_blocks()
    }
}

/// Whether a version of diffusers is older than 0.9.
fn is_before_0_9(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    matches!((numbers.next(), numbers.next()), (Some(Some(0)), Some(Some(minor))) if minor < 9)
}

/// `unet/config.json` in its pipeline.
struct Config {
    unet: UNetConfig,
    /// The file, for errors.
    path: PathBuf,
    /// Whether the pipeline gives it a pooled prompt and sizes.
    added: bool,
}

impl Config {
    fn open(config: Value, path: &Path, added: bool) -> Result<Box<dyn DenoiserConfig>> {
        Ok(Box::new(Self {
            unet: from_value(config, path)?,
            path: path.to_owned(),
            added,
        }))
    }

    /// The side of the latents, corrected: Stable Diffusion 1 was first configured with 32 instead of 64, which
    /// diffusers' pipeline corrects, too.
    fn corrected(&self, sample_size: u64) -> u64 {
        let version = self.unet.other.get("_diffusers_version");
        let outdated = version.and_then(Value::as_str).is_some_and(is_before_0_9);
        match outdated && !self.added {
            true => sample_size.max(64),
            false => sample_size,
        }
    }

    /// Checks SDXL's pooled prompt and `time_ids`.
    fn check_added(&self, pooled: Option<usize>) -> Result<()> {
        let Some(pooled) = pooled else {
            let reason = "the second text encoder has no `text_projection`, which SDXL needs";
            return Err(Error::WrongBase {
                reason: reason.to_owned(),
            });
        };
        if !self.unet.needs_added_conditions() {
            let found = &self.unet.addition_embed_type;
            return self.wrong("addition_embed_type", "text_time", found);
        }
        let field = "projection_class_embeddings_input_dim";
        let sizes = TIME_IDS * self.unet.addition_time_embed_dim.unwrap_or(0);
        match self.unet.projection_class_embeddings_input_dim {
            Some(width) if width == pooled + sizes => Ok(()),
            found => {
                let expected = format!(
                    "{}: {pooled} of the pooled prompt and {sizes} of the sizes",
                    pooled + sizes
                );
                self.wrong(field, &expected, found)
            }
        }
    }

    fn wrong(&self, field: &str, expected: &str, found: impl std::fmt::Debug) -> Result<()> {
        Err(Error::unsupported(&self.path, field, expected, found))
    }
}

impl DenoiserConfig for Config {
    fn trained_on(&self) -> Option<[u64; 2]> {
        let size = self.unet.other.get("sample_size")?;
        match size.as_array() {
            Some(sides) => Some([sides.first()?.as_u64()?, sides.get(1)?.as_u64()?]),
            None => Some([self.corrected(size.as_u64()?); 2]),
        }
    }

    fn in_channels(&self) -> usize {
        self.unet.in_channels
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        let width: usize = around.encoder_widths.iter().sum();
        if width != self.unet.context_dim() {
            let expected = format!("{width}, the width of the text encoders");
            return self.wrong("cross_attention_dim", &expected, self.unet.context_dim());
        }
        let latents = around.latent_channels;
        let in_channels = latents + around.image_channels;
        for (field, found, expected) in [
            ("in_channels", self.unet.in_channels, in_channels),
            ("out_channels", self.unet.out_channels, latents),
        ] {
            if found != expected {
                let expected = format!("{expected}, as a {} has", around.class);
                return self.wrong(field, &expected, found);
            }
        }
        let by_picture = around.image_channels == latents;
        if let Some(width) = self.unet.time_cond_proj_dim.filter(|_| by_picture) {
            let expected = format!("null, since a {} is guided by a picture", around.class);
            return self.wrong("time_cond_proj_dim", &expected, width);
        }
        match self.added {
            true => self.check_added(around.projections.last().copied().flatten()),
            false if self.unet.needs_added_conditions() => self.wrong(
                "addition_embed_type",
                &format!("null, as a {} has", around.class),
                &self.unet.addition_embed_type,
            ),
            false => Ok(()),
        }
    }

    fn load(&self, weights: &Weights, around: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        Ok(Arc::new(UNet {
            network: UNet2DConditionModel::load(weights, &self.unet)?,
            pixels: around.pixels,
        }))
    }

    fn step_bytes(&self, rows: usize, latents: [usize; 2], memory: Memory) -> Result<u64> {
        self.unet.step_bytes(&self.path, rows, latents, memory)
    }
}
