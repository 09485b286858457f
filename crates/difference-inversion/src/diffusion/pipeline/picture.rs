//! Pictures to latents and back, and the picture inputs of the denoiser.

use ::image::RgbImage;
use burn::tensor::{DType, Int, Tensor};

use crate::diffusion::family::Beside;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::preview::Colours;
use crate::image::{fit, to_image, to_tensor};
use crate::models::denoiser::Memory;
use crate::models::vae::{decode_in_tiles, mean_in_tiles};
use crate::util::tensors::host;
use crate::{Error, Result};

/// The weights of red, green and blue in brightness (ITU-R BT.601).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// The longest side of a preview, in pixels.
const PREVIEW: u32 = 256;

/// A picture that is no larger than a preview.
fn small(picture: RgbImage) -> RgbImage {
    let (width, height) = picture.dimensions();
    let longest = width.max(height);
    if longest <= PREVIEW {
        return picture;
    }
    let [width, height] = [width, height].map(|side| (side * PREVIEW / longest).max(1));
    ::image::imageops::thumbnail(&picture, width, height)
}

impl Pipeline {
    /// The latents of a picture, fitted to [`resolution`](Self::resolution): the mean, not a sample, so that
    /// they are deterministic, [as the denoiser sees
    /// it](crate::models::vae::Autoencoder::to_denoised).
    ///
    /// # Shapes
    /// [1, channels, h, w] as [`latent_shape`](Self::latent_shape), f32
    pub fn encode_image(&self, image: &RgbImage) -> Tensor<4> {
        self.vae.to_denoised(self.mean(self.pixels(image)))
    }

    /// Decodes latents to a picture.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a value is not finite.
    pub fn decode(&self, latents: Tensor<4>) -> Result<RgbImage> {
        to_image(self.decode_pixels(latents))
    }

    /// Decodes latents to pixels; gradients flow to the latents.
    ///
    /// # Shapes
    /// [b, channels, h, w] to [b, 3, height, width], about in [-1, 1], f32
    pub fn decode_pixels(&self, latents: Tensor<4>) -> Tensor<4> {
        let latents = latents.cast(DType::from(self.vae_dtype));
        let latents = self.vae.to_decoder(latents);
        let pixels = match self.memory {
            Memory::Normal => self.vae.decode(latents),
            Memory::Low => decode_in_tiles(&*self.vae, &latents),
        };
        pixels.cast(DType::F32)
    }

    /// What the denoiser's output says of the clean picture: decoded by the autoencoder of previews, or without one
    /// in approximate colours, a pixel for every latent.
    ///
    /// # Shapes
    /// `latents` and `output`: [1, channels, h, w], as [`predict`](Self::predict) takes and gives them at `time`
    pub(crate) fn preview(&self, latents: Tensor<4>, output: Tensor<4>, time: f64) -> RgbImage {
        let clean = self.noising.original(latents, output, time);
        let vae = self.preview_vae.as_ref().and_then(|vae| vae.as_ref().ok());
        let decoded = vae.and_then(|vae| {
            let picture = vae.decode(vae.to_decoder(clean.clone().cast(DType::F32)));
            to_image(picture).ok()
        });
        match decoded {
            Some(picture) => small(picture),
            None => self.colours().of(&clean),
        }
    }

    /// Why previews are not those that were asked for.
    pub(crate) fn preview_notice(&self) -> Option<&str> {
        self.preview_vae
            .as_ref()?
            .as_ref()
            .err()
            .map(String::as_str)
    }

    /// The colours of latents.
    fn colours(&self) -> &Colours {
        self.colours.get_or_init(|| {
            let factor = self.vae.pixels();
            let chart = Colours::chart(u32::try_from(factor).unwrap_or(8));
            let (width, height) = chart.dimensions();
            let pixels = to_tensor(&chart, [height, width], &self.device);
            Colours::fit(&self.vae.to_denoised(self.mean(pixels)), &chart)
        })
    }

    /// The denoiser's input from the picture to change, for
    /// [`Conditions::image`](super::Conditions::image): for InstructPix2Pix its latents, *not*
    /// scaled; for inpainting the mask (1 where the picture is redrawn), then the scaled latents
    /// of the picture with the masked area grey. `None` for pipelines that draw from
    /// words only.
    ///
    /// A mask is fitted like the picture; areas at least half as bright as white are redrawn.
    /// Each latent pixel takes its mask from the upper left corner of its place.
    ///
    /// # Shapes
    /// [1, c, h, w] with h and w as in [`latent_shape`](Self::latent_shape), f32
    ///
    /// # Errors
    /// [`Error::Missing`] if the pipeline takes a picture or mask that is not given,
    /// [`Error::InvalidInput`] for one that it does not take.
    pub fn show(
        &self,
        image: Option<&RgbImage>,
        mask: Option<&RgbImage>,
    ) -> Result<Option<Tensor<4>>> {
        let family = self.family;
        let inputs = [
            ("picture", family.takes_picture(), image.is_some()),
            ("mask", family.takes_mask(), mask.is_some()),
        ];
        for (what, takes, given) in inputs {
            if takes && !given {
                return Err(Error::Missing {
                    what: format!("a {what}"),
                    reason: format!("a {} does not draw without one", family.class),
                });
            }
            if given && !takes {
                let reason = format!("a {} takes no {what}", family.class);
                return Err(Error::invalid_input(reason));
            }
        }
        Ok(match (family.beside, image, mask) {
            (Beside::Picture, Some(image), _) => Some(self.mean(self.pixels(image))),
            (Beside::PictureAndMask, Some(image), Some(mask)) => Some(self.masked(image, mask)),
            _ => None,
        })
    }

    /// Checks that the pipeline draws from words only, as learning and applying difference tokens
    /// requires.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if it also takes a picture.
    pub fn check_words_alone(&self) -> Result<()> {
        self.family.check_words_alone()
    }

    /// The drawn pixels inside the mask, and the picture's own outside: an autoencoder changes every pixel.
    pub fn keep(&self, drawn: &RgbImage, image: &RgbImage, mask: &RgbImage) -> RgbImage {
        let (width, height) = drawn.dimensions();
        let kept = fit(image, width, height);
        let marked = host(self.marked(mask));
        let pixels = drawn.pixels().zip(kept.pixels()).zip(marked);
        let mut pixels =
            pixels.map(|((drawn, kept), marked)| if marked > 0.5 { *drawn } else { *kept });
        let mut pasted = RgbImage::new(width, height);
        pasted
            .pixels_mut()
            .for_each(|pixel| *pixel = pixels.next().unwrap_or(*pixel));
        pasted
    }

    /// 1 where a mask is at least half as bright as white, 0 elsewhere, [1, 1, height, width].
    fn marked(&self, mask: &RgbImage) -> Tensor<4> {
        let luma = Tensor::<1>::from_floats(LUMA, &self.device).reshape([1, 3, 1, 1]);
        let brightness = (self.pixels(mask) * luma).sum_dim(1);
        (brightness.greater_equal_elem(0.0))
            .float()
            .cast(DType::F32)
    }

    /// Inpainting's mask and picture, [1, 1 + channels, h, w].
    fn masked(&self, image: &RgbImage, mask: &RgbImage) -> Tensor<4> {
        let mask = self.marked(mask);
        let kept = self.pixels(image) * (mask.clone().neg() + 1.0);
        let latents = self.vae.to_denoised(self.mean(kept));
        let [_, _, h, w] = latents.dims();
        let factor = self.vae.pixels();
        let corners = |count: usize| {
            let places = (0..count).map(|i| i64::try_from(i * factor).unwrap_or(i64::MAX));
            Tensor::<1, Int>::from_ints(places.collect::<Vec<_>>().as_slice(), &self.device)
        };
        let mask = mask.select(2, corners(h)).select(3, corners(w)); // [1, 1, h, w]
        Tensor::cat(vec![mask, latents], 1)
    }

    /// A picture fitted to [`resolution`](Self::resolution).
    ///
    /// # Shapes
    /// [1, 3, height, width] in [-1, 1], f32
    pub fn pixels(&self, image: &RgbImage) -> Tensor<4> {
        to_tensor(image, self.resolution, &self.device)
    }

    /// The mean of the autoencoder's latents, f32.
    fn mean(&self, pixels: Tensor<4>) -> Tensor<4> {
        let pixels = pixels.cast(DType::from(self.vae_dtype));
        let mean = match self.memory {
            Memory::Normal => self.vae.mean(pixels),
            Memory::Low => mean_in_tiles(&*self.vae, &pixels),
        };
        mean.cast(DType::F32)
    }
}
