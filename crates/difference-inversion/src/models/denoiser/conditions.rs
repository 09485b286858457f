//! The inputs of a denoiser besides the noisy latents.

use burn::tensor::{DType, Tensor};

/// The positions of a row up to the last at which anything of its prompt is present, at least one.
pub(super) fn present(row: &[f32]) -> usize {
    let last = row.iter().rposition(|&share| share != 0.0);
    last.map_or(1, |last| last + 1)
}

/// The conditions of a denoiser, with a row for each prompt.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// The prompt as the denoiser attends to it, [b, n, d]: the text encoders' hidden states.
    pub context: Tensor<3>,
    /// The weight of the prompt at each of the n positions of a row: 1 in the prompt, 0 in the padding up to the
    /// longest prompt of the batch, and in between where only one of two mixed prompts has a token.
    pub presence: Vec<Vec<f32>>,
    /// The prompt as one vector, [b, e], where the denoiser takes one.
    pub pooled: Option<Tensor<2>>,
    /// The input from a picture, [b, c, h, w]: the latents of InstructPix2Pix's picture, or
    /// inpainting's mask and the latents of its picture.
    pub image: Option<Tensor<4>>,
}

impl Conditions {
    /// A prompt that fills all of its positions, and nothing else.
    ///
    /// # Shapes
    /// `context`: [b, n, d]
    pub fn new(context: Tensor<3>) -> Self {
        let [b, n, _] = context.dims();
        Self {
            context,
            presence: vec![vec![1.0; n]; b],
            pooled: None,
            image: None,
        }
    }

    /// The same with a picture.
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
        let presence = self.presence.iter();
        Self {
            context: repeat_rows(self.context, count),
            presence: presence.flat_map(|row| vec![row.clone(); count]).collect(),
            pooled: self.pooled.map(|pooled| repeat_rows(pooled, count)),
            image: self.image.map(|image| repeat_rows(image, count)),
        }
    }

    /// The rows of all, which are conditions of one pipeline; shorter prompts are padded with
    /// zeros.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn cat(all: &[Self]) -> Self {
        let longest = all.iter().map(|one| one.context.dims()[1]).max();
        let longest = longest.unwrap_or(0);
        let contexts = (all.iter()).map(|one| filled_up(one.context.clone(), longest));
        let presence = all.iter().flat_map(|one| one.presence_to(longest));
        let pooled: Option<Vec<_>> = all.iter().map(|one| one.pooled.clone()).collect();
        let images: Option<Vec<_>> = all.iter().map(|one| one.image.clone()).collect();
        Self {
            context: Tensor::cat(contexts.collect(), 0),
            presence: presence.collect(),
            pooled: pooled.map(|pooled| Tensor::cat(pooled, 0)),
            image: images.map(|images| Tensor::cat(images, 0)),
        }
    }

    /// Interpolates the prompt towards another by `strength`, or extrapolates beyond it; the picture stays.
    #[must_use]
    pub fn towards(self, other: Self, strength: f64) -> Self {
        let longest = self.context.dims()[1].max(other.context.dims()[1]);
        let presence = self.presence_to(longest).zip(other.presence_to(longest));
        let mixed = |(own, other): (Vec<f32>, Vec<f32>)| {
            let pairs = own.into_iter().zip(other);
            let mixed = pairs.map(|(own, other)| own + strength as f32 * (other - own));
            mixed.collect()
        };
        let presence = presence.map(mixed).collect();
        let [from, to] = [self.context, other.context].map(|one| filled_up(one, longest));
        Self {
            context: towards(from, to, strength),
            presence,
            pooled: (self.pooled.zip(other.pooled))
                .map(|(own, other)| towards(own, other, strength)),
            image: self.image,
        }
    }

    /// The presence of `length` positions in each row, 0 behind those that there are.
    fn presence_to(&self, length: usize) -> impl Iterator<Item = Vec<f32>> {
        self.presence.iter().map(move |row| {
            let mut row = row.clone();
            row.resize(length, 0.0);
            row
        })
    }

    /// The same without a prompt: context and pooled prompt are zeros.
    #[must_use]
    pub fn without_prompt(&self) -> Self {
        Self {
            context: self.context.zeros_like(),
            presence: self.presence.clone(),
            pooled: self.pooled.as_ref().map(Tensor::zeros_like),
            image: self.image.clone(),
        }
    }

    /// The same in another number format.
    #[must_use]
    pub fn cast(self, dtype: DType) -> Self {
        Self {
            context: self.context.cast(dtype),
            presence: self.presence,
            pooled: self.pooled.map(|pooled| pooled.cast(dtype)),
            image: self.image.map(|image| image.cast(dtype)),
        }
    }
}

/// `from + strength · (to − from)`
fn towards<const D: usize>(from: Tensor<D>, to: Tensor<D>, strength: f64) -> Tensor<D> {
    from.clone() + (to - from) * strength
}

/// A context [b, n, d] padded with zeros to `length` positions.
fn filled_up(context: Tensor<3>, length: usize) -> Tensor<3> {
    let [b, n, d] = context.dims();
    if n >= length {
        return context;
    }
    let options = (&context.device().without_autodiff(), context.dtype());
    let zeros = Tensor::zeros([b, length - n, d], options);
    Tensor::cat(vec![context, zeros], 1) // [b, length, d]
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
    use crate::util::tensors::host;

    fn conditions(value: f32) -> Conditions {
        let device = Device::flex();
        let floats = |values: [f32; 2]| Tensor::<1>::from_floats(values, &device);
        Conditions {
            pooled: Some(floats([value, -value]).reshape([1, 2])),
            image: Some(floats([value, 7.0]).reshape([1, 1, 1, 2])),
            ..Conditions::new(floats([value, value + 0.5]).reshape([1, 2, 1]))
        }
    }

    #[test]
    fn every_part_is_repeated_and_joined_row_by_row() {
        let both = Conditions::cat(&[conditions(1.0), conditions(2.0)]).repeat_each(2);
        let states = host(both.context);
        assert_eq!(states, [1.0, 1.5, 1.0, 1.5, 2.0, 2.5, 2.0, 2.5]);
        assert_eq!(both.presence, vec![[1.0; 2]; 4]);
        let pooled = host(both.pooled.unwrap());
        assert_eq!(pooled, [1.0, -1.0, 1.0, -1.0, 2.0, -2.0, 2.0, -2.0]);
        let image = host(both.image.unwrap());
        assert_eq!(image, [1.0, 7.0, 1.0, 7.0, 2.0, 7.0, 2.0, 7.0]);
    }

    #[test]
    fn shorter_prompts_are_filled_up() {
        let long = Tensor::<1>::from_floats([1.0, 2.0, 3.0], &Device::flex());
        let long = Conditions::new(long.reshape([1, 3, 1]));
        let short = Conditions::new(conditions(4.0).context);
        let both = Conditions::cat(&[short.clone(), long.clone()]);
        assert_eq!(host(both.context), [4.0, 4.5, 0.0, 1.0, 2.0, 3.0]);
        assert_eq!(both.presence, [[1.0, 1.0, 0.0], [1.0; 3]]);
        let none = short.clone().towards(long.clone(), 0.0);
        assert_eq!(none.presence, [[1.0, 1.0, 0.0]]);
        let between = short.towards(long, 0.5);
        assert_eq!(host(between.context), [2.5, 3.25, 1.5]);
        assert_eq!(between.presence, [[1.0, 1.0, 0.5]]);
    }

    #[test]
    fn conditions_without_prompt_keep_the_picture() {
        let empty = conditions(3.0).without_prompt();
        assert_eq!(host(empty.context), [0.0, 0.0]);
        assert_eq!(host(empty.pooled.unwrap()), [0.0, 0.0]);
        assert_eq!(host(empty.image.unwrap()), [3.0, 7.0]);
    }
}
