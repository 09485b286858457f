//! `model_index.json`: which family a model is of.

use serde::Deserialize;

use crate::diffusion::family::{self, Family};
use crate::diffusion::model_files::{MODEL_INDEX, ModelFiles};
use crate::{Error, Result};

impl Family {
    /// The family of a model that was not loaded.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is no `model_index.json`, [`Error::Config`] if its class is
    /// none of [`FAMILIES`](crate::diffusion::family::FAMILIES).
    pub fn of(files: &ModelFiles) -> Result<&'static Self> {
        Ok(ModelIndex::open(files)?.family)
    }
}

/// What `model_index.json` says beyond the names of its parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelIndex {
    pub(super) family: &'static Family,
    /// Whether the conditions of an absent negative prompt are zeros.
    pub(super) force_zeros_for_empty_prompt: bool,
}

impl ModelIndex {
    /// Reads the `model_index.json` of a pipeline, or what stands for it in a single file.
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
        }
        let fields: Fields = files.config(MODEL_INDEX)?;
        let Some(family) = Family::of_class(&fields.class_name) else {
            return Err(Error::unsupported(
                &files.config_path(MODEL_INDEX),
                "_class_name",
                &family::classes(),
                fields.class_name,
            ));
        };
        let default = family.force_zeros_for_empty_prompt;
        Ok(Self {
            family,
            force_zeros_for_empty_prompt: fields.force_zeros_for_empty_prompt.unwrap_or(default),
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
