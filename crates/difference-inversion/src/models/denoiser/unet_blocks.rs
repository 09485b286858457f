//! The blocks of the U-Net: residual blocks, transformers, and the levels made of them.
//! The autoencoder shares the residual block and the resampling layers. Feature maps are
//! channels-last, `[b, h, w, c]`.

use burn::tensor::Tensor;
use dinv_kernels::{self as kernels, gradient::recomputed};

use crate::Result;
use crate::models::denoiser::attention_control::{AttentionKind, Controlled, ControlledBlock};
use crate::models::feature_map::{Conv2d, GroupNorm, resize_nearest};
use crate::models::layers::{
    Activation, LayerNorm, Linear, Mask, gated_gelu, multi_head_attention, weighted_attention,
};
use crate::weights::Weights;

/// The settings that all blocks of one network share.
#[derive(Debug, Clone)]
pub(crate) struct BlockOptions {
    pub(crate) norm_num_groups: usize,
    pub(crate) norm_eps: f64,
    pub(crate) act_fn: Activation,
    /// Width of the time embedding; `None` in the autoencoder.
    pub(crate) time_embed_dim: Option<usize>,
}

/// Two normalised convolutions around a shortcut, shifted by the time embedding.
#[derive(Debug, Clone)]
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    act_fn: Activation,
}

impl ResnetBlock {
    pub(crate) fn load(
        weights: &Weights,
        [c_in, c_out]: [usize; 2],
        options: &BlockOptions,
    ) -> Result<Self> {
        let norm = |name: &str, channels| {
            GroupNorm::load(
                &weights.scope(name),
                options.norm_num_groups,
                channels,
                options.norm_eps,
            )
        };
        let time_emb_proj = match options.time_embed_dim {
            Some(d) => Some(Linear::load(&weights.scope("time_emb_proj"), d, c_out)?),
            None => None,
        };
        let conv_shortcut = if c_in == c_out {
            None
        } else {
            Some(Conv2d::load(
                &weights.scope("conv_shortcut"),
                [c_in, c_out],
                1,
                1,
                0,
            )?)
        };
        Ok(Self {
            norm1: norm("norm1", c_in)?,
            conv1: Conv2d::load(&weights.scope("conv1"), [c_in, c_out], 3, 1, 1)?,
            time_emb_proj,
            norm2: norm("norm2", c_out)?,
            conv2: Conv2d::load(&weights.scope("conv2"), [c_out, c_out], 3, 1, 1)?,
            conv_shortcut,
            act_fn: options.act_fn,
        })
    }

    /// `x` `[b, h, w, c_in]`, `emb` `[b, time_embed_dim]`, already activated.
    pub(crate) fn forward(&self, x: Tensor<4>, emb: Option<&Tensor<2>>) -> Tensor<4> {
        let h = self.norm1.forward_act(x.clone(), self.act_fn);
        let mut h = self.conv1.forward_channels_last(h);
        if let (Some(time_emb_proj), Some(emb)) = (&self.time_emb_proj, emb) {
            let shift = time_emb_proj.forward(emb.clone());
            let [b, c] = shift.dims();
            h = h + shift.reshape([b, 1, 1, c]);
        }
        let h = self.norm2.forward_act(h, self.act_fn);
        let h = self.conv2.forward_channels_last(h);
        match &self.conv_shortcut {
            Some(conv_shortcut) => conv_shortcut.forward_channels_last(x) + h,
            None => x + h,
        }
    }
}

/// Halves height and width (rounding up) with a strided 3×3 convolution.
#[derive(Debug, Clone)]
pub(crate) struct Downsample {
    conv: Conv2d,
    /// Whether zeros are only added right and below, as in the autoencoder.
    asymmetric: bool,
}

impl Downsample {
    /// `padding` is 1, or 0 for the autoencoder's asymmetric padding.
    pub(crate) fn load(weights: &Weights, channels: usize, padding: usize) -> Result<Self> {
        let conv = Conv2d::load(&weights.scope("conv"), [channels; 2], 3, 2, padding)?;
        Ok(Self {
            conv,
            asymmetric: padding == 0,
        })
    }

    /// `[b, h, w, c]` to `[b, h / 2, w / 2, c]`.
    pub(crate) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, h, w, _] = x.dims();
        if self.asymmetric {
            return self.conv.forward_to(x, [h / 2, w / 2]);
        }
        self.conv.forward_channels_last(x)
    }
}

/// Enlarges to a given size by repeating the nearest value, then a 3×3 convolution.
#[derive(Debug, Clone)]
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(crate) fn load(weights: &Weights, channels: usize) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::load(&weights.scope("conv"), [channels; 2], 3, 1, 1)?,
        })
    }

    /// `[b, h, w, c]` to `[b, size[0], size[1], c]`.
    pub(crate) fn forward(&self, x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        self.conv.forward_channels_last(resize_nearest(x, size))
    }
}

/// The settings of one level's transformers.
#[derive(Debug, Clone)]
pub(crate) struct TransformerOptions {
    pub(crate) heads: usize,
    /// The blocks of each transformer.
    pub(crate) layers: Vec<usize>,
    pub(crate) cross_attention_dim: usize,
    pub(crate) use_linear_projection: bool,
    pub(crate) only_cross_attention: bool,
}

/// Attention with queries from one sequence, keys and values from another or the same.
#[derive(Debug, Clone)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn load(weights: &Weights, c: usize, context_dim: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: Linear::load_without_bias(&weights.scope("to_q"), c, c)?,
            to_k: Linear::load_without_bias(&weights.scope("to_k"), context_dim, c)?,
            to_v: Linear::load_without_bias(&weights.scope("to_v"), context_dim, c)?,
            to_out: Linear::load(&weights.scope("to_out.0"), c, c)?,
            heads,
        })
    }

    /// `x` `[b, n, c]`, `context` `[b, m, context_dim]`; `weights` in place of the softmax.
    fn forward(
        &self,
        x: Tensor<3>,
        context: Tensor<3>,
        weights: Option<impl FnOnce(Tensor<4>) -> Tensor<4>>,
    ) -> Tensor<3> {
        let (q, k) = (self.to_q.forward(x), self.to_k.forward(context.clone()));
        let v = self.to_v.forward(context);
        self.to_out.forward(match weights {
            None => multi_head_attention(q, k, v, self.heads, Mask::None),
            Some(weights) => weighted_attention(q, k, v, self.heads, weights),
        })
    }
}

/// Self-attention, cross-attention to the prompt, and a gated feed-forward layer, each applied to
/// normalised input and added to it.
#[derive(Debug, Clone)]
struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    /// Projects to twice the hidden width: values and their gates.
    proj: Linear,
    out: Linear,
    only_cross_attention: bool,
}

impl BasicTransformerBlock {
    fn load(weights: &Weights, c: usize, options: &TransformerOptions) -> Result<Self> {
        let TransformerOptions {
            heads,
            cross_attention_dim,
            only_cross_attention,
            ..
        } = *options;
        let norm = |name: &str| LayerNorm::load(&weights.scope(name), c, 1e-5);
        let attention =
            |name: &str, dim: usize| Attention::load(&weights.scope(name), c, dim, heads);
        let ff = weights.scope("ff.net");
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention(
                "attn1",
                if only_cross_attention {
                    cross_attention_dim
                } else {
                    c
                },
            )?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", cross_attention_dim)?,
            norm3: norm("norm3")?,
            proj: Linear::load(&ff.scope("0.proj"), c, 8 * c)?,
            out: Linear::load(&ff.scope(2), 4 * c, c)?,
            only_cross_attention,
        })
    }

    /// `x` `[b, n, c]`, `context` `[b, m, cross_attention_dim]`.
    fn forward(
        &self,
        x: Tensor<3>,
        context: &Tensor<3>,
        control: Option<ControlledBlock<'_>>,
    ) -> Tensor<3> {
        let weights = |kind| control.and_then(|control| control.weights(kind));
        let h = self.norm1.forward(x.clone());
        let source = if self.only_cross_attention {
            context.clone()
        } else {
            h.clone()
        };
        let kind = match self.only_cross_attention {
            true => AttentionKind::ToPrompt,
            false => AttentionKind::ToItself,
        };
        let x = x + self.attn1.forward(h, source, weights(kind));
        let h = self.norm2.forward(x.clone());
        let weights = weights(AttentionKind::ToPrompt);
        let x = x + self.attn2.forward(h, context.clone(), weights);
        let h = self.proj.forward(self.norm3.forward(x.clone()));
        x + self.out.forward(gated_gelu(h))
    }
}

/// Transformer layers over the positions of a feature map.
#[derive(Debug, Clone)]
pub(crate) struct Transformer2D {
    norm: GroupNorm,
    proj_in: Linear,
    transformer_blocks: Vec<BasicTransformerBlock>,
    proj_out: Linear,
}

impl Transformer2D {
    fn load(
        weights: &Weights,
        c: usize,
        groups: usize,
        options: &TransformerOptions,
        layers: usize,
    ) -> Result<Self> {
        let projection = |name: &str| {
            let weights = weights.scope(name);
            if options.use_linear_projection {
                return Linear::load(&weights, c, c);
            }
            // A 1×1 convolution is the same linear map of every position.
            let kernel = weights.matrix("weight", [c, c, 1, 1])?.reshape([c, c]);
            Ok(Linear::new(kernel, Some(weights.tensor("bias", [c])?)))
        };
        let blocks = weights.scope("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::load(&weights.scope("norm"), groups, c, 1e-6)?,
            proj_in: projection("proj_in")?,
            transformer_blocks: (0..layers)
                .map(|i| BasicTransformerBlock::load(&blocks.scope(i), c, options))
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `x` `[b, h, w, c]`.
    fn forward(&self, x: Tensor<4>, cond: &BlockInput<'_>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let y = self.norm.forward(x.clone()).reshape([b, h * w, c]);
        let mut y = self.proj_in.forward(y);
        for block in &self.transformer_blocks {
            let control = cond.control.as_ref().map(|control| control.next([h, w]));
            y = block.forward(y, &cond.context, control);
        }
        x + self.proj_out.forward(y).reshape([b, h, w, c])
    }
}

/// The conditions of every block: the activated time embedding, the prompt's hidden states
/// `[b, m, cross_attention_dim]`, and the control of attention, if any.
#[derive(Debug)]
pub(crate) struct BlockInput<'a> {
    pub(crate) emb: Tensor<2>,
    pub(crate) context: Tensor<3>,
    pub(crate) control: Option<Controlled<'a>>,
}

/// One level: residual blocks, each followed by a transformer if the level has them.
#[derive(Debug, Clone)]
pub(crate) struct Level {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<Transformer2D>,
}

impl Level {
    /// `channels` are the `[c_in, c_out]` of every residual block; `transformers` gives the number and options
    /// of the transformers.
    pub(crate) fn load(
        weights: &Weights,
        channels: &[[usize; 2]],
        options: &BlockOptions,
        transformers: Option<(usize, &TransformerOptions)>,
    ) -> Result<Self> {
        let resnets = channels.iter().enumerate().map(|(i, &channels)| {
            ResnetBlock::load(&weights.scope("resnets").scope(i), channels, options)
        });
        let attentions = transformers.into_iter().flat_map(|(count, transformer)| {
            (0..count).map(move |i| {
                let weights = weights.scope("attentions").scope(i);
                let c_out = channels[i][1];
                let layers = transformer.layers.get(i).copied().unwrap_or(0);
                let groups = options.norm_num_groups;
                Transformer2D::load(&weights, c_out, groups, transformer, layers)
            })
        });
        Ok(Self {
            resnets: resnets.collect::<Result<_>>()?,
            attentions: attentions.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.resnets.len()
    }

    /// The number of transformer blocks.
    pub(crate) fn transformer_blocks(&self) -> usize {
        let blocks = |transformer: &Transformer2D| transformer.transformer_blocks.len();
        self.attentions.iter().map(blocks).sum()
    }

    /// The weights of the keys of the prompt in the first transformer block, if there is one.
    pub(crate) fn prompt_keys(&self) -> Option<Tensor<2>> {
        let block = self.attentions.first()?.transformer_blocks.first()?;
        Some(block.attn2.to_k.weight())
    }

    /// Residual block `i` and the transformer after it, if any.
    pub(crate) fn forward_layer(&self, i: usize, x: Tensor<4>, cond: &BlockInput<'_>) -> Tensor<4> {
        let x = self.resnets[i].forward(x, Some(&cond.emb));
        match self.attentions.get(i) {
            Some(attention) => attention.forward(x, cond),
            None => x,
        }
    }

    /// As [`forward_layer`](Self::forward_layer), but nothing inside the layer is kept for the
    /// backward pass, which computes it again: less memory, more time. With a control of
    /// attention, it is the same as `forward_layer`.
    pub(crate) fn recompute_layer(
        &self,
        i: usize,
        x: Tensor<4>,
        cond: &BlockInput<'_>,
    ) -> Tensor<4> {
        if !kernels::differentiable(&x) || cond.control.is_some() {
            return self.forward_layer(i, x, cond);
        }
        let layer = Self {
            resnets: vec![self.resnets[i].clone()],
            attentions: self.attentions.get(i).cloned().into_iter().collect(),
        };
        let ([b, d], [_, n, c]) = (cond.emb.dims(), cond.context.dims());
        let emb = cond.emb.clone().reshape([b, 1, 1, d]);
        let context = cond.context.clone().reshape([b, 1, n, c]);
        recomputed([x, emb, context], move |[x, emb, context]| {
            let cond = BlockInput {
                emb: emb.reshape([b, d]),
                context: context.reshape([b, n, c]),
                control: None,
            };
            layer.forward_layer(0, x, &cond)
        })
    }
}
