//! A block of FLUX.1 in which picture and prompt are one stream, and attention and a feed-forward network
//! are parallel.

use burn::tensor::Tensor;

use crate::Result;
use crate::models::denoiser::joint_block::{
    BlockOptions, Modulation, Projections, Sight, gated, modulated, turned, within_range,
};
use crate::models::denoiser::recompute::recomputed_streams;
use crate::models::layers::{Activation, Linear};
use crate::weights::Weights;

/// `FluxSingleTransformerBlock` of diffusers.
#[derive(Debug, Clone)]
pub(super) struct SingleBlock {
    heads: usize,
    modulation: Modulation,
    projections: Projections,
    /// The input projection of the feed-forward network, four times as wide.
    inner: Linear,
    /// The output projection of attention and network together.
    outer: Linear,
}

impl SingleBlock {
    pub(super) fn load(weights: &Weights, options: BlockOptions) -> Result<Self> {
        let d = options.width();
        Ok(Self {
            heads: options.heads,
            modulation: Modulation::of_block(&weights.scope("norm"), options, 3, 0)?,
            projections: Projections::own(&weights.scope("attn"), options)?,
            inner: Linear::load(&weights.scope("proj_mlp"), d, 4 * d)?,
            outer: Linear::load(&weights.scope("proj_out"), 5 * d, d)?,
        })
    }

    /// All tokens after the block, the picture's first.
    ///
    /// # Shapes
    /// `x` `[b, n + m, d]`; `told` `[b, 1, d]`, activated, or shift, scale and gate, `[b, 3, d]`.
    pub(super) fn forward(&self, x: Tensor<3>, told: &Tensor<3>, sight: &Sight) -> Tensor<3> {
        let parts = self.modulation.parts(told);
        let normed = self.modulation.norm.forward(x.clone());
        let normed = modulated(normed, &parts[0], &parts[1]);
        let own = turned(self.projections.forward(&normed), sight.rotation.as_ref());
        let attended = sight.attend(own, self.heads);
        let inner = Activation::GeluTanh.forward(self.inner.forward(normed));
        let outer = self.outer.forward(Tensor::cat(vec![attended, inner], 2));
        within_range(gated(x, outer, &parts[2]))
    }

    /// As [`forward`](Self::forward), but nothing inside the block is kept for the backward pass, which
    /// computes it again.
    pub(super) fn recomputed(&self, x: Tensor<3>, told: &Tensor<3>, sight: &Sight) -> Tensor<3> {
        let (block, sight) = (self.clone(), sight.clone());
        let [x] = recomputed_streams([x, told.clone()], move |[x, told]| {
            [block.forward(x, &told, &sight)]
        });
        x
    }
}
