//! A block of the multimodal transformers (Stable Diffusion 3, FLUX.1), in which the picture's and the
//! prompt's tokens attend to both, with weights of their own; and the parts that other blocks share.

use burn::tensor::{DType, Tensor, activation};
use dinv_kernels as kernels;

use crate::Result;
use crate::models::denoiser::recompute::recomputed_streams;
use crate::models::layers::{
    Activation, LayerNorm, Linear, Mask, RmsNorm, multi_head_attention, weighted_attention,
};
use crate::models::rotation::Rotation;
use crate::weights::Weights;

/// The small constant of every norm.
pub(super) const EPSILON: f64 = 1e-6;

/// The options of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockOptions {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Whether queries and keys are normalised.
    pub(super) qk_norm: bool,
    /// The small constant of these norms.
    pub(super) epsilon: f64,
    /// Whether the picture attends to itself once more.
    pub(super) dual: bool,
    /// Whether the prompt is only attended to, as in the last block.
    pub(super) last: bool,
    /// Whether its linear layers add a bias.
    pub(super) bias: bool,
    /// Whether it has layers that compute its shifts, scales and gates. Without, they are told to it.
    pub(super) modulates: bool,
}

impl BlockOptions {
    pub(super) fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// Squares of `patch` latent pixels on each side, row by row, with the features (c, p, q).
///
/// # Shapes
/// `[b, c, h, w]` to `[b, n, c · patch · patch]`
pub(super) fn patches(latents: Tensor<4>, patch: usize) -> Tensor<3> {
    let [b, c, h, w] = latents.dims();
    let [rows, columns] = [h / patch, w / patch];
    latents
        .reshape([b, c, rows, patch, columns, patch])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([b, rows * columns, c * patch * patch])
}

/// `x (1 + scale) + shift`, with a row of each for every row of the batch.
///
/// # Shapes
/// `x` `[b, n, d]`, `shift` and `scale` `[b, 1, d]`
pub(in crate::models) fn modulated(
    x: Tensor<3>,
    shift: &Tensor<3>,
    scale: &Tensor<3>,
) -> Tensor<3> {
    multiply_add(x, scale.clone() + 1.0, shift.clone())
}

/// `x + update · gate`, with a row of `gate` for every row of the batch.
///
/// # Shapes
/// `x` and `update` `[b, n, d]`, `gate` `[b, 1, d]`
pub(in crate::models) fn gated(x: Tensor<3>, update: Tensor<3>, gate: &Tensor<3>) -> Tensor<3> {
    multiply_add(update, gate.clone(), x)
}

/// `x · factor + addend`.
fn multiply_add(x: Tensor<3>, factor: Tensor<3>, addend: Tensor<3>) -> Tensor<3> {
    if kernels::available_on_cpu(&x) && x.dims()[0] == factor.dims()[0] {
        return kernels::modulation::multiply_add(x, factor, addend);
    }
    x * factor + addend
}

/// Shifts, scales and gates.
#[derive(Debug, Clone)]
pub(super) struct Modulation {
    source: Source,
    pub(super) norm: LayerNorm,
    parts: usize,
}

/// Where shifts, scales and gates come from.
#[derive(Debug, Clone)]
enum Source {
    /// A layer computes them from the network's other inputs.
    Layer(Box<Linear>),
    /// They are told, from this row on.
    Told(usize),
}

impl Modulation {
    pub(super) fn load(weights: &Weights, d: usize, parts: usize, bias: bool) -> Result<Self> {
        let layer = Linear::load_with(&weights.scope("linear"), d, parts * d, bias)?;
        Ok(Self {
            source: Source::Layer(Box::new(layer)),
            norm: LayerNorm::plain(d, EPSILON, weights),
            parts,
        })
    }

    /// Those of a block with these options, which are told from row `first` on if it has no layer for them.
    pub(super) fn of_block(
        weights: &Weights,
        options: BlockOptions,
        parts: usize,
        first: usize,
    ) -> Result<Self> {
        let d = options.width();
        if options.modulates {
            return Self::load(weights, d, parts, true);
        }
        Ok(Self {
            source: Source::Told(first),
            norm: LayerNorm::plain(d, EPSILON, weights),
            parts,
        })
    }

    /// The parts, `[b, 1, d]` each, of `told` `[b, 1, d]`, or `[b, parts, d]` if they are told.
    pub(super) fn parts(&self, told: &Tensor<3>) -> Vec<Tensor<3>> {
        match &self.source {
            Source::Layer(layer) => layer.forward(told.clone()).chunk(self.parts, 2),
            Source::Told(first) => (0..self.parts)
                .map(|part| told.clone().narrow(1, first + part, 1))
                .collect(),
        }
    }
}

/// Queries whose scores are held at once where a bias is added to them.
const QUERIES: usize = 512;

/// How the tokens of a sequence see one another.
#[derive(Debug, Clone, Default)]
pub(super) struct Sight {
    /// Rotates queries and keys of the first tokens, the picture's. The prompt's tokens are at position 0, where nothing
    /// is rotated.
    pub(super) rotation: Option<Rotation>,
    /// What is added to the scores of each key, `[b, 1, 1, n + m]`.
    pub(super) key_bias: Option<Tensor<4>>,
}

impl Sight {
    /// Attention among tokens whose queries and keys are rotated.
    pub(super) fn attend(&self, [query, key, value]: [Tensor<3>; 3], heads: usize) -> Tensor<3> {
        let Some(bias) = &self.key_bias else {
            return multi_head_attention(query, key, value, heads, Mask::None);
        };
        let parts = query.split(QUERIES, 1).into_iter().map(|query| {
            let weights = |scores: Tensor<4>| activation::softmax(scores + bias.clone(), 3);
            weighted_attention(query, key.clone(), value.clone(), heads, weights)
        });
        Tensor::cat(parts.collect(), 1)
    }
}

/// The last norm, scaled and shifted by the network's other inputs (`AdaLayerNormContinuous`): unlike
/// everywhere else, the scale comes first.
#[derive(Debug, Clone)]
pub(super) struct LastNorm(Modulation);

impl LastNorm {
    pub(super) fn load(weights: &Weights, d: usize, bias: bool) -> Result<Self> {
        Modulation::load(weights, d, 2, bias).map(Self)
    }

    /// # Shapes
    /// `x` `[b, n, d]`, `told` `[b, 1, d]`
    pub(super) fn forward(&self, x: Tensor<3>, told: &Tensor<3>) -> Tensor<3> {
        let parts = self.0.parts(told);
        modulated(self.0.norm.forward(x), &parts[1], &parts[0])
    }
}

/// Queries, keys and values of some tokens.
#[derive(Debug, Clone)]
pub(super) struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    norms: Option<[RmsNorm; 2]>,
}

impl Projections {
    /// Reads the layers and norms of these names.
    fn load(
        weights: &Weights,
        options: BlockOptions,
        layers: [&str; 3],
        norms: [&str; 2],
    ) -> Result<Self> {
        let d = options.width();
        let layer = |name: &str| Linear::load_with(&weights.scope(name), d, d, options.bias);
        let norm =
            |name: &str| RmsNorm::load(&weights.scope(name), options.head_dim, options.epsilon);
        Ok(Self {
            query: layer(layers[0])?,
            key: layer(layers[1])?,
            value: layer(layers[2])?,
            norms: match options.qk_norm {
                true => Some([norm(norms[0])?, norm(norms[1])?]),
                false => None,
            },
        })
    }

    /// Those of the picture, or of a sequence that attends to itself.
    pub(super) fn own(weights: &Weights, options: BlockOptions) -> Result<Self> {
        let names = ["to_q", "to_k", "to_v"];
        Self::load(weights, options, names, ["norm_q", "norm_k"])
    }

    /// Those of the prompt.
    pub(super) fn added(weights: &Weights, options: BlockOptions) -> Result<Self> {
        let names = ["add_q_proj", "add_k_proj", "add_v_proj"];
        Self::load(weights, options, names, ["norm_added_q", "norm_added_k"])
    }

    /// The weights of the keys.
    pub(super) fn keys(&self) -> Tensor<2> {
        self.key.weight()
    }

    pub(super) fn forward(&self, x: &Tensor<3>) -> [Tensor<3>; 3] {
        let [query, key, value] =
            [&self.query, &self.key, &self.value].map(|layer| layer.forward(x.clone()));
        match &self.norms {
            Some([of_query, of_key]) => [
                of_query.forward_heads(query),
                of_key.forward_heads(key),
                value,
            ],
            None => [query, key, value],
        }
    }
}

/// The feed-forward layers, four times as wide inside.
#[derive(Debug, Clone)]
struct FeedForward {
    inner: Linear,
    outer: Linear,
}

impl FeedForward {
    fn load(weights: &Weights, d: usize) -> Result<Self> {
        let net = weights.scope("net");
        Ok(Self {
            inner: Linear::load(&net.scope("0.proj"), d, 4 * d)?,
            outer: Linear::load(&net.scope(2), 4 * d, d)?,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let inner = Activation::GeluTanh.forward(self.inner.forward(x));
        self.outer.forward(inner)
    }
}

/// The layers of the prompt's or the picture's tokens after attention.
#[derive(Debug, Clone)]
struct Further {
    output: Linear,
    feed_forward: FeedForward,
}

/// The second attention of a block, of the picture to itself.
#[derive(Debug, Clone)]
struct SelfAttention {
    projections: Projections,
    output: Linear,
}

/// `JointTransformerBlock` of diffusers.
#[derive(Debug, Clone)]
pub(super) struct JointBlock {
    options: BlockOptions,
    modulation: Modulation,
    projections: Projections,
    prompt_projections: Projections,
    dual: Option<SelfAttention>,
    further: Further,
    /// Only scale and shift in the last block.
    prompt_modulation: Modulation,
    /// Absent in the last block, which discards the prompt.
    prompt_further: Option<Further>,
}

impl JointBlock {
    pub(super) fn load(weights: &Weights, options: BlockOptions) -> Result<Self> {
        let d = options.width();
        let attention = weights.scope("attn");
        let output = |weights: &Weights, name: &str| Linear::load(&weights.scope(name), d, d);
        let parts = if options.dual { 9 } else { 6 };
        let prompt_further = || {
            Ok(Further {
                output: output(&attention, "to_add_out")?,
                feed_forward: FeedForward::load(&weights.scope("ff_context"), d)?,
            })
        };
        let dual = || {
            let attention = weights.scope("attn2");
            Ok(SelfAttention {
                projections: Projections::own(&attention, options)?,
                output: output(&attention, "to_out.0")?,
            })
        };
        Ok(Self {
            options,
            modulation: Modulation::of_block(&weights.scope("norm1"), options, parts, 0)?,
            projections: Projections::own(&attention, options)?,
            prompt_projections: Projections::added(&attention, options)?,
            dual: options.dual.then(dual).transpose()?,
            further: Further {
                output: output(&attention, "to_out.0")?,
                feed_forward: FeedForward::load(&weights.scope("ff"), d)?,
            },
            prompt_modulation: Modulation::of_block(
                &weights.scope("norm1_context"),
                options,
                if options.last { 2 } else { 6 },
                parts,
            )?,
            prompt_further: (!options.last).then(prompt_further).transpose()?,
        })
    }

    /// The weights of the prompt's keys.
    pub(super) fn prompt_keys(&self) -> Tensor<2> {
        self.prompt_projections.keys()
    }

    /// The picture's and the prompt's tokens after the block; the last block leaves the prompt's unchanged.
    ///
    /// # Shapes
    /// `x` `[b, n, d]`, `prompt` `[b, m, d]`; `told` `[b, 1, d]`, activated, or the shifts, scales and gates of the
    /// picture, then of the prompt, `[b, parts, d]`.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        prompt: Tensor<3>,
        told: &Tensor<3>,
        sight: &Sight,
    ) -> [Tensor<3>; 2] {
        let (n, m) = (x.dims()[1], prompt.dims()[1]);
        let heads = self.options.heads;
        let parts = self.modulation.parts(told);
        let normed = self.modulation.norm.forward(x.clone());
        let own = self
            .projections
            .forward(&modulated(normed.clone(), &parts[0], &parts[1]));
        let own = turned(own, sight.rotation.as_ref());
        let prompt_parts = self.prompt_modulation.parts(told);
        let normed_prompt = self.prompt_modulation.norm.forward(prompt.clone());
        let (shift, scale) = match self.options.last {
            true => (&prompt_parts[1], &prompt_parts[0]), // as of a last norm
            false => (&prompt_parts[0], &prompt_parts[1]),
        };
        let normed_prompt = modulated(normed_prompt, shift, scale);
        let added = self.prompt_projections.forward(&normed_prompt);
        let attended = sight.attend(joined(own, added), heads); // [b, n + m, d]

        let update = (self.further.output).forward(attended.clone().narrow(1, 0, n));
        let mut x = gated(x, update, &parts[2]);
        if let Some(dual) = &self.dual {
            let normed = modulated(normed, &parts[6], &parts[7]);
            let [query, key, value] = dual.projections.forward(&normed);
            let attended = multi_head_attention(query, key, value, heads, Mask::None);
            x = gated(x, dual.output.forward(attended), &parts[8]);
        }
        let x = self
            .further
            .feed_forward(x, &self.modulation.norm, &parts[3..6]);
        let prompt = match &self.prompt_further {
            Some(further) => {
                let attended = further.output.forward(attended.narrow(1, n, m));
                let prompt = gated(prompt, attended, &prompt_parts[2]);
                let norm = &self.prompt_modulation.norm;
                further.feed_forward(prompt, norm, &prompt_parts[3..6])
            }
            None => prompt,
        };
        [x, prompt]
    }
}

impl JointBlock {
    /// As [`forward`](Self::forward), but nothing inside the block is kept for the backward pass, which
    /// computes it again.
    pub(super) fn recomputed(
        &self,
        x: Tensor<3>,
        prompt: Tensor<3>,
        told: &Tensor<3>,
        sight: &Sight,
    ) -> [Tensor<3>; 2] {
        let (block, sight) = (self.clone(), sight.clone());
        let streams = [x, prompt.clone(), told.clone()];
        let run = move |[x, prompt, told]: [Tensor<3>; 3]| block.forward(x, prompt, &told, &sight);
        if self.options.last {
            let [x] = recomputed_streams(streams, move |streams| {
                let [x, _] = run(streams);
                [x]
            });
            return [x, prompt];
        }
        recomputed_streams(streams, run)
    }
}

/// Queries, keys and values, of which the first two are rotated.
pub(super) fn turned(own: [Tensor<3>; 3], rotation: Option<&Rotation>) -> [Tensor<3>; 3] {
    let Some(rotation) = rotation else { return own };
    let [query, key, value] = own;
    [rotation.turn(query), rotation.turn(key), value]
}

/// `x` clamped to the range of half precision, if it is in half precision: FLUX.1 was trained in a wider type
/// and overflows.
pub(super) fn within_range(x: Tensor<3>) -> Tensor<3> {
    const MOST: f32 = 65504.0;
    match x.dtype() {
        DType::F16 => x.clamp(-MOST, MOST),
        _ => x,
    }
}

impl Further {
    /// `x` plus the output of the two layers; `parts` are shift, scale and gate.
    fn feed_forward(&self, x: Tensor<3>, norm: &LayerNorm, parts: &[Tensor<3>]) -> Tensor<3> {
        let normed = modulated(norm.forward(x.clone()), &parts[0], &parts[1]);
        gated(x, self.feed_forward.forward(normed), &parts[2])
    }
}

/// Queries, keys and values of the picture, then of the prompt.
pub(super) fn joined(own: [Tensor<3>; 3], added: [Tensor<3>; 3]) -> [Tensor<3>; 3] {
    let mut added = added.into_iter();
    own.map(|own| Tensor::cat([own].into_iter().chain(added.next()).collect(), 1))
}
