//! The layers that all networks are made of. Weights are constants: gradients flow to a layer's
//! inputs only.

use burn::tensor::module::{attention, embedding, layer_norm, linear};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation};
use dinv_kernels as kernels;
use dinv_kernels::conv::Matrix;
pub use dinv_kernels::fused_attention::Mask;

use crate::weights::Weights;
use crate::{Error, Result};

/// The maximum number of layers for checks of configurations, more than any network of one width has.
pub(crate) const MOST_LAYERS: usize = 256;

/// A pointwise non-linearity, by its name in config files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
pub enum Activation {
    /// `max(0, x)`.
    #[serde(rename = "relu")]
    Relu,
    /// `x σ(x)`, also called swish.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// `x Φ(x)`, exact ([Hendrycks and Gimpel 2016](https://arxiv.org/abs/1606.08415)).
    #[serde(rename = "gelu")]
    Gelu,
    /// `x σ(1.702 x)`, the approximation that OpenAI's CLIP uses.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// The tanh approximation of `x Φ(x)`.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new")]
    GeluTanh,
}

/// The slope of `quick_gelu`'s gate relative to SiLU's.
const QUICK_GELU: f32 = 1.702;

impl Activation {
    /// Applies the non-linearity to every element, in f32 regardless of the type of `x`: the gradient of
    /// GELU has powers that overflow in half precision.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        if kernels::available(&x) {
            match self {
                Self::Silu => return kernels::pointwise::sigmoid_linear(x, 1.0),
                Self::QuickGelu => return kernels::pointwise::sigmoid_linear(x, QUICK_GELU),
                Self::Gelu => return kernels::pointwise::gelu(x),
                Self::GeluTanh => return kernels::pointwise::gelu_tanh(x),
                Self::Relu => {}
            }
        }
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let y = match self {
            Self::Relu => activation::relu(x),
            Self::Silu => activation::silu(x),
            Self::Gelu => activation::gelu(x),
            Self::QuickGelu => x.clone() * activation::sigmoid(x * QUICK_GELU),
            Self::GeluTanh => activation::gelu_approximate(x),
        };
        y.cast(dtype)
    }
}

/// Replaces `own` by `other` if both are equal, so that they need the memory of one. Returns the number of
/// shared bytes.
pub(super) fn share<const D: usize>(own: &mut Tensor<D>, other: &Tensor<D>) -> u64 {
    let alike = own.dims() == other.dims() && own.dtype() == other.dtype();
    let equal = || own.clone().equal(other.clone()).all().into_scalar::<bool>();
    if !(alike && equal()) {
        return 0;
    }
    own.clone_from(other);
    (own.shape().num_elements() * own.dtype().size()) as u64
}

/// `y = x Wᵀ + b` on the last dimension.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[d_out, d_in]`, in the requested type of weights or packed.
    weight: Matrix,
    bias: Option<Tensor<1>>,
}

impl Linear {
    /// Reads `weight` `[d_out, d_in]` and `bias` `[d_out]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if one is missing or of another shape.
    pub fn load(weights: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        let bias = Some(weights.tensor("bias", [d_out])?);
        Ok(Self {
            bias,
            ..Self::load_without_bias(weights, d_in, d_out)?
        })
    }

    /// The same for a `weight` that may be that of a 1×1 convolution, `[d_out, d_in, 1, 1]`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_squeezed(weights: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        if weights.shape("weight").is_none_or(|shape| shape.len() != 4) {
            return Self::load(weights, d_in, d_out);
        }
        let weight = weights.matrix("weight", [d_out, d_in, 1, 1])?;
        let bias = weights.tensor("bias", [d_out])?;
        Ok(Self::new(weight.reshape([d_out, d_in]), Some(bias)))
    }

    /// Reads `weight` `[d_out, d_in]`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_without_bias(weights: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        Ok(Self {
            weight: weights.linear("weight", [d_out, d_in])?,
            bias: None,
        })
    }

    /// [`load`](Self::load) or [`load_without_bias`](Self::load_without_bias).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(weights: &Weights, d_in: usize, d_out: usize, bias: bool) -> Result<Self> {
        match bias {
            true => Self::load(weights, d_in, d_out),
            false => Self::load_without_bias(weights, d_in, d_out),
        }
    }

    /// A layer of the given `weight` `[d_out, d_in]` and `bias` `[d_out]`.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: weight.into(),
            bias,
        }
    }

    /// The weight `[d_out, d_in]`.
    pub(crate) fn weight(&self) -> Tensor<2> {
        self.weight.dense(&Device::flex())
    }

    /// Shares the weights that equal those of `other`; returns the number of bytes.
    pub fn share(&mut self, other: &Self) -> u64 {
        let bias = self.bias.as_mut().zip(other.bias.as_ref());
        let bias = bias.map_or(0, |(own, other)| share(own, other));
        let weight = match (&mut self.weight, &other.weight) {
            (Matrix::Dense(own), Matrix::Dense(other)) => share(own, other),
            _ => 0,
        };
        weight + bias
    }

    /// # Shapes
    /// `[..., d_in]` to `[..., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.weight.clone(), self.bias.clone());
        if kernels::available(&x) {
            return kernels::conv::linear(x, weight, bias);
        }
        let weight = weight.dense(&x.device().without_autodiff());
        let weight = weight.cast(x.dtype()).transpose();
        linear(x, weight, bias)
    }
}

/// Layer normalisation over the last dimension
/// ([Ba et al. 2016](https://arxiv.org/abs/1607.06450)).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both `[d]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if one is missing or of another shape.
    pub fn load(weights: &Weights, d: usize, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (weights.tensor("weight", [d])?, weights.tensor("bias", [d])?);
        Ok(Self {
            weight,
            bias,
            epsilon,
        })
    }

    /// A norm of width `d` that neither scales nor shifts.
    pub fn plain(d: usize, epsilon: f64, weights: &Weights) -> Self {
        let options = (weights.device(), DType::from(weights.compute()));
        Self {
            weight: Tensor::ones([d], options),
            bias: Tensor::zeros([d], options),
            epsilon,
        }
    }

    /// As [`Linear::share`].
    pub fn share(&mut self, other: &Self) -> u64 {
        share(&mut self.weight, &other.weight) + share(&mut self.bias, &other.bias)
    }

    /// Computes in f32 regardless of the type of `x`, like [`GroupNorm`](super::feature_map::GroupNorm): squares
    /// overflow in half precision.
    ///
    /// # Shapes
    /// `[..., d]` to `[..., d]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.weight.clone(), self.bias.clone());
        if kernels::available(&x) {
            return kernels::norm::layer_norm(x, [weight, bias], self.epsilon);
        }
        let dtype = x.dtype();
        let [weight, bias] = [weight, bias].map(|parameter| parameter.cast(DType::F32));
        layer_norm(x.cast(DType::F32), weight, Some(bias), self.epsilon).cast(dtype)
    }
}

/// Division by the root mean square over the last dimension
/// ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor<1>,
    epsilon: f64,
}

impl RmsNorm {
    /// Reads `weight` `[d]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing or of another shape.
    pub fn load(weights: &Weights, d: usize, epsilon: f64) -> Result<Self> {
        Ok(Self {
            weight: weights.tensor("weight", [d])?,
            epsilon,
        })
    }

    /// Computes in f32 regardless of the type of `x`, like [`LayerNorm::forward`].
    ///
    /// # Shapes
    /// `[..., d]` to `[..., d]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        if kernels::available_on_cpu(&x) {
            return kernels::norm::rms_norm(x, self.weight.clone(), self.epsilon);
        }
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let squares = x.clone().powi_scalar(2).mean_dim(D - 1);
        let scale = squares.add_scalar(self.epsilon).sqrt().recip();
        let weight = self.weight.clone().cast(DType::F32);
        (x * scale * weight.unsqueeze::<D>()).cast(dtype)
    }

    /// The same for the part of each head, side by side.
    ///
    /// # Shapes
    /// `[b, n, heads · d]` to the same.
    pub fn forward_heads(&self, x: Tensor<3>) -> Tensor<3> {
        let (shape, d) = (x.dims(), self.weight.dims()[0]);
        let [b, n, c] = shape;
        self.forward(x.reshape([b, n, c / d, d])).reshape(shape)
    }
}

/// A table of vectors looked up by number.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Tensor<2>,
}

impl Embedding {
    /// Reads `weight` `[count, d]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing or of another shape.
    pub fn load(weights: &Weights, count: usize, d: usize) -> Result<Self> {
        Ok(Self {
            weight: weights.tensor("weight", [count, d])?,
        })
    }

    /// The whole table, `[count, d]`.
    pub fn weight(&self) -> &Tensor<2> {
        &self.weight
    }

    /// Replaces all rows after the first `kept` by `rows`, `[m, d]`.
    pub fn extend(&mut self, kept: usize, rows: Tensor<2>) {
        let rows = rows.cast(self.weight.dtype());
        let kept = self
            .weight
            .clone()
            .slice([0..kept.min(self.weight.dims()[0])]);
        self.weight = Tensor::cat(vec![kept, rows], 0);
    }

    /// As [`Linear::share`].
    pub fn share(&mut self, other: &Self) -> u64 {
        share(&mut self.weight, &other.weight)
    }

    /// The vectors of token ids, `[n, d]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for no ids, or one that is not in the table.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let [count, _] = self.weight.dims();
        if ids.is_empty() {
            return Err(Error::invalid_input("at least one token id is needed"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= count) {
            return Err(Error::invalid_input(format!(
                "token {id} is not among the {count} of the text encoder: its tokenizer belongs to \
                 another model"
            )));
        }
        let flat: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let data = TensorData::new(flat, [1, ids.len()]);
        let ids = Tensor::<2, Int>::from_data(data, &self.weight.device());
        Ok(self.forward(ids).squeeze_dim(0))
    }

    /// # Shapes
    /// `[b, n]` to `[b, n, d]`; every id must be less than `count`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.clone(), ids)
    }
}

/// `softmax(q kᵀ / √d) v` in `heads` heads
/// ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)).
///
/// # Shapes
/// `q` `[b, n, c]`, `k` and `v` `[b, m, c]`, all heads side by side in `c`; result `[b, n, c]`.
pub fn multi_head_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    mask: Mask,
) -> Tensor<3> {
    let inputs = [&q, &k, &v];
    if inputs.into_iter().all(kernels::available) && kernels::fused_attention::supports(&mask, &k) {
        return kernels::fused_attention::attention(q, k, v, heads, mask);
    }
    let hidden = match &mask {
        Mask::CausalAfter(_) => Some(hidden(&mask, &q, &k, heads)),
        Mask::None | Mask::Causal => None,
    };
    let [q, k, v] = [q, k, v].map(|x| split_heads(x, heads));
    let causal = mask == Mask::Causal;
    join_heads(attention(q, k, v, hidden, None, options(causal)))
}

/// The keys that [`Mask::CausalAfter`] hides from each query, `[b, heads, n, m]`.
fn hidden(mask: &Mask, q: &Tensor<3>, k: &Tensor<3>, heads: usize) -> Tensor<4, Bool> {
    let ([b, n, _], [_, m, _]) = (q.dims(), k.dims());
    let rows = (0..b * n).map(|place| (mask.padding(place / n), place % n + m - n));
    let hidden = rows.flat_map(|(padding, last)| {
        let padding = padding.min(last);
        (0..m).map(move |key| key < padding || key > last)
    });
    let hidden = TensorData::new(hidden.collect::<Vec<bool>>(), [b, 1, n, m]);
    Tensor::<4, Bool>::from_data(hidden, &q.device()).repeat_dim(1, heads)
}

/// As [`multi_head_attention`], with `weights` in place of the softmax: it maps the scores
/// `q kᵀ / √d` to the weights of the values, both `[b, heads, n, m]`.
pub fn weighted_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    weights: impl FnOnce(Tensor<4>) -> Tensor<4>,
) -> Tensor<3> {
    let [q, k, v] = [q, k, v].map(|x| split_heads(x, heads));
    let scale = (q.dims()[3] as f64).sqrt();
    let [q, k] = [q, k].map(|x| x.cast(DType::F32)); // scores overflow in half precision
    let scores = q.matmul(k.swap_dims(2, 3)) / scale;
    join_heads(weights(scores).cast(v.dtype()).matmul(v))
}

/// `[b, n, c]` to `[b, heads, n, c / heads]`.
fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, n, c] = x.dims();
    x.reshape([b, n, heads, c / heads]).swap_dims(1, 2)
}

/// `[b, heads, n, d]` to `[b, n, heads · d]`.
fn join_heads(x: Tensor<4>) -> Tensor<3> {
    let [b, heads, n, d] = x.dims();
    x.swap_dims(1, 2).reshape([b, n, heads * d])
}

fn options(is_causal: bool) -> AttentionModuleOptions {
    AttentionModuleOptions {
        scale: None,
        softcap: None,
        is_causal,
    }
}

/// `value · GELU(gate)` of `[value, gate]` on the last dimension
/// ([Shazeer 2020](https://arxiv.org/abs/2002.05202), GEGLU).
///
/// # Shapes
/// `[b, n, 2c]` to `[b, n, c]`.
pub fn gated_gelu(x: Tensor<3>) -> Tensor<3> {
    if kernels::available(&x) {
        return kernels::pointwise::gated_gelu(x);
    }
    let c = x.dims()[2] / 2;
    let gate = x.clone().narrow(2, c, c);
    x.narrow(2, 0, c) * Activation::Gelu.forward(gate)
}

/// `SiLU(gate) · value` of `[gate, value]` on the last dimension
/// ([Shazeer 2020](https://arxiv.org/abs/2002.05202), SwiGLU).
///
/// # Shapes
/// `[b, n, 2c]` to `[b, n, c]`.
pub fn gated_silu(x: Tensor<3>) -> Tensor<3> {
    let c = x.dims()[2] / 2;
    let gate = x.clone().narrow(2, 0, c);
    Activation::Silu.forward(gate) * x.narrow(2, c, c)
}

#[cfg(test)]
pub(super) mod tests {
    use burn::tensor::{Device, FloatDType};
    use safetensors::tensor::{Dtype, TensorView, serialize};

    use super::*;

    pub(in crate::models) fn weights(tensors: &[(&str, &[usize], &[f32])]) -> Weights {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect())
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (
                *name,
                TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap(),
            )
        });
        let file = serialize(views, None).unwrap();
        Weights::from_bytes(file, "test", &Device::flex(), FloatDType::F32).unwrap()
    }

    pub(in crate::models) fn assert_close<const D: usize>(found: Tensor<D>, expected: &[f32]) {
        let found = found.try_into_vec_as::<f32>().unwrap();
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-5, "{found:?} != {expected:?}");
        }
    }

    pub(in crate::models) fn tensor<const D: usize>(
        shape: [usize; D],
        values: &[f32],
    ) -> Tensor<D> {
        Tensor::<1>::from_floats(values, &Device::flex()).reshape(shape)
    }

    #[test]
    fn linear_multiplies_by_the_transposed_weight() {
        let w = weights(&[
            ("weight", &[2, 3], &[1., 2., 3., 4., 5., 6.]),
            ("bias", &[2], &[10., 20.]),
        ]);
        let linear = Linear::load(&w, 3, 2).unwrap();
        assert_close(linear.forward(tensor([1, 3], &[1., 0., -1.])), &[8., 18.]);
        w.check_all_used(&[]).unwrap();
    }

    #[test]
    fn layer_norm_normalises_rows() {
        let w = weights(&[("weight", &[2], &[1., 3.]), ("bias", &[2], &[0., 1.])]);
        let norm = LayerNorm::load(&w, 2, 0.).unwrap();
        assert_close(
            norm.forward(tensor([2, 2], &[1., 3., 7., 5.])),
            &[-1., 4., 1., -2.],
        );
    }

    #[test]
    fn rms_norm_divides_rows_or_heads() {
        let w = weights(&[("weight", &[2], &[1., 3.])]);
        let norm = RmsNorm::load(&w, 2, 0.).unwrap();
        let x: Tensor<3> = tensor([1, 1, 4], &[1., 7., 5., -5.]);
        assert_close(norm.forward_heads(x), &[0.2, 4.2, 1., -3.]);
        let norm = RmsNorm::load(&w, 2, 7.).unwrap();
        assert_close(
            norm.forward(tensor([1, 2], &[1., 1.9f32.sqrt()])),
            &[1. / 8.45f32.sqrt(), 3. * (1.9f32 / 8.45).sqrt()],
        );
    }

    #[test]
    fn activations_at_one() {
        let at_one = |activation: Activation| {
            activation
                .forward(tensor([1], &[1.]))
                .try_into_vec_as::<f32>()
                .unwrap()[0]
        };
        for (activation, expected) in [
            (Activation::Relu, 1.),
            (Activation::Silu, 0.731_058_6),
            (Activation::Gelu, 0.841_344_7),
            (Activation::QuickGelu, 0.845_795_7),
            (Activation::GeluTanh, 0.841_192),
        ] {
            assert!(
                (at_one(activation) - expected).abs() < 1e-5,
                "{activation:?}"
            );
        }
    }

    #[test]
    fn the_first_half_is_the_gate_of_silu() {
        let x = tensor([1, 1, 4], &[1., 0., 2., 7.]);
        assert_close(gated_silu(x), &[2. * 0.731_058_6, 0.]);
    }

    #[test]
    fn attention_heads_are_apart_and_masks_hide() {
        // Two heads of one dimension; head 0 has equal scores, head 1 scores ln 3 and 0.
        let q = tensor([1, 2, 2], &[0., 1., 0., 1.]);
        let k = tensor([1, 2, 2], &[7., 3f32.ln(), 9., 0.]);
        let v = tensor([1, 2, 2], &[0., 0., 4., 4.]);
        let attend = |mask| multi_head_attention(q.clone(), k.clone(), v.clone(), 2, mask);
        assert_close(attend(Mask::None), &[2., 1., 2., 1.]);
        assert_close(attend(Mask::Causal), &[0., 0., 2., 1.]);
        let weighted = |weights: fn(Tensor<4>) -> Tensor<4>| {
            weighted_attention(q.clone(), k.clone(), v.clone(), 2, weights)
        };
        assert_close(
            weighted(|scores| activation::softmax(scores, 3)),
            &[2., 1., 2., 1.],
        );
        assert_close(weighted(|scores| scores + 1.0), &[4., 4., 4., 4.]);
    }
}
