//! The joint space of pictures and words, in which differences are measured.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ::image::RgbImage;
use burn::tensor::{DType, Device, FloatDType, Tensor};

use crate::diffusion::text_encoder::{Beginnings, TextEncoder};
use crate::diffusion::words::Prompt;
use crate::image::ImagePreprocessor;
use crate::models::text::clip::ClipModel;
use crate::models::text::tokenizer::ClipTokenizer;
use crate::models::vision::clip_image::ClipVisionModel;
use crate::util::tensors::{cosine, host, unit};
use crate::weights::compute_dtype;
use crate::{Error, Result};

/// The folders of a model's joint spaces, in its folder or next to its file.
pub const FOLDERS: [&str; 2] = ["clip", "clip_2"];

/// The least similarity (mean cosine) of two token-embedding tables if one was fine-tuned from the other.
const SAME_ORIGIN: f32 = 0.9;
/// Rows of the tables that are compared.
const COMPARED_ROWS: usize = 2048;

/// The joint space of pictures and words: CLIP with both projections. Copies share weights, and closing the
/// image tower of one closes it for all.
#[derive(Debug, Clone)]
pub struct JointSpace {
    /// The number of the pipeline's text encoder that it belongs to.
    encoder: usize,
    /// The bytes of its text encoder that are shared with the pipeline's.
    shared_bytes: u64,
    text_encoder: TextEncoder,
    folder: PathBuf,
    /// Present until it is closed, and again once it is needed.
    image_tower: Arc<Mutex<Option<ClipVisionModel>>>,
    preprocessor: ImagePreprocessor,
    device: Device,
    dtype: FloatDType,
}

impl JointSpace {
    /// Opens a transformers `CLIPModel` folder with its tokenizer and `preprocessor_config.json`.
    ///
    /// # Errors
    /// If a file is invalid; the error names it.
    pub fn open(folder: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let model = ClipModel::open(folder, device, dtype)?;
        Ok(Self {
            encoder: 0,
            shared_bytes: 0,
            text_encoder: TextEncoder::clip(ClipTokenizer::open(folder)?, model.text)?,
            folder: folder.to_owned(),
            image_tower: Arc::new(Mutex::new(Some(model.vision))),
            preprocessor: ImagePreprocessor::open(folder)?,
            device: device.clone(),
            dtype: compute_dtype(device, dtype),
        })
    }

    /// Returns it as the joint space of the one of the pipeline's text encoders that it fits. Weights that both
    /// have are held once, and words added to the encoder's vocabulary are also known here.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if it fits none, see [`check_encoder`](Self::check_encoder).
    pub fn of_one_among(mut self, encoders: &[TextEncoder]) -> Result<Self> {
        let fits = |encoder: &TextEncoder| self.check_encoder(encoder);
        match encoders.iter().position(|encoder| fits(encoder).is_ok()) {
            Some(number) => {
                self.encoder = number;
                self.text_encoder.extend(&encoders[number]);
                self.shared_bytes = self.text_encoder.share(&encoders[number]);
            }
            None => encoders.iter().try_for_each(fits)?,
        }
        Ok(self)
    }

    /// The number of the pipeline's text encoder that it belongs to, counted from 0.
    pub fn encoder(&self) -> usize {
        self.encoder
    }

    /// The bytes of its text encoder that are shared with the pipeline's and held once: 0 if one of the two is
    /// a fine-tuned copy in every tensor.
    pub fn shared_bytes(&self) -> u64 {
        self.shared_bytes
    }

    /// The text encoder of the joint space.
    pub fn text_encoder(&self) -> &TextEncoder {
        &self.text_encoder
    }

    /// Checks that difference tokens for `encoder` are valid here: the token embeddings must be the same, or
    /// at least a fine-tuned copy, to which words may have been added.
    ///
    /// # Errors
    /// [`Error::WrongBase`] if they are not.
    pub fn check_encoder(&self, encoder: &TextEncoder) -> Result<()> {
        let (ours, theirs) = (self.text_encoder.token_table(), encoder.token_table());
        if self.text_encoder.base() == encoder.base() {
            return Ok(());
        }
        let ([own, width], [rows, other_width]) = (ours.dims(), theirs.dims());
        if own <= rows && width == other_width {
            let rows = COMPARED_ROWS.min(own);
            let [ours, theirs] =
                [ours, theirs].map(|table| table.clone().slice([0..rows]).cast(DType::F32));
            if host(cosine(ours, theirs).mean())[0] >= SAME_ORIGIN {
                return Ok(());
            }
        }
        Err(Error::WrongBase {
            reason: format!(
                "the joint space (CLIP folder) is not that of the model's text encoder: their \
                 token embeddings differ ({} and {})",
                self.text_encoder.base(),
                encoder.base()
            ),
        })
    }

    /// A picture's unit-norm features, `[e]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the preprocessor and the network do not match, and as
    /// [`open`](Self::open) if the image tower has to be opened again.
    pub fn image_features(&self, image: &RgbImage) -> Result<Vec<f32>> {
        Ok(host(unit(self.picture_features(image)?)))
    }

    /// A picture's unnormalised features, `[1, e]`.
    ///
    /// # Errors
    /// As [`image_features`](Self::image_features).
    pub fn picture_features(&self, image: &RgbImage) -> Result<Tensor<2>> {
        let pixels = self
            .preprocessor
            .apply(image, &self.device)
            .cast(DType::from(self.dtype));
        let tower = self.image_tower()?;
        tower.project(tower.forward(pixels)?)
    }

    /// The image tower, opened again if it was closed.
    fn image_tower(&self) -> Result<ClipVisionModel> {
        let mut held = (self.image_tower.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some(tower) = &*held {
            return Ok(tower.clone());
        }
        let model = ClipModel::open(&self.folder, &self.device, self.dtype)?;
        Ok(held.insert(model.vision).clone())
    }

    /// Frees the memory of the image tower; it is opened again for the next picture.
    pub fn close_image_tower(&self) {
        *(self.image_tower.lock()).unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The unit-norm features of words, `[e]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the model has no projection.
    pub fn text_features(&self, prompt: &Prompt) -> Result<Vec<f32>> {
        Ok(host(unit(self.prompt_features(prompt, None)?)))
    }

    /// The unnormalised features of words followed by token embeddings.
    ///
    /// # Shapes
    /// `tokens`: [n, d]; result [1, e].
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if the tokens have another width, [`Error::Setting`] if there are
    /// too many.
    pub fn prompt_features(
        &self,
        prompt: &Prompt,
        tokens: Option<&Tensor<2>>,
    ) -> Result<Tensor<2>> {
        let num_tokens = tokens.map_or(0, |tokens| tokens.dims()[0]);
        let tokens = tokens.map(|tokens| tokens.clone().unsqueeze());
        let beginnings = self.read(&[prompt], num_tokens)?;
        self.text_encoder.features(&beginnings, tokens.as_ref())
    }

    /// Reads the start and the words of prompts with room for `num_tokens` difference tokens; words that do
    /// not fit are cut off.
    ///
    /// # Errors
    /// [`Error::Setting`] if even the difference tokens do not fit.
    pub fn read(&self, prompts: &[&Prompt], num_tokens: usize) -> Result<Beginnings> {
        (self.text_encoder).read_several(prompts, self.encoder, num_tokens)
    }

    /// The device of the computation.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
