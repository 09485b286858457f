//! The frozen models of an analogy: diffusion model, joint spaces, captioner.

use std::path::PathBuf;
use std::sync::OnceLock;

use burn::tensor::{Device, FloatDType};
use image::RgbImage;

use crate::models::captioner::Captioner;
use crate::models::generate::GenerationConfig;
use crate::pipeline::{JointSpace, Pipeline};
use crate::progress::{self, Observer, Stage};
use crate::prompt::{Prompt, PromptConfig, PromptMode, Words};
use crate::{Error, Result, pez};

/// Where the models of an analogy are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The diffusers pipeline folder.
    pub model: PathBuf,
    /// The joint space: a transformers `CLIPModel` folder; `<model>/clip` by default.
    pub clip: Option<PathBuf>,
    /// A transformers `Blip2ForConditionalGeneration` folder; `<model>/captioner` by default.
    pub captioner: Option<PathBuf>,
}

/// The frozen models of an analogy.
#[derive(Debug)]
pub struct Models {
    pipeline: Pipeline,
    /// One for each text encoder of the pipeline.
    joints: Vec<JointSpace>,
    captioner: OnceLock<Captioner>,
    captioner_folder: PathBuf,
    device: Device,
    dtype: FloatDType,
}

impl Models {
    /// Opens the models; the captioner is read when the first caption is asked for.
    ///
    /// # Errors
    /// Whatever is wrong with a model folder, naming the file; [`Error::WrongBase`] if the joint
    /// space does not belong to the model.
    pub fn open(paths: &ModelPaths, device: &Device, dtype: FloatDType) -> Result<Self> {
        let pipeline = Pipeline::open(&paths.model, None, device, dtype)?;
        let clip = paths
            .clip
            .clone()
            .unwrap_or_else(|| paths.model.join("clip"));
        if !clip.is_dir() {
            return Err(Error::Missing {
                what: "the joint space".to_owned(),
                reason: format!(
                    "there is no folder {}; give the transformers CLIPModel folder whose text \
                     encoder the model has",
                    clip.display()
                ),
            });
        }
        let joint = JointSpace::open(&clip, device, dtype)?;
        joint.check_encoder(&pipeline.text_encoders()[0])?;
        Ok(Self {
            pipeline,
            joints: vec![joint],
            captioner: OnceLock::new(),
            captioner_folder: (paths.captioner.clone())
                .unwrap_or_else(|| paths.model.join("captioner")),
            device: device.clone(),
            dtype,
        })
    }

    /// The diffusion model.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The joint spaces, one for each text encoder of the pipeline.
    pub fn joints(&self) -> &[JointSpace] {
        &self.joints
    }

    /// A caption for a picture.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no captioner.
    pub fn caption(&self, image: &RgbImage) -> Result<String> {
        let captioner = match self.captioner.get() {
            Some(captioner) => captioner,
            None if self.captioner_folder.is_dir() => {
                let folder = &self.captioner_folder;
                let captioner = Captioner::open(folder, &self.device, self.dtype)?;
                self.captioner.get_or_init(|| captioner)
            }
            None => {
                return Err(Error::Missing {
                    what: "a captioner".to_owned(),
                    reason: format!(
                        "there is no folder {}; give captions, or a transformers \
                         Blip2ForConditionalGeneration folder",
                        self.captioner_folder.display()
                    ),
                });
            }
        };
        captioner.caption(image, &GenerationConfig::default())
    }

    /// A picture's caption, as given or as written by the captioner.
    pub(super) fn caption_unless_given(
        &self,
        image: &RgbImage,
        given: Option<&str>,
        mode: PromptMode,
        observer: Observer<'_>,
    ) -> Result<String> {
        if let Some(text) = given {
            return Ok(text.to_owned());
        }
        if mode == PromptMode::Text {
            return Err(Error::Missing {
                what: "a prompt".to_owned(),
                reason: "with the prompt mode `text` every picture needs its own text".to_owned(),
            });
        }
        progress::step(&mut *observer, Stage::Caption, 0, 1)?;
        let caption = self.caption(image)?;
        progress::step(observer, Stage::Caption, 1, 1)?;
        Ok(caption)
    }

    /// P_X: the frozen prompt of a picture, read by the text encoders. `number` tells the pictures
    /// of one run apart.
    pub(super) fn prompt(
        &self,
        picture: &Picture<'_>,
        config: &PromptConfig,
        num_tokens: usize,
        observer: Observer<'_>,
    ) -> Result<Words> {
        let caption = self.pipeline.prompt(&picture.caption)?;
        let prefix = match config.prompt_mode {
            PromptMode::Caption | PromptMode::Text => None,
            PromptMode::Optimised => Some(Prompt::default()),
            PromptMode::CaptionOptimised => Some(caption.clone()),
        };
        let prompt = match prefix {
            None => caption,
            Some(prefix) => {
                let joint = &self.joints[0];
                let image = joint.image_features(picture.image)?;
                pez::optimise(
                    joint,
                    &image,
                    &prefix,
                    config,
                    picture.number,
                    &mut *observer,
                )?
            }
        };
        let words = self.pipeline.read(&prompt, num_tokens)?;
        if let Some(notice) = words.notice() {
            progress::notice(observer, notice);
        }
        Ok(words)
    }
}

/// A picture with its caption, and its number among those of a run.
pub(super) struct Picture<'a> {
    pub(super) image: &'a RgbImage,
    pub(super) caption: String,
    pub(super) number: usize,
}
