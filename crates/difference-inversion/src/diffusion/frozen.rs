//! The frozen models of an analogy: diffusion model, joint spaces, captioner.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use burn::tensor::{Device, FloatDType};
use image::RgbImage;

use crate::diffusion::joint_space;
use crate::diffusion::joint_space::JointSpace;
use crate::diffusion::model_files::{FileOptions, ModelFiles};
use crate::diffusion::pipeline::Pipeline;
use crate::image::{fit, middle};
use crate::models::captioner::{CaptionerPlace, Describes};
use crate::models::denoiser::Memory;
use crate::{Error, Result};

/// The folder of a captioner inside a pipeline's.
pub const CAPTIONER_FOLDER: &str = "captioner";

/// The paths of the models of an analogy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelPaths {
    /// The diffusers pipeline folder, or a single file in the original layout.
    pub model: PathBuf,
    /// How to interpret the model's files.
    pub options: FileOptions,
    /// The joint space of each text encoder, in any order: transformers `CLIPModel` folders; if
    /// none is given, see [`clip_folders`](Self::clip_folders).
    pub clip: Vec<PathBuf>,
    /// The captioner; if not given, see [`captioner_place`](Self::captioner_place).
    pub captioner: Option<CaptionerPlace>,
}

impl ModelPaths {
    /// The files of the model. A single file without a vocabulary takes that of a joint space.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn files(&self) -> Result<ModelFiles> {
        let mut options = self.options.clone();
        if options.tokenizer.is_none() && self.model.is_file() {
            let mut joints = self.clip_folders().into_iter();
            options.tokenizer = joints.find(|folder| folder.is_dir());
        }
        ModelFiles::open(&self.model, &options)
    }

    /// The same model with the U-Net `name` in its folder, or next to its file, if there is one.
    pub fn with_unet(&self, name: &str) -> Option<Self> {
        let folder = self.beside(name);
        folder.is_dir().then(|| Self {
            options: FileOptions {
                unet: Some(folder),
                ..self.options.clone()
            },
            ..self.clone()
        })
    }

    /// The paths of the joint spaces: as given, or else `clip` and, if present, `clip_2` in the model's
    /// folder or next to its file.
    pub fn clip_folders(&self) -> Vec<PathBuf> {
        if !self.clip.is_empty() {
            return self.clip.clone();
        }
        let [first, second] = joint_space::FOLDERS.map(|name| self.beside(name));
        match (first.is_dir(), second.is_dir()) {
            (true, true) => vec![first, second],
            (false, true) => vec![second],
            (_, false) => vec![first],
        }
    }

    /// Where the captioner is: as given, or else `captioner` in the model's folder or next to its
    /// file.
    pub fn captioner_place(&self) -> CaptionerPlace {
        let default = || CaptionerPlace::Folder(self.beside(CAPTIONER_FOLDER));
        self.captioner.clone().unwrap_or_else(default)
    }

    /// The folder of the captioner, if it is there.
    pub fn captioner_folder(&self) -> Option<PathBuf> {
        let folder = self.captioner_place().folder().map(Path::to_owned);
        folder.filter(|folder| folder.is_dir())
    }

    fn beside(&self, name: &str) -> PathBuf {
        match self.model.is_file() {
            true => self.model.with_file_name(name),
            false => self.model.join(name),
        }
    }
}

/// The frozen models of an analogy.
#[derive(Debug)]
pub struct Models {
    pipeline: Pipeline,
    notices: Vec<String>,
    joints: OnceLock<Vec<JointSpace>>,
    clip_folders: Vec<PathBuf>,
    /// Present from its first use until it is released.
    captioner: Mutex<Option<Box<dyn Describes>>>,
    captioner_place: CaptionerPlace,
    memory: Memory,
    device: Device,
    dtype: FloatDType,
}

impl Models {
    /// Opens the diffusion model; joint spaces and captioner are opened on first use.
    ///
    /// # Errors
    /// If a file of the pipeline is invalid; the error names it.
    pub fn open(paths: &ModelPaths, device: &Device, dtype: FloatDType) -> Result<Self> {
        let files = paths.files()?;
        Ok(Self {
            pipeline: Pipeline::open(&files, device, dtype)?,
            notices: files.notices().to_vec(),
            joints: OnceLock::new(),
            clip_folders: paths.clip_folders(),
            captioner: Mutex::default(),
            captioner_place: paths.captioner_place(),
            memory: paths.options.memory,
            device: device.clone(),
            dtype,
        })
    }

    /// The diffusion model.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Notes for the user about how the model's files were interpreted.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The joint spaces in the order of the pipeline's text encoders: at least one, and at most
    /// one for each.
    ///
    /// # Errors
    /// [`Error::Missing`] if a folder is missing or the family has no joint space, any error in a folder's files,
    /// [`Error::WrongBase`] for a joint space that does not belong to the model, or for the same one twice.
    pub fn joints(&self) -> Result<&[JointSpace]> {
        if let Some(joints) = self.joints.get() {
            return Ok(joints);
        }
        let family = self.pipeline.family();
        if !family.has_joint_space() {
            return Err(Error::Missing {
                what: "a joint space".to_owned(),
                reason: format!(
                    "no text encoder of a {} was trained with pictures, so that there can be no CLIP loss and no \
                     optimised prompt",
                    family.class
                ),
            });
        }
        let mut joints: Vec<JointSpace> = Vec::new();
        for folder in &self.clip_folders {
            let joint = self.open_joint(folder)?;
            if joints
                .iter()
                .any(|other| other.encoder() == joint.encoder())
            {
                let reason = format!(
                    "{}: another joint space of the same text encoder was given already",
                    folder.display()
                );
                return Err(Error::WrongBase { reason });
            }
            joints.push(joint);
        }
        joints.sort_by_key(JointSpace::encoder);
        Ok(self.joints.get_or_init(|| joints))
    }

    fn open_joint(&self, folder: &Path) -> Result<JointSpace> {
        if !folder.is_dir() {
            return Err(Error::Missing {
                what: "the joint space".to_owned(),
                reason: format!(
                    "there is no folder {}; give the folder of a transformers CLIPModel that has \
                     the model's text encoder",
                    folder.display()
                ),
            });
        }
        JointSpace::open(folder, &self.device, self.dtype)?
            .of_one_among(self.pipeline.text_encoders())
    }

    /// Closes the networks that read pictures, which are the captioner and the image towers of the joint spaces,
    /// if memory is to be saved. Each is opened again when needed.
    pub(crate) fn pictures_are_read(&self) {
        if self.memory == Memory::Low {
            let mut held = (self.captioner.lock()).unwrap_or_else(PoisonError::into_inner);
            *held = None;
            let joints = self.joints.get().into_iter().flatten();
            joints.for_each(JointSpace::close_image_tower);
        }
    }

    /// A caption for the part of a picture that is drawn: its [`middle`].
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no captioner, [`Error::Captioner`] if a server gives none.
    pub fn caption(&self, image: &RgbImage) -> Result<String> {
        self.with_captioner(|captioner| captioner.caption(&self.seen(image)))
    }

    /// Captions of a picture before and after an edit, see [`Describes::caption_pair`].
    ///
    /// # Errors
    /// As [`caption`](Self::caption).
    pub fn caption_pair(&self, before: &RgbImage, after: &RgbImage) -> Result<[String; 2]> {
        let [before, after] = [before, after].map(|image| self.seen(image));
        self.with_captioner(|captioner| captioner.caption_pair(&before, &after))
    }

    /// What a captioner sees of a picture; a server gets it at the size that is drawn.
    fn seen(&self, image: &RgbImage) -> RgbImage {
        let [height, width] = self.pipeline.resolution();
        match self.captioner_place {
            CaptionerPlace::Folder(_) => middle(image, width, height),
            CaptionerPlace::Server(_) => fit(image, width, height),
        }
    }

    fn with_captioner<T>(&self, describe: impl FnOnce(&dyn Describes) -> Result<T>) -> Result<T> {
        let mut held = (self.captioner.lock()).unwrap_or_else(PoisonError::into_inner);
        let captioner = match &mut *held {
            Some(captioner) => captioner,
            held @ None => held.insert(self.captioner_place.open(&self.device, self.dtype)?),
        };
        describe(captioner.as_ref())
    }
}
