//! The frozen models that methods share, opened on first use.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::{Error, Result};

/// The role of the text-to-image model in records of runs.
pub const TEXT_TO_IMAGE: &str = "text-to-image";
/// The role of the InstructPix2Pix model.
pub(super) const INSTRUCT_PIX2PIX: &str = "instruct-pix2pix";
/// The role of the inpainting model.
pub(super) const INPAINTING: &str = "inpainting";

/// Paths of the models of all methods.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EvalModelPaths {
    /// The text-to-image model.
    pub text_to_image: ModelPaths,
    /// An InstructPix2Pix model, if there is one.
    pub instruct_pix2pix: Option<ModelPaths>,
    /// An inpainting model, if there is one.
    pub inpainting: Option<ModelPaths>,
}

impl EvalModelPaths {
    /// The models that are given, by their roles in records of runs.
    pub fn by_role(&self) -> impl Iterator<Item = (&'static str, &ModelPaths)> {
        let all = [
            (TEXT_TO_IMAGE, Some(&self.text_to_image)),
            (INSTRUCT_PIX2PIX, self.instruct_pix2pix.as_ref()),
            (INPAINTING, self.inpainting.as_ref()),
        ];
        all.into_iter()
            .filter_map(|(role, paths)| Some((role, paths?)))
    }
}

/// The frozen models that methods share. A model stays open as long as any method holds it.
#[derive(Debug)]
pub struct EvalModels {
    /// The settings recommended for the text-to-image model: those of Difference Inversion.
    pub recommended: AnalogyConfig,
    text_to_image: Shared,
    instruct_pix2pix: Shared,
    inpainting: Shared,
    device: Device,
    dtype: FloatDType,
}

#[derive(Debug)]
struct Shared {
    what: &'static str,
    paths: Option<ModelPaths>,
    open: Mutex<Weak<Models>>,
}

impl EvalModels {
    /// Opens nothing yet.
    pub fn new(
        paths: EvalModelPaths,
        recommended: AnalogyConfig,
        device: &Device,
        dtype: FloatDType,
    ) -> Self {
        let shared = |what, paths| Shared {
            what,
            paths,
            open: Mutex::default(),
        };
        Self {
            recommended,
            text_to_image: shared("a text-to-image model", Some(paths.text_to_image)),
            instruct_pix2pix: shared("an InstructPix2Pix model", paths.instruct_pix2pix),
            inpainting: shared("an inpainting model", paths.inpainting),
            device: device.clone(),
            dtype,
        }
    }

    /// The text-to-image model.
    ///
    /// # Errors
    /// As [`Models::open`].
    pub fn text_to_image(&self) -> Result<Arc<Models>> {
        self.share(&self.text_to_image)
    }

    /// The InstructPix2Pix model.
    ///
    /// # Errors
    /// [`Error::Missing`] if none was given, and as [`Models::open`].
    pub fn instruct_pix2pix(&self) -> Result<Arc<Models>> {
        self.share(&self.instruct_pix2pix)
    }

    /// The inpainting model.
    ///
    /// # Errors
    /// [`Error::Missing`] if none was given, and as [`Models::open`].
    pub fn inpainting(&self) -> Result<Arc<Models>> {
        self.share(&self.inpainting)
    }

    fn share(&self, shared: &Shared) -> Result<Arc<Models>> {
        let Some(paths) = &shared.paths else {
            return Err(Error::Missing {
                what: shared.what.to_owned(),
                reason: "the method needs one, and none was given".to_owned(),
            });
        };
        let mut held = (shared.open.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some(models) = held.upgrade() {
            return Ok(models);
        }
        let models = Arc::new(Models::open(paths, &self.device, self.dtype)?);
        *held = Arc::downgrade(&models);
        Ok(models)
    }
}
