//! Plain generation, with or without difference tokens.

use burn::tensor::Tensor;
use image::RgbImage;

use crate::Result;
use crate::diffusion::draw::{InitNoise, TextToImage, draw};
use crate::diffusion::frozen::Models;
use crate::diffusion::words::FullPrompt;
use crate::method::difference::DifferenceTokens;
use crate::util::progress::{self, Observer};

/// The inputs of a picture besides the words; none by default.
#[derive(Debug, Clone, Default)]
pub struct Inputs<'a> {
    /// Difference tokens that follow the prompt.
    pub tokens: Option<&'a DifferenceTokens>,
    /// The noise to start from; drawn from the seed if absent.
    pub init: Option<InitNoise>,
    /// The picture that InstructPix2Pix or an inpainting model changes.
    pub image: Option<&'a RgbImage>,
    /// The area that an inpainting model redraws: white, or at least half as bright.
    pub mask: Option<&'a RgbImage>,
}

/// Draws a picture from words and other inputs that the model takes. Outside a mask, the picture stays the same
/// to the pixel.
///
/// # Errors
/// As [`generate_latents`], or [`Error::NotFinite`](crate::Error::NotFinite) if the picture has values that are not finite.
pub fn generate(
    models: &Models,
    request: &TextToImage,
    inputs: Inputs<'_>,
    observer: Observer<'_>,
) -> Result<RgbImage> {
    let pipeline = models.pipeline();
    let beside = inputs.image.zip(inputs.mask);
    let drawn = pipeline.decode(generate_latents(models, request, inputs, observer)?)?;
    Ok(match beside {
        Some((image, mask)) => pipeline.keep(&drawn, image, mask),
        None => drawn,
    })
}

/// The latents of the picture that [`generate()`] draws.
///
/// # Errors
/// [`Error::WrongBase`](crate::Error::WrongBase) if the tokens were learned on another model, [`Error::Setting`](crate::Error::Setting) for
/// invalid settings, [`Error::Missing`](crate::Error::Missing) if the model takes a picture or a mask that is
/// absent, [`Error::InvalidInput`](crate::Error::InvalidInput) for one that it does not take or latents of another shape,
/// [`Error::Stopped`](crate::Error::Stopped) if the observer asks to stop.
pub fn generate_latents(
    models: &Models,
    request: &TextToImage,
    inputs: Inputs<'_>,
    observer: Observer<'_>,
) -> Result<Tensor<4>> {
    let pipeline = models.pipeline();
    let image = pipeline.show(inputs.image, inputs.mask)?;
    let num_tokens = inputs.tokens.map_or(0, DifferenceTokens::num_tokens);
    let words = pipeline.read(&pipeline.prompt(&request.prompt)?, num_tokens)?;
    if let Some(notice) = words.notice() {
        progress::notice(&mut *observer, notice);
    }
    let full = match inputs.tokens {
        None => FullPrompt::plain(&words),
        Some(tokens) => {
            tokens.check_base(&pipeline.base())?;
            FullPrompt::with_difference(&words, tokens.embeddings(), request.strength)
        }
    };
    let prompt = pipeline.encode_prompts(&[full])?;
    draw(pipeline, request, prompt, image, inputs.init, observer)
}
