//! `model_index.json`, which names a model's family.

use serde::Deserialize;
use serde_json::Value;

use crate::diffusion::family::{self, Family};
use crate::diffusion::model_files::{MODEL_INDEX, ModelFiles};
use crate::models::denoiser::unet_denoiser::PART as UNET;
use crate::weights::from_value;
use crate::{Error, Result};

impl Family {
    /// The family of a model that is not loaded.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is no `model_index.json`, [`Error::Config`] if its class is
    /// not one of [`FAMILIES`](crate::diffusion::family::FAMILIES).
    pub fn of(files: &ModelFiles) -> Result<&'static Self> {
        Ok(ModelIndex::open(files)?.family)
    }
}

/// The classes of the parts of models with a U-Net, by the prefixes of their folders' names.
const CLASSES: [(&str, &[&str]); 3] = [
    (UNET, &["UNet2DConditionModel"]),
    ("vae", &["AutoencoderKL", "AutoencoderTiny"]),
    (
        "text_encoder",
        &["CLIPTextModel", "CLIPTextModelWithProjection"],
    ),
];

/// Refuses parts of other classes: diffusers uses the classes in `model_index.json`.
fn check_parts(files: &ModelFiles, family: &Family, index: &Value) -> Result<()> {
    if family.denoiser.part != UNET {
        return Ok(());
    }
    for part in family.networks().filter(|part| !files.is_replaced(part)) {
        let known = CLASSES.iter().find(|(start, _)| part.starts_with(start));
        let (Some((_, known)), Some(class)) = (known, index[part][1].as_str()) else {
            continue;
        };
        if !known.contains(&class) {
            let path = files.config_path(MODEL_INDEX);
            return Err(Error::unsupported(&path, part, &known.join(" or "), class));
        }
    }
    Ok(())
}

/// The fields of `model_index.json` other than the names of its parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelIndex {
    pub(super) family: &'static Family,
    /// Whether the conditions of an absent negative prompt are zeros.
    pub(super) force_zeros_for_empty_prompt: bool,
    /// Whether it was distilled to draw without guidance.
    pub(super) is_distilled: bool,
}

impl ModelIndex {
    /// Reads the `model_index.json` of a pipeline, or its equivalent for a single file.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is none, [`Error::Config`] for a class that is not one of
    /// [`FAMILIES`](crate::diffusion::family::FAMILIES).
    pub(super) fn open(files: &ModelFiles) -> Result<Self> {
        #[derive(Deserialize)]
        struct Fields {
            #[serde(rename = "_class_name")]
            class_name: String,
            force_zeros_for_empty_prompt: Option<bool>,
            is_distilled: Option<bool>,
        }
        let index: Value = files.config(MODEL_INDEX)?;
        let path = files.config_path(MODEL_INDEX);
        let fields: Fields = from_value(index.clone(), &path)?;
        let Some(family) = Family::of_class(&fields.class_name) else {
            return Err(Error::unsupported(
                &path,
                "_class_name",
                &family::classes(),
                fields.class_name,
            ));
        };
        check_parts(files, family, &index)?;
        let default = family.force_zeros_for_empty_prompt;
        Ok(Self {
            family,
            force_zeros_for_empty_prompt: default
                && fields.force_zeros_for_empty_prompt.unwrap_or(true),
            is_distilled: fields.is_distilled.unwrap_or(false),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::family::FAMILIES;
    use crate::diffusion::model_files::FileOptions;

    fn open(json: &str) -> Result<ModelIndex> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MODEL_INDEX), json).unwrap();
        ModelIndex::open(&ModelFiles::open(folder.path(), &FileOptions::default())?)
    }

    #[test]
    fn the_class_decides_the_family() {
        for family in FAMILIES {
            let index = open(&format!(r#"{{"_class_name": "{}"}}"#, family.class)).unwrap();
            assert_eq!(index.family, *family);
        }
        for (class, family) in [
            ("StableDiffusionImg2ImgPipeline", FAMILIES[0]),
            ("LatentConsistencyModelPipeline", FAMILIES[0]),
            ("StableDiffusionXLImg2ImgPipeline", FAMILIES[1]),
        ] {
            let index = open(&format!(r#"{{"_class_name": "{class}", "unet": []}}"#)).unwrap();
            assert_eq!(index.family, family);
        }
        let other = r#"{"_class_name": "PixArtAlphaPipeline", "unet": []}"#;
        let message = open(other).unwrap_err().to_string();
        assert!(message.contains("field `_class_name`"), "{message}");
        assert!(message.contains("StableDiffusionXLPipeline"), "{message}");
        assert!(message.contains("PixArtAlphaPipeline"), "{message}");
    }

    #[test]
    fn parts_of_another_class_are_refused() {
        let message = |part: &str, class: &str| {
            let index = format!(
                r#"{{"_class_name": "StableDiffusionPipeline", "{part}": ["diffusers", "{class}"]}}"#
            );
            open(&index)
                .err()
                .map_or_else(String::new, |error| error.to_string())
        };
        for (part, class, expected) in [
            (
                "vae",
                "AsymmetricAutoencoderKL",
                "field `vae`: expected AutoencoderKL or AutoencoderTiny, found",
            ),
            ("unet", "UNetMotionModel", "expected UNet2DConditionModel"),
            (
                "text_encoder",
                "RobertaSeriesModelWithTransformation",
                "expected CLIPTextModel or",
            ),
        ] {
            let found = message(part, class);
            assert!(found.contains(expected), "{found}");
        }
        assert_eq!(message("vae", "AutoencoderKL"), "");
        assert_eq!(message("vae", "AutoencoderTiny"), "");
        assert_eq!(message("text_encoder", "CLIPTextModelWithProjection"), "");
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
