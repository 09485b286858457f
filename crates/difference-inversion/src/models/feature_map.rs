//! Layers for feature maps, which are channels-last, `[b, h, w, c]`, unless stated otherwise.

use burn::tensor::module::{conv2d, interpolate};
use burn::tensor::ops::{ConvOptions, InterpolateMode, InterpolateOptions};
use burn::tensor::{DType, Tensor};
use dinv_kernels::{self as kernels, conv::Geometry};

use crate::Result;
use crate::models::layers::{Activation, Linear};
use crate::weights::Weights;

/// A two-dimensional convolution with a square kernel.
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[kernel · kernel · c_in, c_out]`, the checkpoint's weight in the order of channels-last
    /// neighbourhoods; or, if the layer is the same linear map of every position, `[c_out, c_in]`.
    /// In the requested type of weights.
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    channels: [usize; 2],
    geometry: Geometry,
}

impl Conv2d {
    /// Reads `weight` `[c_out, c_in, kernel, kernel]` and `bias` `[c_out]`; `padding` zeros are
    /// added on every side.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(
        weights: &Weights,
        [c_in, c_out]: [usize; 2],
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let bias = Some(weights.tensor("bias", [c_out])?);
        let channels = [c_in, c_out];
        Ok(Self {
            bias,
            ..Self::load_without_bias(weights, channels, kernel, stride, padding)?
        })
    }

    /// Reads `weight` `[c_out, c_in, kernel, kernel]`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_without_bias(
        weights: &Weights,
        channels @ [c_in, c_out]: [usize; 2],
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        let weight = weights.matrix("weight", [c_out, c_in, kernel, kernel])?;
        let geometry = Geometry {
            kernel,
            stride,
            padding,
        };
        Ok(Self {
            weight: if geometry == Geometry::POINTWISE {
                weight.reshape([c_out, c_in])
            } else {
                let weight = weight.permute([2, 3, 1, 0]);
                weight.reshape([kernel * kernel * c_in, c_out])
            },
            bias: None,
            channels,
            geometry,
        })
    }

    /// The weight in the layer's own order.
    pub(crate) fn weight(&self) -> &Tensor<2> {
        &self.weight
    }

    /// # Shapes
    /// `[b, c_in, h, w]` to `[b, c_out, h', w']`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        channels_first(self.forward_channels_last(channels_last(x)))
    }

    /// # Shapes
    /// `[b, h, w, c_in]` to `[b, h', w', c_out]`.
    pub fn forward_channels_last(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, h, w, _] = x.dims();
        let Geometry {
            kernel,
            stride,
            padding,
        } = self.geometry;
        let size = |size: usize| (size + 2 * padding - kernel) / stride + 1;
        self.forward_to(x, [size(h), size(w)])
    }

    /// As [`forward_channels_last`](Self::forward_channels_last), for a given size of the output:
    /// as many zeros as needed are added below and to the right.
    ///
    /// # Shapes
    /// `[b, h, w, c_in]` to `[b, output[0], output[1], c_out]`.
    pub fn forward_to(&self, x: Tensor<4>, output: [usize; 2]) -> Tensor<4> {
        let Geometry {
            kernel,
            stride,
            padding,
        } = self.geometry;
        if self.geometry == Geometry::POINTWISE {
            let (weight, bias) = (self.weight.clone(), self.bias.clone());
            return Linear::new(weight, bias).forward(x);
        }
        if kernels::available(&x) {
            let bias = self.bias.clone();
            return kernels::conv::conv(x, &self.weight, bias, self.geometry, output);
        }
        let [b, h, w, _] = x.dims();
        let end = |size: usize, output: usize| {
            ((output - 1) * stride + kernel).saturating_sub(size + padding)
        };
        let (bottom, right) = (end(h, output[0]), end(w, output[1]));
        let x = channels_first(x).pad((padding, right, padding, bottom), 0.0);
        let [c_in, c_out] = self.channels;
        let weight = self.weight.clone().reshape([kernel, kernel, c_in, c_out]);
        let weight = weight.permute([3, 2, 0, 1]);
        // The weights may have any type, and half precision is too coarse for sums of thousands of products.
        let (dtype, bias) = (x.dtype(), self.bias.clone());
        let [x, weight] = [x, weight].map(|x| x.cast(DType::F32));
        let options = ConvOptions::new([stride; 2], [0; 2], [1; 2], 1);
        let y = conv2d(x, weight, bias.map(|bias| bias.cast(DType::F32)), options).cast(dtype);
        channels_last(y.slice([0..b, 0..c_out, 0..output[0], 0..output[1]]))
    }
}

/// `[b, c, h, w]` to `[b, h, w, c]`.
pub(super) fn channels_last(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 2, 3, 1])
}

/// `[b, h, w, c]` to `[b, c, h, w]`.
pub(super) fn channels_first(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 3, 1, 2])
}

/// Group normalisation over channels and positions
/// ([Wu and He 2018](https://arxiv.org/abs/1803.08494)).
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, both `[channels]`; `groups` must divide `channels`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if one is missing or of another shape.
    pub fn load(weights: &Weights, groups: usize, channels: usize, epsilon: f64) -> Result<Self> {
        let weight = weights.tensor("weight", [channels])?;
        let bias = weights.tensor("bias", [channels])?;
        Ok(Self {
            weight,
            bias,
            groups,
            epsilon,
        })
    }

    /// Statistics are computed in f32 regardless of the type of `x`: the squares of half-precision
    /// activations overflow.
    ///
    /// # Shapes
    /// `[b, h, w, c]` to `[b, h, w, c]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        if kernels::available(&x) {
            return self.forward_fused(x, false);
        }
        let ([b, h, w, c], dtype) = (x.dims(), x.dtype());
        // [b, positions, groups, channels of a group]
        let x = x
            .cast(DType::F32)
            .reshape([b, h * w, self.groups, c / self.groups]);
        let mean = |x: Tensor<4>| x.mean_dim(1).mean_dim(3);
        let x = x.clone() - mean(x);
        let variance = mean(x.clone() * x.clone());
        let x = x / (variance + self.epsilon).sqrt();
        let weight = self.weight.clone().cast(DType::F32).reshape([1, 1, 1, c]);
        let bias = self.bias.clone().cast(DType::F32).reshape([1, 1, 1, c]);
        (x.reshape([b, h, w, c]) * weight + bias).cast(dtype)
    }

    /// [`forward`](Self::forward) followed by `activation`, as every residual block has it.
    pub fn forward_act(&self, x: Tensor<4>, activation: Activation) -> Tensor<4> {
        if activation == Activation::Silu && kernels::available(&x) {
            return self.forward_fused(x, true);
        }
        activation.forward(self.forward(x))
    }

    fn forward_fused(&self, x: Tensor<4>, silu: bool) -> Tensor<4> {
        let parameters = [self.weight.clone(), self.bias.clone()];
        kernels::norm::group_norm(x, parameters, self.groups, self.epsilon, silu)
    }
}

/// Enlarges or shrinks by taking the nearest position above and to the left.
///
/// # Shapes
/// `[b, h, w, c]` to `[b, size[0], size[1], c]`.
pub fn resize_nearest(x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
    if kernels::available(&x) {
        return kernels::pointwise::resize_nearest(x, size);
    }
    let options = InterpolateOptions::new(InterpolateMode::Nearest).with_output_size(size);
    channels_last(interpolate(channels_first(x), options))
}

#[cfg(test)]
mod tests {
    use super::super::layers::tests::{assert_close, tensor, weights};
    use super::*;

    #[test]
    fn conv_correlates_without_flipping_the_kernel() {
        let w = weights(&[
            ("weight", &[1, 1, 2, 2], &[1., 2., 3., 4.]),
            ("bias", &[1], &[0.5]),
        ]);
        let conv = Conv2d::load(&w, [1, 1], 2, 1, 0).unwrap();
        assert_close(
            conv.forward(tensor([1, 1, 2, 2], &[1., 10., 100., 1000.])),
            &[4321.5],
        );
    }

    #[test]
    fn group_norm_normalises_each_group() {
        let w = weights(&[
            ("weight", &[4], &[1., 1., 2., 1.]),
            ("bias", &[4], &[0., 0., 0., 5.]),
        ]);
        let norm = GroupNorm::load(&w, 2, 4, 0.).unwrap();
        // Two positions of four channels.
        let y = norm.forward(tensor([1, 2, 1, 4], &[1., 3., 0., 8., 1., 3., 0., 8.]));
        assert_close(y, &[-1., 1., -2., 6., -1., 1., -2., 6.]);
    }
}
