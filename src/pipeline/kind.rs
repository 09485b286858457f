//! `model_index.json`: what kind of pipeline it is.

use serde::Deserialize;

use crate::weights::{MODEL_INDEX, ModelFiles};
use crate::{Error, Result};

/// A kind of pipeline, named after diffusers' class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelineKind {
    /// Stable Diffusion 1 and 2: a prompt, read by one text encoder.
    StableDiffusion,
    /// SDXL: a prompt, read by two text encoders.
    StableDiffusionXl,
    /// InstructPix2Pix: an instruction and the picture that it changes.
    InstructPix2Pix,
    /// Inpainting: a prompt, a picture, and a mask of what is drawn anew.
    Inpaint,
}

impl PipelineKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::StableDiffusion,
        Self::StableDiffusionXl,
        Self::InstructPix2Pix,
        Self::Inpaint,
    ];

    /// The kind of a model that was not loaded.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is no `model_index.json`, [`Error::Config`] if its class is
    /// none of [`ALL`](Self::ALL).
    pub fn of(files: &ModelFiles) -> Result<Self> {
        Ok(ModelIndex::open(files)?.kind)
    }

    /// The kind that a class of diffusers stands for.
    pub(crate) fn of_class(class_name: &str) -> Option<Self> {
        (Self::ALL.into_iter()).find(|kind| kind.class_name() == class_name)
    }

    /// The classes there are, for errors.
    pub(crate) fn known() -> String {
        Self::ALL.map(Self::class_name).join(" or ")
    }

    /// The name of diffusers' class.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::StableDiffusion => "StableDiffusionPipeline",
            Self::StableDiffusionXl => "StableDiffusionXLPipeline",
            Self::InstructPix2Pix => "StableDiffusionInstructPix2PixPipeline",
            Self::Inpaint => "StableDiffusionInpaintPipeline",
        }
    }

    /// The names of its text encoders, in the order the U-Net reads them.
    pub fn text_encoders(self) -> &'static [&'static str] {
        match self {
            Self::StableDiffusionXl => &["text_encoder", "text_encoder_2"],
            _ => &["text_encoder"],
        }
    }

    /// Whether a picture stands beside the prompt.
    pub fn takes_picture(self) -> bool {
        matches!(self, Self::InstructPix2Pix | Self::Inpaint)
    }

    /// Checks that nothing stands beside the prompt, as difference tokens are learned and applied.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if a picture does.
    pub fn check_words_alone(self) -> Result<()> {
        match self.takes_picture() {
            false => Ok(()),
            true => Err(Error::invalid_input(format!(
                "a {} draws from a picture and words: a difference is learned and applied with a \
                 model that draws from words alone, a {} or a {}",
                self.class_name(),
                Self::StableDiffusion.class_name(),
                Self::StableDiffusionXl.class_name(),
            ))),
        }
    }

    /// Whether a mask stands beside the picture.
    pub fn takes_mask(self) -> bool {
        self == Self::Inpaint
    }

    /// Whether guidance has a scale for the picture, too.
    pub fn has_image_guidance(self) -> bool {
        self == Self::InstructPix2Pix
    }

    /// The kind that the same model is with a U-Net of `in_channels` input channels, which takes
    /// what it has channels for; this kind if no other fits.
    pub(super) fn with_unet(self, in_channels: usize, latents: usize) -> Self {
        let mut others = Self::ALL.into_iter().filter(|other| {
            other.text_encoders() == self.text_encoders()
                && other.in_channels(latents) == in_channels
        });
        others.next().unwrap_or(self)
    }

    /// Channels of the U-Net's input, for latents of `latents` channels.
    pub(super) fn in_channels(self, latents: usize) -> usize {
        let picture = if self.takes_picture() { latents } else { 0 };
        latents + picture + usize::from(self.takes_mask())
    }
}

/// What `model_index.json` says beyond the names of its parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelIndex {
    pub(super) kind: PipelineKind,
    /// Whether the conditions of an absent negative prompt are zeros.
    pub(super) force_zeros_for_empty_prompt: bool,
}

impl ModelIndex {
    /// Reads the `model_index.json` of a pipeline, or what stands for it in a single file.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is none, [`Error::Config`] for a class that is not one of
    /// [`PipelineKind::ALL`].
    pub(super) fn open(files: &ModelFiles) -> Result<Self> {
        #[derive(Deserialize)]
        struct Fields {
            #[serde(rename = "_class_name")]
            class_name: String,
            force_zeros_for_empty_prompt: Option<bool>,
        }
        let fields: Fields = files.config(MODEL_INDEX)?;
        let Some(kind) = PipelineKind::of_class(&fields.class_name) else {
            return Err(Error::unsupported(
                &files.config_path(MODEL_INDEX),
                "_class_name",
                &PipelineKind::known(),
                fields.class_name,
            ));
        };
        // diffusers' default where the file is silent.
        let default = kind == PipelineKind::StableDiffusionXl;
        Ok(Self {
            kind,
            force_zeros_for_empty_prompt: fields.force_zeros_for_empty_prompt.unwrap_or(default),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::FileOptions;

    fn open(json: &str) -> Result<ModelIndex> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MODEL_INDEX), json).unwrap();
        ModelIndex::open(&ModelFiles::open(folder.path(), &FileOptions::default())?)
    }

    #[test]
    fn the_class_decides_the_kind() {
        for kind in PipelineKind::ALL {
            let index = open(&format!(r#"{{"_class_name": "{}"}}"#, kind.class_name())).unwrap();
            assert_eq!(index.kind, kind);
        }
        let refiner = r#"{"_class_name": "StableDiffusionXLImg2ImgPipeline", "unet": []}"#;
        let message = open(refiner).unwrap_err().to_string();
        assert!(message.contains("field `_class_name`"), "{message}");
        assert!(message.contains("StableDiffusionXLPipeline"), "{message}");
        assert!(
            message.contains("StableDiffusionXLImg2ImgPipeline"),
            "{message}"
        );
    }

    #[test]
    fn only_sdxl_has_zeros_for_an_absent_negative_prompt() {
        let zeros = |json| open(json).unwrap().force_zeros_for_empty_prompt;
        assert!(zeros(r#"{"_class_name": "StableDiffusionXLPipeline"}"#));
        assert!(!zeros(
            r#"{"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": false}"#
        ));
        assert!(!zeros(r#"{"_class_name": "StableDiffusionPipeline"}"#));
    }

    #[test]
    fn a_folder_without_index_is_no_pipeline() {
        let folder = tempfile::tempdir().unwrap();
        let files = ModelFiles::open(folder.path(), &FileOptions::default()).unwrap();
        let message = ModelIndex::open(&files).unwrap_err().to_string();
        assert!(message.contains("no model_index.json"), "{message}");
    }
}
