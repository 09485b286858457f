//! The blocks of FLUX.2. They differ from FLUX.1's: all blocks of a kind share one modulation, feed-forward
//! layers are gated, nothing has a bias, and the prompt's tokens have positions of their own.

use burn::tensor::Tensor;
use dinv_kernels::gradient::recomputed_tokens;

use crate::Result;
use crate::models::denoiser::joint_block::{
    BlockOptions, EPSILON, Projections, gated, joined, modulated, turned, within_range,
};
use crate::models::denoiser::recompute::recomputed_streams;
use crate::models::layers::{LayerNorm, Linear, Mask, RmsNorm, gated_silu, multi_head_attention};
use crate::models::rotation::Rotation;
use crate::weights::Weights;

/// The layers of the picture's tokens; the prompt's tokens have the same.
#[derive(Debug, Clone)]
struct Stream {
    projections: Projections,
    output: Linear,
    /// Gate and value, side by side.
    inner: Linear,
    outer: Linear,
}

impl Stream {
    fn load(
        projections: Projections,
        output: &Weights,
        network: &Weights,
        [d, inner]: [usize; 2],
    ) -> Result<Self> {
        let linear =
            |weights: &Weights, d_in, d_out| Linear::load_without_bias(weights, d_in, d_out);
        Ok(Self {
            projections,
            output: linear(output, d, d)?,
            inner: linear(&network.scope("linear_in"), d, 2 * inner)?,
            outer: linear(&network.scope("linear_out"), inner, d)?,
        })
    }

    /// Queries, keys and values; `parts` are the attention's shift, scale and gate, then the network's.
    fn asked(&self, x: &Tensor<3>, norm: &LayerNorm, parts: &[Tensor<3>]) -> [Tensor<3>; 3] {
        let normed = modulated(norm.forward(x.clone()), &parts[0], &parts[1]);
        self.projections.forward(&normed)
    }

    /// `x` plus the output of the attention, and then plus that of the network.
    fn after(
        &self,
        x: Tensor<3>,
        attended: Tensor<3>,
        norm: &LayerNorm,
        parts: &[Tensor<3>],
    ) -> Tensor<3> {
        let x = gated(x, self.output.forward(attended), &parts[2]);
        let normed = modulated(norm.forward(x.clone()), &parts[3], &parts[4]);
        let outer = self.outer.forward(gated_silu(self.inner.forward(normed)));
        gated(x, outer, &parts[5])
    }
}

/// `Flux2TransformerBlock` of diffusers: picture and prompt attend to both, with weights of their own.
#[derive(Debug, Clone)]
pub(super) struct DoubleBlock {
    heads: usize,
    norm: LayerNorm,
    picture: Stream,
    prompt: Stream,
}

impl DoubleBlock {
    /// `inner` is the width of the feed-forward layers.
    pub(super) fn load(weights: &Weights, options: BlockOptions, inner: usize) -> Result<Self> {
        let widths = [options.width(), inner];
        let attention = weights.scope("attn");
        Ok(Self {
            heads: options.heads,
            norm: LayerNorm::plain(options.width(), EPSILON, weights),
            picture: Stream::load(
                Projections::own(&attention, options)?,
                &attention.scope("to_out.0"),
                &weights.scope("ff"),
                widths,
            )?,
            prompt: Stream::load(
                Projections::added(&attention, options)?,
                &attention.scope("to_add_out"),
                &weights.scope("ff_context"),
                widths,
            )?,
        })
    }

    /// The weights of the prompt's keys.
    pub(super) fn prompt_keys(&self) -> Tensor<2> {
        self.prompt.projections.keys()
    }

    /// The picture's and the prompt's tokens after the block. `rotation` has the positions of the picture's,
    /// then of the prompt's.
    ///
    /// # Shapes
    /// `x` `[b, n, d]`, `prompt` `[b, m, d]`; `parts` for either, six times `[b, 1, d]`.
    pub(super) fn forward(
        &self,
        [x, prompt]: [Tensor<3>; 2],
        [parts, prompt_parts]: [&[Tensor<3>]; 2],
        rotation: &Rotation,
    ) -> [Tensor<3>; 2] {
        let (n, m) = (x.dims()[1], prompt.dims()[1]);
        let own = self.picture.asked(&x, &self.norm, parts);
        let added = self.prompt.asked(&prompt, &self.norm, prompt_parts);
        let [query, key, value] = turned(joined(own, added), Some(rotation));
        let attended = multi_head_attention(query, key, value, self.heads, Mask::None); // [b, n + m, d]
        let [of_picture, of_prompt] = [(0, n), (n, m)].map(|(start, length)| {
            let attended = attended.clone();
            attended.narrow(1, start, length)
        });
        let x = self.picture.after(x, of_picture, &self.norm, parts);
        let prompt = (self.prompt).after(prompt, of_prompt, &self.norm, prompt_parts);
        [x, within_range(prompt)]
    }

    /// As [`forward`](Self::forward), but nothing inside the block is kept for the backward pass, which
    /// computes it again. No gradient flows to `parts`.
    pub(super) fn recomputed(
        &self,
        streams: [Tensor<3>; 2],
        parts: [&[Tensor<3>]; 2],
        rotation: &Rotation,
    ) -> [Tensor<3>; 2] {
        let (block, rotation) = (self.clone(), rotation.clone());
        let [own, added] = parts.map(<[Tensor<3>]>::to_vec);
        recomputed_streams(streams, move |streams| {
            block.forward(streams, [&own, &added], &rotation)
        })
    }
}

/// `Flux2SingleTransformerBlock` of diffusers: picture and prompt are one stream, and attention and the
/// feed-forward network are parallel.
#[derive(Debug, Clone)]
pub(super) struct SingleBlock {
    heads: usize,
    norm: LayerNorm,
    /// Query, key, value, gate and value of the network, side by side.
    inner: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    /// The output projection of attention and network together.
    outer: Linear,
}

impl SingleBlock {
    /// `inner` is the width of the feed-forward layers.
    pub(super) fn load(weights: &Weights, options: BlockOptions, inner: usize) -> Result<Self> {
        let d = options.width();
        let attention = weights.scope("attn");
        let linear = |name: &str, d_in, d_out| {
            Linear::load_without_bias(&attention.scope(name), d_in, d_out)
        };
        let norm = |name: &str| RmsNorm::load(&attention.scope(name), options.head_dim, EPSILON);
        Ok(Self {
            heads: options.heads,
            norm: LayerNorm::plain(d, EPSILON, weights),
            inner: linear("to_qkv_mlp_proj", d, 3 * d + 2 * inner)?,
            query_norm: norm("norm_q")?,
            key_norm: norm("norm_k")?,
            outer: linear("to_out", d + inner, d)?,
        })
    }

    /// All tokens after the block, the picture's first.
    ///
    /// # Shapes
    /// `x` `[b, n + m, d]`; `parts` shift, scale and gate, `[b, 1, d]` each.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        parts: &[Tensor<3>],
        rotation: &Rotation,
    ) -> Tensor<3> {
        let normed = modulated(self.norm.forward(x.clone()), &parts[0], &parts[1]);
        let inner = self.inner.forward(normed);
        let (d, all) = (x.dims()[2], inner.dims()[2]);
        let [query, key, value] = [0, 1, 2].map(|part| inner.clone().narrow(2, part * d, d));
        let query = rotation.turn(self.query_norm.forward_heads(query));
        let key = rotation.turn(self.key_norm.forward_heads(key));
        let attended = multi_head_attention(query, key, value, self.heads, Mask::None);
        let network = gated_silu(inner.narrow(2, 3 * d, all - 3 * d));
        let outer = self.outer.forward(Tensor::cat(vec![attended, network], 2));
        within_range(gated(x, outer, &parts[2]))
    }

    /// As [`forward`](Self::forward), but nothing inside the block is kept for the backward pass, which
    /// computes it again. No gradient flows to `parts`.
    pub(super) fn recomputed(
        &self,
        x: Tensor<3>,
        parts: &[Tensor<3>],
        rotation: &Rotation,
    ) -> Tensor<3> {
        let (block, parts, rotation) = (self.clone(), parts.to_vec(), rotation.clone());
        recomputed_tokens(x, move |x| block.forward(x, &parts, &rotation))
    }
}
