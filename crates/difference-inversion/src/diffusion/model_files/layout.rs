//! The layouts of Stable Diffusion's single-file checkpoints. Such a file has no configuration, so a layout
//! holds the `config.json` of diffusers' folders of the same models.

use serde_json::{Value, json};

use crate::diffusion::family::{self, Family, STABLE_DIFFUSION, STABLE_DIFFUSION_XL};
use crate::diffusion::model_files::original::{UNET, VAE};
use crate::weights::file::TensorFile;
use crate::{Error, Result};

/// How the tensors of a text encoder are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextLayout {
    /// As in transformers' `CLIPTextModel`.
    Transformers,
    /// As in OpenCLIP.
    OpenClip,
}

/// One text encoder of a [`Layout`].
#[derive(Debug, Clone, PartialEq)]
pub struct LayoutTextEncoder {
    /// The name of its folder in diffusers.
    pub network: &'static str,
    /// The prefix of its keys in the file.
    pub prefix: &'static str,
    /// The layout of the rest of its keys.
    pub layout: TextLayout,
    /// Its `config.json`.
    pub config: Value,
    /// Whether the file has a last layer and a projection that the family does not use.
    pub penultimate: bool,
    /// The token that pads its prompts, if it is not the vocabulary's own.
    pub pad_token: Option<&'static str>,
}

/// Checkpoints in the original layout with the same configuration of each network.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its name in messages.
    pub title: &'static str,
    /// The family of its models.
    pub family: &'static Family,
    /// The denoiser's `config.json`, except `in_channels`, which is read from the file.
    pub denoiser: Value,
    /// The autoencoder's `config.json`.
    pub vae: Value,
    /// The text encoders, in the order of the family's.
    pub text_encoders: Vec<LayoutTextEncoder>,
    /// `scheduler/scheduler_config.json`.
    pub scheduler: Value,
}

/// Channels of a U-Net that reads the latents of a picture to be edited next to the noisy ones
/// (InstructPix2Pix).
const EDITING: usize = 8;
/// Channels of a U-Net that reads a mask and the latents of the masked picture next to the noisy ones.
const INPAINTING: usize = 9;
/// Prefix of the keys of Stable Diffusion 2's text encoder.
const SD2_ENCODER: &str = "cond_stage_model.model.";
/// The same in the layout of SDXL's code.
const SGM_ENCODER: &str = "conditioner.embedders.0.model.";
/// Tokens of CLIP.
const VOCABULARY: usize = 49408;
/// Channels of the latents.
const LATENTS: usize = 4;
/// Channels that a U-Net may read.
const IN_CHANNELS: [usize; 3] = [LATENTS, EDITING, INPAINTING];
/// The U-Net's first convolution.
const CONV_IN: &str = "input_blocks.0.0.weight";

impl Layout {
    /// Whether another layout differs only in the prediction type: Stable Diffusion 2's.
    pub(crate) fn has_twin(&self) -> bool {
        self.context_dim() == 1024
    }

    /// Names of all layouts, as [`by_name`](Self::by_name) knows them.
    pub fn names() -> Vec<&'static str> {
        family::layouts().map(|layout| layout.name).collect()
    }

    /// The layout of this name.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is none.
    pub fn by_name(name: &str) -> Result<Self> {
        let found = family::layouts().find(|layout| layout.name == name);
        found.ok_or_else(|| Error::Setting {
            name: "family",
            expected: Self::names().join(", "),
            found: name.to_owned(),
        })
    }

    /// Stable Diffusion 1, as configured in `stable-diffusion-v1-5/stable-diffusion-v1-5`; 1.1 to
    /// 1.4 have the same.
    #[must_use]
    pub fn sd1() -> Self {
        Self {
            name: "sd1",
            title: "Stable Diffusion 1",
            family: &STABLE_DIFFUSION,
            denoiser: json!({
                "sample_size": 64,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": [
                    "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                    "DownBlock2D",
                ],
                "up_block_types": [
                    "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
                ],
                "layers_per_block": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 768,
            }),
            vae: vae(512, 0.18215),
            text_encoders: vec![LayoutTextEncoder {
                network: "text_encoder",
                prefix: "cond_stage_model.transformer.",
                layout: TextLayout::Transformers,
                config: clip_vit_l(),
                penultimate: false,
                pad_token: None,
            }],
            scheduler: scheduler("PNDMScheduler", "epsilon"),
        }
    }

    /// Stable Diffusion 2 for pictures of 512 pixels, as configured in
    /// `stabilityai/stable-diffusion-2-base`; 2.1-base has the same.
    #[must_use]
    pub fn sd2_base() -> Self {
        let mut layout = Self::sd2();
        layout.name = "sd2-base";
        layout.title = "Stable Diffusion 2 (base)";
        layout.denoiser["sample_size"] = json!(64);
        layout.vae = vae(512, 0.18215);
        layout.scheduler = scheduler("PNDMScheduler", "epsilon");
        layout
    }

    /// Stable Diffusion 2 for pictures of 768 pixels, as configured in
    /// `stabilityai/stable-diffusion-2-1`; 2.0 has the same. Its text encoder is OpenCLIP's ViT-H-14
    /// without the last layer.
    #[must_use]
    pub fn sd2() -> Self {
        let sd1 = Self::sd1();
        let mut unet = sd1.denoiser;
        unet["sample_size"] = json!(96);
        unet["attention_head_dim"] = json!([5, 10, 20, 20]);
        unet["cross_attention_dim"] = json!(1024);
        unet["use_linear_projection"] = json!(true);
        unet["upcast_attention"] = json!(true);
        Self {
            name: "sd2",
            title: "Stable Diffusion 2",
            family: sd1.family,
            denoiser: unet,
            vae: vae(768, 0.18215),
            text_encoders: vec![LayoutTextEncoder {
                network: "text_encoder",
                prefix: SD2_ENCODER,
                layout: TextLayout::OpenClip,
                config: open_clip(1024, 23, 16),
                penultimate: true,
                pad_token: Some("!"),
            }],
            scheduler: scheduler("DDIMScheduler", "v_prediction"),
        }
    }

    /// Stable Diffusion XL, as configured in `stabilityai/stable-diffusion-xl-base-1.0`: CLIP's
    /// ViT-L/14 and OpenCLIP's ViT-bigG-14 read the prompt.
    #[must_use]
    pub fn sdxl() -> Self {
        Self {
            name: "sdxl",
            title: "Stable Diffusion XL",
            family: &STABLE_DIFFUSION_XL,
            denoiser: json!({
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": [
                    "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                ],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 2,
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048,
                "use_linear_projection": true,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            }),
            vae: vae(1024, 0.13025),
            text_encoders: vec![
                LayoutTextEncoder {
                    network: "text_encoder",
                    prefix: "conditioner.embedders.0.transformer.",
                    layout: TextLayout::Transformers,
                    config: clip_vit_l(),
                    penultimate: false,
                    pad_token: None,
                },
                LayoutTextEncoder {
                    network: "text_encoder_2",
                    prefix: "conditioner.embedders.1.model.",
                    layout: TextLayout::OpenClip,
                    config: open_clip(1280, 32, 20),
                    penultimate: false,
                    pad_token: Some("!"),
                },
            ],
            scheduler: scheduler("EulerDiscreteScheduler", "epsilon"),
        }
    }

    /// The width of the prompt's hidden states.
    fn context_dim(&self) -> usize {
        number(&self.denoiser["cross_attention_dim"])
    }

    pub(crate) fn layers_per_block(&self) -> usize {
        number(&self.denoiser["layers_per_block"])
    }

    pub(crate) fn vae_levels(&self) -> usize {
        self.vae["block_out_channels"]
            .as_array()
            .map_or(0, Vec::len)
    }

    /// Whether the file's tensor `key` belongs to an unused part of a text encoder.
    pub(crate) fn leaves_out(&self, key: &str) -> bool {
        self.text_encoders.iter().any(|encoder| {
            let Some(key) = key.strip_prefix(encoder.prefix) else {
                return false;
            };
            match encoder.layout {
                TextLayout::Transformers => {
                    let parts = ["vision_model.", "visual_projection."];
                    key == "text_projection.weight"
                        || parts.iter().any(|part| key.starts_with(part))
                }
                TextLayout::OpenClip => {
                    let layers = number(&encoder.config["num_hidden_layers"]);
                    let last = format!("transformer.resblocks.{layers}.");
                    let unused = ["text_projection", "text_projection.weight"].contains(&key)
                        || key.starts_with(&last);
                    encoder.penultimate && unused
                }
            }
        })
    }

    /// Recognises the family of a file by its keys and shapes. Stable Diffusion 2 with and without
    /// velocity look the same: `predicts_noise` distinguishes them, and so does the fact that its inpainting
    /// model (`stabilityai/stable-diffusion-2-inpainting`) was made from the base model.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it is of no known family, stating what it appears to be.
    pub(crate) fn recognise(file: &TensorFile, predicts_noise: bool) -> Result<Self> {
        let width = context_dim(file)?;
        let inpaints = in_channels(file) == Some(INPAINTING);
        match width {
            768 => Ok(Self::sd1()),
            1024 if predicts_noise || inpaints => Ok(Self::sd2_base()),
            1024 => Ok(Self::sd2()),
            2048 if is_distilled(file) => {
                let reason = "SSD-1B or Segmind-Vega as one file, which is not read: take its diffusers folder, such as \
                              segmind/SSD-1B";
                Err(Error::invalid_file(file.path(), reason))
            }
            2048 => Ok(Self::sdxl()),
            _ => {
                let note = if width == 1280 {
                    ", the refiner of SDXL"
                } else {
                    ""
                };
                let reason = format!(
                    "a checkpoint of a family that is not supported{note}: its U-Net reads prompts \
                     of width {width}; that of Stable Diffusion 1 reads 768, of 2 reads 1024, of XL \
                     reads 2048"
                );
                Err(Error::invalid_file(file.path(), reason))
            }
        }
    }

    /// Checks that the file is of this family, and adopts the number of channels that its U-Net reads.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is of another, [`Error::InvalidFile`] if a network is missing.
    pub(crate) fn adapt_to(mut self, file: &TensorFile) -> Result<Self> {
        let (expected, found) = (self.context_dim(), context_dim(file)?);
        if expected != found {
            return Err(Error::Setting {
                name: "family",
                expected: format!(
                    "the family of {}, whose U-Net reads prompts of width {found}",
                    file.path().display()
                ),
                found: format!("{}, which reads {expected}", self.name),
            });
        }
        let names = file.names();
        let missing = |prefix: &str| !names.iter().any(|name| name.starts_with(prefix));
        // Some of Stable Diffusion 2, such as SD-Turbo, come in the layout of SDXL's code.
        for encoder in &mut self.text_encoders {
            if encoder.prefix == SD2_ENCODER && missing(SD2_ENCODER) && !missing(SGM_ENCODER) {
                encoder.prefix = SGM_ENCODER;
            }
        }
        let encoders = self.text_encoders.iter();
        let parts = encoders.map(|encoder| ("text encoder", encoder.prefix));
        for (part, prefix) in parts.chain([("autoencoder", VAE)]) {
            if missing(prefix) {
                let reason = format!(
                    "no {part}: a checkpoint of {} has tensors named `{prefix}…`, this file has \
                     none",
                    self.title
                );
                return Err(Error::invalid_file(file.path(), reason));
            }
        }
        for encoder in &mut self.text_encoders {
            let table = match encoder.layout {
                TextLayout::Transformers => "text_model.embeddings.token_embedding.weight",
                TextLayout::OpenClip => "token_embedding.weight",
            };
            // Fine-tunings that learned words have more rows.
            if let Some((_, &[rows, _])) = file.info(&format!("{}{table}", encoder.prefix))
                && rows > VOCABULARY
            {
                encoder.config["vocab_size"] = json!(rows);
            }
        }
        let channels = match in_channels(file) {
            Some(channels) if IN_CHANNELS.contains(&channels) => channels,
            _ => {
                return Err(Error::Tensor {
                    path: file.path().to_owned(),
                    name: format!("{UNET}{CONV_IN}"),
                    expected: "a convolution of 4, 8 or 9 channels".to_owned(),
                    found: match file.info(&format!("{UNET}{CONV_IN}")) {
                        Some((_, shape)) => format!("shape {shape:?}"),
                        None => "no such tensor".to_owned(),
                    },
                });
            }
        };
        self.family = self.family.with_channels(channels, LATENTS);
        self.denoiser["in_channels"] = json!(channels);
        Ok(self)
    }
}

/// Whether the U-Net of SDXL lacks layers, as models distilled from it do.
fn is_distilled(file: &TensorFile) -> bool {
    let has = |layer: usize| {
        let block = format!("{UNET}input_blocks.8.1.transformer_blocks.{layer}.norm1.weight");
        file.info(&block).is_some()
    };
    has(0) && !has(9)
}

/// The number of channels that the U-Net in `file` reads.
fn in_channels(file: &TensorFile) -> Option<usize> {
    match file.info(&format!("{UNET}{CONV_IN}"))? {
        (_, &[_, channels, _, _]) => Some(channels),
        _ => None,
    }
}

/// The width of the prompts that the U-Net in `file` reads.
fn context_dim(file: &TensorFile) -> Result<usize> {
    let mut names = file.names();
    names.sort();
    let of_unet = names.iter().filter(|name| name.starts_with(UNET));
    let key = of_unet
        .into_iter()
        .find(|name| name.ends_with(".attn2.to_k.weight"));
    if let Some((_, &[_, width])) = key.and_then(|key| file.info(key)) {
        return Ok(width);
    }
    if let Some(family) = family::of_original(&names) {
        let known: Vec<&str> = family.models.iter().map(|model| model.name).collect();
        let reason = format!(
            "the transformer of a {}, not a whole model: give it with `--transformer`, and with `--model` its \
             diffusers folder, such as {}",
            family.class,
            known.join(" or ")
        );
        return Err(Error::invalid_file(file.path(), reason));
    }
    let starts_with = |start: &str| names.iter().any(|name| name.starts_with(start));
    let what = if starts_with("model_ema.") {
        "a checkpoint of averaged weights (EMA) only, without the weights themselves: take the pruned one, or convert \
         it with diffusers (`convert_original_stable_diffusion_to_diffusers.py --extract_ema`)"
    } else if starts_with("lora_") || names.iter().any(|name| name.contains(".lora")) {
        "a LoRA, not a whole model: give it with `--lora`, and its model with `--model`"
    } else if starts_with("down_blocks.") || starts_with("decoder.") || starts_with("text_model.") {
        "one network of a diffusers folder: name the folder that its model_index.json is in"
    } else {
        "not a checkpoint of Stable Diffusion in its original layout"
    };
    let reason =
        format!("{what} (there is no tensor `{UNET}…attn2.to_k.weight`, which tells its family)");
    Err(Error::invalid_file(file.path(), reason))
}

fn number(value: &Value) -> usize {
    value
        .as_u64()
        .and_then(|value| usize::try_from(value).ok())
        .unwrap_or_default()
}

/// The autoencoder of all families; they differ in the scale of the latents.
fn vae(sample_size: usize, scaling_factor: f64) -> Value {
    json!({
        "sample_size": sample_size,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": scaling_factor,
        "force_upcast": true, // diffusers' default, and what SDXL's says
    })
}

/// The text tower of `openai/clip-vit-large-patch14`.
fn clip_vit_l() -> Value {
    json!({
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    })
}

/// The text tower of an OpenCLIP, as transformers configures it.
fn open_clip(hidden_size: usize, num_hidden_layers: usize, num_attention_heads: usize) -> Value {
    json!({
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    })
}

/// The noise schedule of all families.
fn scheduler(class_name: &str, prediction_type: &str) -> Value {
    json!({
        "_class_name": class_name,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": false,
        "set_alpha_to_one": false,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": prediction_type,
    })
}
