//! Preprocessing of pictures for a vision tower, as configured by `preprocessor_config.json`.

use std::path::Path;

use ::image::RgbImage;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use crate::image::resize::{Filter, resize};
use crate::image::{crop, normalised_tensor};
use crate::weights::read_config;
use crate::{Error, Result};

/// A size as transformers writes it: one number, or named edges.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    One(u32),
    Edges { shortest_edge: u32 },
    Box { height: u32, width: u32 },
}

/// The longest plausible edge of a network's input.
const LONGEST_EDGE: u32 = 2048;

impl Size {
    /// Whether it is a plausible size of a network's input.
    fn is_usual(self) -> bool {
        let edges = match self {
            Self::One(edge)
            | Self::Edges {
                shortest_edge: edge,
            } => [edge; 2],
            Self::Box { height, width } => [height, width],
        };
        edges.iter().all(|edge| (1..=LONGEST_EDGE).contains(edge))
    }
}

/// The preprocessing of transformers' `CLIPImageProcessor` and `BlipImageProcessor`.
#[derive(Clone, Debug, Deserialize)]
pub struct ImagePreprocessor {
    #[serde(default, alias = "feature_extractor_type")]
    image_processor_type: String,
    #[serde(default = "yes")]
    do_resize: bool,
    size: Size,
    #[serde(default = "bicubic")]
    resample: u32,
    #[serde(default)]
    do_center_crop: bool,
    crop_size: Option<Size>,
    #[serde(default = "yes")]
    do_rescale: bool,
    #[serde(default = "one_over_255")]
    rescale_factor: f32,
    #[serde(default = "yes")]
    do_normalize: bool,
    #[serde(default = "clip_mean")]
    image_mean: [f32; 3],
    #[serde(default = "clip_std")]
    image_std: [f32; 3],
}

/// `processor_config.json`, which newer transformers write for the processor as a whole.
#[derive(Deserialize)]
struct Combined {
    image_processor: ImagePreprocessor,
}

fn yes() -> bool {
    true
}

fn bicubic() -> u32 {
    3
}

fn one_over_255() -> f32 {
    1.0 / 255.0
}

fn clip_mean() -> [f32; 3] {
    [0.481_454_66, 0.457_827_5, 0.408_210_73]
}

fn clip_std() -> [f32; 3] {
    [0.268_629_54, 0.261_302_6, 0.275_777_1]
}

impl ImagePreprocessor {
    /// Reads `preprocessor_config.json`, or the `image_processor` of `processor_config.json`, in
    /// the folder `dir`.
    ///
    /// # Errors
    /// When there is neither file, or a value is of the wrong type or not supported.
    pub fn open(dir: &Path) -> Result<Self> {
        let combined = dir.join("processor_config.json");
        let path = dir.join("preprocessor_config.json");
        if !path.exists() && combined.exists() {
            let this = read_config::<Combined>(&combined)?.image_processor;
            return this.checked(&combined);
        }
        read_config::<Self>(&path)?.checked(&path)
    }

    fn checked(self, path: &Path) -> Result<Self> {
        if Filter::from_pillow(self.resample).is_none() {
            return Err(Error::unsupported(
                path,
                "resample",
                "0 to 5",
                self.resample,
            ));
        }
        for (field, size) in [("size", Some(self.size)), ("crop_size", self.crop_size)] {
            if size.is_some_and(|size| !size.is_usual()) {
                let expected = format!("edges of 1 to {LONGEST_EDGE}");
                return Err(Error::unsupported(path, field, &expected, size));
            }
        }
        if !self
            .image_std
            .iter()
            .all(|std| std.is_normal() && *std > 0.0)
        {
            return Err(Error::unsupported(
                path,
                "image_std",
                "positive numbers",
                self.image_std,
            ));
        }
        if self.do_center_crop && matches!(self.crop_size, None | Some(Size::Edges { .. })) {
            let expected = "a height and a width, since `do_center_crop` is true";
            return Err(Error::unsupported(
                path,
                "crop_size",
                expected,
                self.crop_size,
            ));
        }
        Ok(self)
    }

    /// The picture as `pixel_values`, resized, cropped, scaled and normalised.
    ///
    /// # Shapes
    /// `[1, 3, height, width]` of the size that the configuration names.
    #[must_use]
    pub fn apply(&self, image: &RgbImage, device: &Device) -> Tensor<4> {
        let mut image = image.clone();
        if self.do_resize {
            let (width, height) = self.resized(image.width(), image.height());
            let filter = Filter::from_pillow(self.resample).unwrap_or(Filter::Bicubic);
            image = resize(&image, width, height, filter);
        }
        match self.crop_size {
            Some(Size::One(edge)) if self.do_center_crop => image = crop(&image, edge, edge),
            Some(Size::Box { height, width }) if self.do_center_crop => {
                image = crop(&image, width, height);
            }
            _ => {}
        }
        let factor = if self.do_rescale {
            self.rescale_factor
        } else {
            1.0
        };
        let (mean, std) = if self.do_normalize {
            (self.image_mean, self.image_std)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        normalised_tensor(
            &image,
            |channel, value| (value * factor - mean[channel]) / std[channel],
            device,
        )
    }

    /// The width and height after resizing a picture of `width` × `height`.
    fn resized(&self, width: u32, height: u32) -> (u32, u32) {
        let shortest = match self.size {
            Size::Box { height, width } => return (width, height),
            // BLIP reads a single number as a square, CLIP as the shortest edge.
            Size::One(edge) if self.image_processor_type.starts_with("Blip") => {
                return (edge, edge);
            }
            Size::One(edge)
            | Size::Edges {
                shortest_edge: edge,
            } => edge,
        };
        let long = |short_side: u32, long_side: u32| {
            let scaled = u64::from(shortest) * u64::from(long_side);
            u32::try_from(scaled.div_euclid(u64::from(short_side))).unwrap_or(u32::MAX)
        };
        if width <= height {
            (shortest, long(width, height))
        } else {
            (long(height, width), shortest)
        }
    }
}
