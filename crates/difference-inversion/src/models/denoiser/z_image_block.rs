//! A block of Z-Image: attention and a gated network, each between two norms.

use burn::tensor::Tensor;
use dinv_kernels::gradient::recomputed_tokens;

use crate::Result;
use crate::models::denoiser::joint_block::{
    BlockOptions, Projections, gated, turned, within_range,
};
use crate::models::denoiser::z_image::ZImageConfig;
use crate::models::layers::{Activation, Linear, Mask, RmsNorm, multi_head_attention};
use crate::models::rotation::Rotation;
use crate::weights::Weights;

/// The norms before and after one half of a block.
#[derive(Debug, Clone)]
struct Norms {
    before: RmsNorm,
    after: RmsNorm,
}

impl Norms {
    fn load(weights: &Weights, name: &str, config: &ZImageConfig) -> Result<Self> {
        let norm = |place: usize| {
            let weights = weights.scope(format!("{name}{place}"));
            RmsNorm::load(&weights, config.dim, config.norm_eps)
        };
        Ok(Self {
            before: norm(1)?,
            after: norm(2)?,
        })
    }

    /// `x` plus what `half` makes of it; `parts` are its scale and its gate, if the block has them.
    fn around(
        &self,
        x: Tensor<3>,
        parts: Option<&[Tensor<3>]>,
        half: impl FnOnce(Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let normed = self.before.forward(x.clone());
        match parts {
            Some(parts) => {
                let found = half(normed * (parts[0].clone() + 1.0));
                gated(x, self.after.forward(found), &parts[1].clone().tanh())
            }
            None => x + self.after.forward(half(normed)),
        }
    }
}

/// `ZImageTransformerBlock` of diffusers.
#[derive(Debug, Clone)]
pub(super) struct Block {
    heads: usize,
    /// Makes scales and gates of an embedded time. Blocks of the prompt alone have none.
    modulation: Option<Linear>,
    attention_norms: Norms,
    projections: Projections,
    output: Linear,
    network_norms: Norms,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    /// `time` is the width of an embedded time, of a block that reads one.
    pub(super) fn load(
        weights: &Weights,
        config: &ZImageConfig,
        options: BlockOptions,
        time: Option<usize>,
    ) -> Result<Self> {
        let (d, inner) = (config.dim, config.inner_width());
        let (attention, network) = (weights.scope("attention"), weights.scope("feed_forward"));
        let linear = |weights: &Weights, name: &str, d_in, d_out| {
            Linear::load_without_bias(&weights.scope(name), d_in, d_out)
        };
        let modulation = |time| Linear::load(&weights.scope("adaLN_modulation.0"), time, 4 * d);
        Ok(Self {
            heads: options.heads,
            modulation: time.map(modulation).transpose()?,
            attention_norms: Norms::load(weights, "attention_norm", config)?,
            projections: Projections::own(&attention, options)?,
            output: linear(&attention, "to_out.0", d, d)?,
            network_norms: Norms::load(weights, "ffn_norm", config)?,
            gate: linear(&network, "w1", d, inner)?,
            up: linear(&network, "w3", d, inner)?,
            down: linear(&network, "w2", inner, d)?,
        })
    }

    /// The weights that make keys.
    pub(super) fn keys(&self) -> Tensor<2> {
        self.projections.keys()
    }

    /// All tokens after the block.
    ///
    /// # Shapes
    /// `x` `[b, n, d]`, `told` the embedded time `[b, 1, e]`
    pub(super) fn forward(&self, x: Tensor<3>, told: &Tensor<3>, rotation: &Rotation) -> Tensor<3> {
        let parts =
            (self.modulation.as_ref()).map(|linear| linear.forward(told.clone()).chunk(4, 2));
        let parts = parts.as_deref();
        let x = (self.attention_norms).around(x, parts.map(|parts| &parts[..2]), |x| {
            let [query, key, value] = turned(self.projections.forward(&x), Some(rotation));
            let attended = multi_head_attention(query, key, value, self.heads, Mask::None);
            self.output.forward(attended)
        });
        let x = (self.network_norms).around(x, parts.map(|parts| &parts[2..]), |x| {
            let gate = Activation::Silu.forward(self.gate.forward(x.clone()));
            self.down.forward(gate * self.up.forward(x))
        });
        within_range(x)
    }

    /// As [`forward`](Self::forward), but nothing inside the block is kept for the backward pass, which
    /// computes it once more. No gradient flows to `told`.
    pub(super) fn recomputed(
        &self,
        x: Tensor<3>,
        told: &Tensor<3>,
        rotation: &Rotation,
    ) -> Tensor<3> {
        let (block, told, rotation) = (self.clone(), told.clone(), rotation.clone());
        recomputed_tokens(x, move |x| block.forward(x, &told, &rotation))
    }
}
