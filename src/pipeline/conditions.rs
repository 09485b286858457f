//! What the U-Net is told besides the noisy latents.

use burn::tensor::Tensor;

use crate::models::unet::AddedConditions;

/// What the U-Net is conditioned on, a row for each prompt.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// The text encoders' hidden states [b, n, d], those of several side by side.
    pub encoder_hidden_states: Tensor<3>,
    /// SDXL's pooled prompt and sizes.
    pub added: Option<AddedConditions>,
    /// What stands behind the noisy latents' channels, [b, c, h, w]: the latents of InstructPix2Pix's
    /// picture, or inpainting's mask and the latents of its picture.
    pub image: Option<Tensor<4>>,
}

impl Conditions {
    /// The same beside a picture.
    ///
    /// # Shapes
    /// `image`: [b, c, h, w]
    #[must_use]
    pub fn with_image(self, image: Tensor<4>) -> Self {
        Self {
            image: Some(image),
            ..self
        }
    }

    /// Each row `count` times in a row.
    #[must_use]
    pub fn repeat_each(self, count: usize) -> Self {
        if count == 1 {
            return self;
        }
        Self {
            encoder_hidden_states: repeat_rows(self.encoder_hidden_states, count),
            added: self.added.map(|added| AddedConditions {
                text_embeds: repeat_rows(added.text_embeds, count),
                time_ids: repeat_rows(added.time_ids, count),
            }),
            image: self.image.map(|image| repeat_rows(image, count)),
        }
    }

    /// The rows of all, which are conditions of one pipeline.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn cat(all: &[Self]) -> Self {
        let states = all.iter().map(|one| one.encoder_hidden_states.clone());
        let added: Option<Vec<_>> = all.iter().map(|one| one.added.clone()).collect();
        let images: Option<Vec<_>> = all.iter().map(|one| one.image.clone()).collect();
        Self {
            encoder_hidden_states: Tensor::cat(states.collect(), 0),
            added: added.map(|added| {
                let (embeds, ids) = (added.into_iter())
                    .map(|one| (one.text_embeds, one.time_ids))
                    .unzip();
                AddedConditions {
                    text_embeds: Tensor::cat(embeds, 0),
                    time_ids: Tensor::cat(ids, 0),
                }
            }),
            image: images.map(|images| Tensor::cat(images, 0)),
        }
    }

    /// The prompt's share `strength` of the way to another, or beyond it; everything else stays.
    #[must_use]
    pub fn towards(self, other: Self, strength: f64) -> Self {
        Self {
            encoder_hidden_states: towards(
                self.encoder_hidden_states,
                other.encoder_hidden_states,
                strength,
            ),
            added: (self.added.zip(other.added)).map(|(own, other)| AddedConditions {
                text_embeds: towards(own.text_embeds, other.text_embeds, strength),
                time_ids: own.time_ids,
            }),
            image: self.image,
        }
    }

    /// The same without a prompt: hidden states and pooled prompt are zeros.
    #[must_use]
    pub fn without_prompt(&self) -> Self {
        Self {
            encoder_hidden_states: self.encoder_hidden_states.zeros_like(),
            added: self.added.as_ref().map(|added| AddedConditions {
                text_embeds: added.text_embeds.zeros_like(),
                time_ids: added.time_ids.clone(),
            }),
            image: self.image.clone(),
        }
    }
}

/// `from + strength · (to − from)`
fn towards<const D: usize>(from: Tensor<D>, to: Tensor<D>, strength: f64) -> Tensor<D> {
    from.clone() + (to - from) * strength
}

/// Each row of `x` `count` times in a row.
fn repeat_rows<const D: usize>(x: Tensor<D>, count: usize) -> Tensor<D> {
    let mut shape = x.dims();
    let [rows, length] = [shape[0], shape[1..].iter().product()];
    shape[0] *= count;
    x.reshape([rows, 1, length])
        .repeat_dim(1, count) // [rows, count, length]
        .reshape(shape)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::tokens::host;

    fn conditions(value: f32) -> Conditions {
        let device = Device::flex();
        let floats = |values: [f32; 2]| Tensor::<1>::from_floats(values, &device);
        Conditions {
            encoder_hidden_states: floats([value, value + 0.5]).reshape([1, 2, 1]),
            added: Some(AddedConditions {
                text_embeds: floats([value, -value]).reshape([1, 2]),
                time_ids: floats([64.0, value]).reshape([1, 2]),
            }),
            image: Some(floats([value, 7.0]).reshape([1, 1, 1, 2])),
        }
    }

    #[test]
    fn every_part_is_repeated_and_joined_row_by_row() {
        let both = Conditions::cat(&[conditions(1.0), conditions(2.0)]).repeat_each(2);
        let states = host(both.encoder_hidden_states);
        assert_eq!(states, [1.0, 1.5, 1.0, 1.5, 2.0, 2.5, 2.0, 2.5]);
        let added = both.added.unwrap();
        let embeds = host(added.text_embeds);
        assert_eq!(embeds, [1.0, -1.0, 1.0, -1.0, 2.0, -2.0, 2.0, -2.0]);
        let ids = host(added.time_ids);
        assert_eq!(ids, [64.0, 1.0, 64.0, 1.0, 64.0, 2.0, 64.0, 2.0]);
        let image = host(both.image.unwrap());
        assert_eq!(image, [1.0, 7.0, 1.0, 7.0, 2.0, 7.0, 2.0, 7.0]);
    }

    #[test]
    fn conditions_without_prompt_keep_the_sizes() {
        let empty = conditions(3.0).without_prompt();
        assert_eq!(host(empty.encoder_hidden_states), [0.0, 0.0]);
        let added = empty.added.unwrap();
        assert_eq!(host(added.text_embeds), [0.0, 0.0]);
        assert_eq!(host(added.time_ids), [64.0, 3.0]);
    }
}
