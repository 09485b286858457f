//! The judge of the demo world: a small convolutional network that reads every attribute of a
//! picture. It shares no data or weights with the models that methods use.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::image::to_tensor;
use difference_inversion::models::feature_map::{Conv2d, GroupNorm};
use difference_inversion::models::layers::{Activation, Linear};
use difference_inversion::util::tensors::host;
use difference_inversion::weights::Weights;
use difference_inversion::{Error, Result};
use image::RgbImage;

use super::{Attributes, SceneAttributes};

/// The channels before and after each stage.
const WIDTHS: [usize; 5] = [3, 24, 48, 96, 128];
/// The groups of every normalisation.
const GROUPS: usize = 8;
/// The side of the pictures it sees.
const SIDE: u32 = 128;
/// The side of the map that the last stage is averaged to.
const POOLED: usize = 4;
/// The width of the hidden layer.
const HIDDEN: usize = 256;
/// The metadata key of the attributes and their values.
const ATTRIBUTES: &str = "attributes";

/// The judge with its frozen weights.
#[derive(Debug)]
pub struct Judge {
    /// Every attribute with its values, in the order of the network's outputs.
    attributes: Vec<(String, Vec<String>)>,
    stages: Vec<Stage>,
    hidden: Linear,
    out: Linear,
    device: Device,
}

/// Two convolutions, each normalised and activated; the first halves the map.
#[derive(Debug)]
struct Stage {
    halve: (Conv2d, GroupNorm),
    refine: (Conv2d, GroupNorm),
}

/// What the judge reads from a picture.
#[derive(Debug, Clone)]
pub struct Judged {
    /// The most likely value of every attribute.
    pub attributes: SceneAttributes,
    /// The activations of the hidden layer, 256 of them.
    pub features: Vec<f32>,
    /// The output of each stage, position by position, with its number of channels.
    pub stages: Vec<(Vec<f32>, usize)>,
}

impl Judge {
    /// Reads the file that `training/judge.py` writes: the weights, and in its metadata the
    /// attributes with their values.
    ///
    /// # Errors
    /// If the file is invalid; the error names it.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let weights = Weights::open(path, device, FloatDType::F32)?;
        let attributes = weights.metadata().remove(ATTRIBUTES).unwrap_or_default();
        let attributes: Vec<(String, Vec<String>)> =
            serde_json::from_str(&attributes).map_err(|error| {
                let reason = format!("no list of attributes in its metadata: {error}");
                Error::invalid_file(path, reason)
            })?;
        let values = attributes.iter().map(|(_, values)| values.len()).sum();
        let stages = (0..WIDTHS.len() - 1)
            .map(|i| {
                Stage::load(
                    &weights.scope(format!("stages.{i}")),
                    [WIDTHS[i], WIDTHS[i + 1]],
                )
            })
            .collect::<Result<_>>()?;
        let flat = WIDTHS[WIDTHS.len() - 1] * POOLED * POOLED;
        let judge = Self {
            attributes,
            stages,
            hidden: Linear::load(&weights.scope("hidden"), flat, HIDDEN)?,
            out: Linear::load(&weights.scope("out"), HIDDEN, values)?,
            device: device.clone(),
        };
        weights.check_all_used(&[])?;
        Ok(judge)
    }

    /// Every attribute with its values.
    pub fn attributes(&self) -> &[(String, Vec<String>)] {
        &self.attributes
    }

    /// The first attribute and value of the pictures that the judge does not know.
    pub fn unknown<'a>(&self, told: &'a Attributes) -> Option<(&'a str, &'a str)> {
        let known = |name: &str, value: &String| {
            let mut attributes = self.attributes.iter();
            attributes.any(|(own, values)| own == name && values.contains(value))
        };
        let pictures = [&told.a, &told.a_prime, &told.b, &told.b_prime];
        let mut all = pictures.into_iter().flatten();
        let unknown = all.find(|(name, value)| !known(name, value))?;
        Some((unknown.0, unknown.1))
    }

    /// Runs the judge on a picture, fitted to 128 × 128.
    pub fn look(&self, image: &RgbImage) -> Judged {
        let mut x = to_tensor(image, [SIDE; 2], &self.device).permute([0, 2, 3, 1]); // [1, h, w, 3]
        let mut stages = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
            x = stage.forward(x);
            stages.push((host(x.clone()), x.dims()[3]));
        }
        let [_, h, w, c] = x.dims();
        let pooled = x
            .reshape([POOLED, h / POOLED, POOLED, w / POOLED * c])
            .mean_dim(1) // rows of a cell
            .reshape([POOLED, POOLED, w / POOLED, c])
            .mean_dim(2) // its columns
            .reshape([POOLED * POOLED, c])
            .transpose(); // channels first, as the layer was trained
        let flat: Tensor<2> = pooled.reshape([1, c * POOLED * POOLED]);
        let hidden = Activation::Silu.forward(self.hidden.forward(flat));
        let scores = host(self.out.forward(hidden.clone()));
        Judged {
            attributes: self.most_likely(&scores),
            features: host(hidden),
            stages,
        }
    }

    fn most_likely(&self, scores: &[f32]) -> SceneAttributes {
        let mut rest = scores;
        let mut shown = SceneAttributes::new();
        for (name, values) in &self.attributes {
            let (own, others) = rest.split_at(values.len());
            rest = others;
            let best = values
                .iter()
                .zip(own)
                .max_by(|(_, a), (_, b)| a.total_cmp(b));
            shown.extend(best.map(|(value, _)| (name.clone(), value.clone())));
        }
        shown
    }
}

impl Stage {
    fn load(weights: &Weights, [c_in, c_out]: [usize; 2]) -> Result<Self> {
        let layer = |number: usize, c_in, stride| {
            let conv = Conv2d::load(&weights.scope(number), [c_in, c_out], 3, stride, 1)?;
            let norm = GroupNorm::load(&weights.scope(number + 1), GROUPS, c_out, 1e-5)?;
            Ok::<_, Error>((conv, norm))
        };
        Ok(Self {
            halve: layer(0, c_in, 2)?,
            refine: layer(3, c_out, 1)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        [&self.halve, &self.refine]
            .into_iter()
            .fold(x, |x, (conv, norm)| {
                norm.forward_act(conv.forward_channels_last(x), Activation::Silu)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_another_world_are_not_known() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .join("demo/benchmark/judge.safetensors");
        let judge = Judge::open(&path, &Device::flex()).unwrap();
        let scene = |pairs: &[(&str, &str)]| -> SceneAttributes {
            let pairs = pairs.iter().copied();
            pairs
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect()
        };
        let known = Attributes {
            b: scene(&[("sky", "day"), ("size", "small")]),
            b_prime: scene(&[("sky", "night"), ("size", "small")]),
            ..Attributes::default()
        };
        assert_eq!(judge.unknown(&known), None);
        for other in [("sky", "aurora"), ("material", "day")] {
            let told = Attributes {
                b_prime: scene(&[("color", "red"), other]),
                ..known.clone()
            };
            assert_eq!(judge.unknown(&told), Some(other));
        }
    }
}
