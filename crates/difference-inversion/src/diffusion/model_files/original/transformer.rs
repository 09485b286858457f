//! Transformers in one file, with the names of their original code: the diffusers keys for each of its keys.
//!
//! The names are facts of the original repositories (Stability-AI/sd3.5, black-forest-labs/flux and flux2,
//! lodestone-rock/flow, Tongyi-MAI/Z-Image) on the one hand, and of diffusers on the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, FloatDType};

use super::{UNET, check_rows, numbered};
use crate::diffusion::family::{self, Family};
use crate::diffusion::model_files::not_of;
use crate::util::error::abbreviate;
use crate::weights::Weights;
use crate::weights::file::TensorFile;
use crate::weights::folder::refuse_pickled;
use crate::weights::placement::{Change, Placement};
use crate::{Error, Result};

/// Prefixes of all keys in files of several networks, and in those of ComfyUI.
const PREFIXES: [&str; 2] = [UNET, "diffusion_model."];

/// One layer of the original code: its name, and the layers of diffusers that are made from it.
pub(super) type Layer = (&'static str, Made);

/// The layers of diffusers that are made from one of the original code.
#[derive(Debug, Clone, Copy)]
pub(super) enum Made {
    /// The same under another name.
    One(&'static str),
    /// Its halves exchanged: the original has shift and scale, diffusers scale and shift.
    Swapped(&'static str),
    /// Queries, keys and values.
    Three([&'static str; 3]),
    /// Queries, keys and values, and the inside of a network that is four times as wide.
    Seven([&'static str; 4]),
    /// Nothing: it is left over from training.
    Nothing,
}

use Made::{Nothing, One, Seven, Swapped, Three};

/// How a transformer's original code names its layers.
#[derive(Debug)]
pub struct OriginalLayers {
    /// A tensor by which files in this layout are recognised.
    pub(super) mark: &'static str,
    /// Layers that are there once.
    pub(super) once: &'static [Layer],
    /// Stacks of blocks: the original name, diffusers' name, and the layers of each block.
    pub(super) blocks: &'static [(&'static str, &'static str, &'static [Layer])],
    /// A layer whose halves are exchanged in the last block of its stack.
    pub(super) swapped_last: Option<&'static str>,
}

/// Stable Diffusion 3.
pub(crate) const SD3: OriginalLayers = OriginalLayers {
    mark: "joint_blocks.0.context_block.adaLN_modulation.1.bias",
    once: &[
        ("pos_embed", One("pos_embed.pos_embed")),
        ("x_embedder.proj", One("pos_embed.proj")),
        (
            "t_embedder.mlp.0",
            One("time_text_embed.timestep_embedder.linear_1"),
        ),
        (
            "t_embedder.mlp.2",
            One("time_text_embed.timestep_embedder.linear_2"),
        ),
        (
            "y_embedder.mlp.0",
            One("time_text_embed.text_embedder.linear_1"),
        ),
        (
            "y_embedder.mlp.2",
            One("time_text_embed.text_embedder.linear_2"),
        ),
        ("context_embedder", One("context_embedder")),
        ("final_layer.linear", One("proj_out")),
        ("final_layer.adaLN_modulation.1", Swapped("norm_out.linear")),
    ],
    blocks: &[(
        "joint_blocks",
        "transformer_blocks",
        &[
            ("x_block.adaLN_modulation.1", One("norm1.linear")),
            (
                "x_block.attn.qkv",
                Three(["attn.to_q", "attn.to_k", "attn.to_v"]),
            ),
            ("x_block.attn.ln_q", One("attn.norm_q")),
            ("x_block.attn.ln_k", One("attn.norm_k")),
            ("x_block.attn.proj", One("attn.to_out.0")),
            (
                "x_block.attn2.qkv",
                Three(["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
            ),
            ("x_block.attn2.ln_q", One("attn2.norm_q")),
            ("x_block.attn2.ln_k", One("attn2.norm_k")),
            ("x_block.attn2.proj", One("attn2.to_out.0")),
            ("x_block.mlp.fc1", One("ff.net.0.proj")),
            ("x_block.mlp.fc2", One("ff.net.2")),
            (
                "context_block.adaLN_modulation.1",
                One("norm1_context.linear"),
            ),
            (
                "context_block.attn.qkv",
                Three(["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
            ),
            ("context_block.attn.ln_q", One("attn.norm_added_q")),
            ("context_block.attn.ln_k", One("attn.norm_added_k")),
            ("context_block.attn.proj", One("attn.to_add_out")),
            ("context_block.mlp.fc1", One("ff_context.net.0.proj")),
            ("context_block.mlp.fc2", One("ff_context.net.2")),
        ],
    )],
    swapped_last: Some("context_block.adaLN_modulation.1"),
};

/// FLUX.1.
pub(crate) const FLUX: OriginalLayers = OriginalLayers {
    mark: "double_blocks.0.img_attn.norm.key_norm.scale",
    once: &[
        ("img_in", One("x_embedder")),
        ("txt_in", One("context_embedder")),
        (
            "time_in.in_layer",
            One("time_text_embed.timestep_embedder.linear_1"),
        ),
        (
            "time_in.out_layer",
            One("time_text_embed.timestep_embedder.linear_2"),
        ),
        (
            "vector_in.in_layer",
            One("time_text_embed.text_embedder.linear_1"),
        ),
        (
            "vector_in.out_layer",
            One("time_text_embed.text_embedder.linear_2"),
        ),
        (
            "guidance_in.in_layer",
            One("time_text_embed.guidance_embedder.linear_1"),
        ),
        (
            "guidance_in.out_layer",
            One("time_text_embed.guidance_embedder.linear_2"),
        ),
        ("final_layer.linear", One("proj_out")),
        ("final_layer.adaLN_modulation.1", Swapped("norm_out.linear")),
    ],
    blocks: &[
        (
            "double_blocks",
            "transformer_blocks",
            &[
                ("img_mod.lin", One("norm1.linear")),
                (
                    "img_attn.qkv",
                    Three(["attn.to_q", "attn.to_k", "attn.to_v"]),
                ),
                ("img_attn.norm.query_norm", One("attn.norm_q")),
                ("img_attn.norm.key_norm", One("attn.norm_k")),
                ("img_attn.proj", One("attn.to_out.0")),
                ("img_mlp.0", One("ff.net.0.proj")),
                ("img_mlp.2", One("ff.net.2")),
                ("txt_mod.lin", One("norm1_context.linear")),
                (
                    "txt_attn.qkv",
                    Three(["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
                ),
                ("txt_attn.norm.query_norm", One("attn.norm_added_q")),
                ("txt_attn.norm.key_norm", One("attn.norm_added_k")),
                ("txt_attn.proj", One("attn.to_add_out")),
                ("txt_mlp.0", One("ff_context.net.0.proj")),
                ("txt_mlp.2", One("ff_context.net.2")),
            ],
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            &[
                ("modulation.lin", One("norm.linear")),
                (
                    "linear1",
                    Seven(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
                ),
                ("linear2", One("proj_out")),
                ("norm.query_norm", One("attn.norm_q")),
                ("norm.key_norm", One("attn.norm_k")),
            ],
        ),
    ],
    swapped_last: None,
};

/// Chroma: FLUX.1's blocks, without the layers for modulation. Their place takes one network of five layers.
pub(crate) const CHROMA: OriginalLayers = OriginalLayers {
    mark: "distilled_guidance_layer.in_proj.weight",
    once: &[
        ("img_in", One("x_embedder")),
        ("txt_in", One("context_embedder")),
        ("final_layer.linear", One("proj_out")),
        (
            "distilled_guidance_layer.in_proj",
            One("distilled_guidance_layer.in_proj"),
        ),
        (
            "distilled_guidance_layer.out_proj",
            One("distilled_guidance_layer.out_proj"),
        ),
        (
            "distilled_guidance_layer.norms.0",
            One("distilled_guidance_layer.norms.0"),
        ),
        (
            "distilled_guidance_layer.norms.1",
            One("distilled_guidance_layer.norms.1"),
        ),
        (
            "distilled_guidance_layer.norms.2",
            One("distilled_guidance_layer.norms.2"),
        ),
        (
            "distilled_guidance_layer.norms.3",
            One("distilled_guidance_layer.norms.3"),
        ),
        (
            "distilled_guidance_layer.norms.4",
            One("distilled_guidance_layer.norms.4"),
        ),
    ],
    blocks: &[
        FLUX.blocks[0],
        FLUX.blocks[1],
        (
            "distilled_guidance_layer.layers",
            "distilled_guidance_layer.layers",
            &[
                ("in_layer", One("linear_1")),
                ("out_layer", One("linear_2")),
            ],
        ),
    ],
    swapped_last: None,
};

/// FLUX.2.
pub(crate) const FLUX_2: OriginalLayers = OriginalLayers {
    mark: "single_stream_modulation.lin.weight",
    once: &[
        ("img_in", One("x_embedder")),
        ("txt_in", One("context_embedder")),
        (
            "time_in.in_layer",
            One("time_guidance_embed.timestep_embedder.linear_1"),
        ),
        (
            "time_in.out_layer",
            One("time_guidance_embed.timestep_embedder.linear_2"),
        ),
        (
            "guidance_in.in_layer",
            One("time_guidance_embed.guidance_embedder.linear_1"),
        ),
        (
            "guidance_in.out_layer",
            One("time_guidance_embed.guidance_embedder.linear_2"),
        ),
        (
            "double_stream_modulation_img.lin",
            One("double_stream_modulation_img.linear"),
        ),
        (
            "double_stream_modulation_txt.lin",
            One("double_stream_modulation_txt.linear"),
        ),
        (
            "single_stream_modulation.lin",
            One("single_stream_modulation.linear"),
        ),
        ("final_layer.linear", One("proj_out")),
        ("final_layer.adaLN_modulation.1", Swapped("norm_out.linear")),
    ],
    blocks: &[
        (
            "double_blocks",
            "transformer_blocks",
            &[
                (
                    "img_attn.qkv",
                    Three(["attn.to_q", "attn.to_k", "attn.to_v"]),
                ),
                ("img_attn.norm.query_norm", One("attn.norm_q")),
                ("img_attn.norm.key_norm", One("attn.norm_k")),
                ("img_attn.proj", One("attn.to_out.0")),
                ("img_mlp.0", One("ff.linear_in")),
                ("img_mlp.2", One("ff.linear_out")),
                (
                    "txt_attn.qkv",
                    Three(["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
                ),
                ("txt_attn.norm.query_norm", One("attn.norm_added_q")),
                ("txt_attn.norm.key_norm", One("attn.norm_added_k")),
                ("txt_attn.proj", One("attn.to_add_out")),
                ("txt_mlp.0", One("ff_context.linear_in")),
                ("txt_mlp.2", One("ff_context.linear_out")),
            ],
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            &[
                ("linear1", One("attn.to_qkv_mlp_proj")),
                ("linear2", One("attn.to_out")),
                ("norm.query_norm", One("attn.norm_q")),
                ("norm.key_norm", One("attn.norm_k")),
            ],
        ),
    ],
    swapped_last: None,
};

/// The layers of a block of Z-Image.
const Z_IMAGE_BLOCK: &[Layer] = &[
    (
        "attention.qkv",
        Three(["attention.to_q", "attention.to_k", "attention.to_v"]),
    ),
    ("attention.q_norm", One("attention.norm_q")),
    ("attention.k_norm", One("attention.norm_k")),
    ("attention.out", One("attention.to_out.0")),
    ("attention_norm1", One("attention_norm1")),
    ("attention_norm2", One("attention_norm2")),
    ("ffn_norm1", One("ffn_norm1")),
    ("ffn_norm2", One("ffn_norm2")),
    ("feed_forward.w1", One("feed_forward.w1")),
    ("feed_forward.w2", One("feed_forward.w2")),
    ("feed_forward.w3", One("feed_forward.w3")),
    ("adaLN_modulation.0", One("adaLN_modulation.0")),
];

/// Z-Image.
pub(crate) const Z_IMAGE: OriginalLayers = OriginalLayers {
    mark: "layers.0.attention.qkv.weight",
    once: &[
        ("x_embedder", One("all_x_embedder.2-1")),
        ("cap_embedder.0", One("cap_embedder.0")),
        ("cap_embedder.1", One("cap_embedder.1")),
        ("t_embedder.mlp.0", One("t_embedder.mlp.0")),
        ("t_embedder.mlp.2", One("t_embedder.mlp.2")),
        ("x_pad_token", One("x_pad_token")),
        ("cap_pad_token", One("cap_pad_token")),
        ("final_layer.linear", One("all_final_layer.2-1.linear")),
        (
            "final_layer.adaLN_modulation.1",
            One("all_final_layer.2-1.adaLN_modulation.1"),
        ),
        ("norm_final", Nothing),
    ],
    blocks: &[
        ("layers", "layers", Z_IMAGE_BLOCK),
        ("noise_refiner", "noise_refiner", Z_IMAGE_BLOCK),
        ("context_refiner", "context_refiner", Z_IMAGE_BLOCK),
    ],
    swapped_last: None,
};

impl Made {
    /// The layers of diffusers, and how each is made.
    fn layers(self) -> Vec<(&'static str, Change)> {
        let rows = |start, end, of| Change::Rows { start, end, of };
        match self {
            One(name) => vec![(name, Change::None)],
            Swapped(name) => vec![(name, Change::SwapHalves)],
            Three(names) => {
                let thirds = (0..3).map(Change::third);
                names.into_iter().zip(thirds).collect()
            }
            Seven(names) => {
                let parts = [rows(0, 1, 7), rows(1, 2, 7), rows(2, 3, 7), rows(3, 7, 7)];
                names.into_iter().zip(parts).collect()
            }
            Nothing => Vec::new(),
        }
    }
}

impl OriginalLayers {
    /// Whether a file with tensors of these names is in this layout.
    pub(crate) fn are_in(&self, names: &[String]) -> bool {
        names.iter().any(|name| bare(name) == self.mark)
    }

    /// The original names of the layers of a network with these weights, each with the matrices of diffusers that are
    /// made from it.
    pub(crate) fn matrices(&self, weights: &Weights) -> Vec<(String, Vec<(String, Change)>)> {
        let numbers = |stack: &str| -> BTreeSet<usize> {
            let number = |key: &str| {
                let rest = key.strip_prefix(stack)?.strip_prefix('.')?;
                Some(numbered(rest)?.0)
            };
            weights.keys().filter_map(number).collect()
        };
        let mut names: Vec<String> = self
            .once
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let mut last = BTreeMap::new();
        for (stack, diffusers, layers) in self.blocks {
            for number in numbers(diffusers) {
                last.insert(*stack, number);
                names.extend(
                    layers
                        .iter()
                        .map(|(layer, _)| format!("{stack}.{number}.{layer}")),
                );
            }
        }
        let made = |name: String| {
            let last = |stack: &str| last.get(stack).copied().unwrap_or(0);
            let made = self.diffusers_keys(&format!("{name}.weight"), last)?;
            let is_matrix = |key: &str| weights.shape(key).is_some_and(|shape| shape.len() >= 2);
            let are_there = !made.is_empty() && made.iter().all(|(key, _)| is_matrix(key));
            are_there.then_some((name, made))
        };
        names.into_iter().filter_map(made).collect()
    }

    /// The tensors of diffusers that are made from tensor `key`; nothing if it is not known. `last` is the number
    /// of the last block of a stack.
    fn diffusers_keys(
        &self,
        key: &str,
        last: impl Fn(&str) -> usize,
    ) -> Option<Vec<(String, Change)>> {
        let (name, end) = match key.rsplit_once('.') {
            Some((name, "weight" | "scale")) => (name, ".weight"),
            Some((name, "bias")) => (name, ".bias"),
            _ => (key, ""), // not a layer's
        };
        let of = |layers: &[Layer], name: &str| {
            let found = layers.iter().find(|(layer, _)| *layer == name);
            found.map(|(_, made)| *made)
        };
        let named = |prefix: &str, made: Made| {
            let layers = made.layers().into_iter();
            let layers = layers.map(|(layer, change)| (format!("{prefix}{layer}{end}"), change));
            layers.collect()
        };
        if let Some(made) = of(self.once, name) {
            return Some(named("", made));
        }
        self.blocks.iter().find_map(|(stack, diffusers, layers)| {
            let rest = name.strip_prefix(stack)?.strip_prefix('.')?;
            let (number, layer) = numbered(rest)?;
            let mut made = of(layers, layer)?;
            if let (One(name), Some(swapped)) = (made, self.swapped_last)
                && swapped == layer
                && number == last(stack)
            {
                made = Swapped(name);
            }
            Some(named(&format!("{diffusers}.{number}."), made))
        })
    }
}

/// A key without the common prefix of all keys.
fn bare(key: &str) -> &str {
    let mut prefixes = PREFIXES.iter();
    let rest = prefixes.find_map(|prefix| key.strip_prefix(prefix));
    rest.unwrap_or(key)
}

/// Opens a file with the denoiser of a family: with diffusers' names, or a transformer with the original ones. Other
/// networks in the same file are left out.
///
/// # Errors
/// [`Error::InvalidFile`] for the transformer of another family, or tensors that this family's transformer does not have.
pub(crate) fn denoiser(
    path: &Path,
    family: &Family,
    device: &Device,
    dtype: FloatDType,
) -> Result<Weights> {
    refuse_pickled(path)?;
    let file = TensorFile::open(path)?;
    match (family::of_original(&file.names()), family.original) {
        (Some(found), _) if found != family => Err(not_of(path, found, family)),
        (Some(_), Some(layers)) => {
            let what = format!("the transformer of a {}", family.class);
            mapped(path, file, layers, &what, device, dtype)
        }
        _ => Weights::open(path, device, dtype),
    }
}

/// The tensors of a file with the names of diffusers or transformers. `what` is what the file should be, for errors.
pub(super) fn mapped(
    path: &Path,
    file: TensorFile,
    layers: &OriginalLayers,
    what: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<Weights> {
    let names = file.names();
    let is_prefixed = names.iter().any(|name| bare(name) != name);
    let own: Vec<&String> = (names.iter())
        .filter(|name| !is_prefixed || bare(name) != *name)
        .collect();
    let last = |stack: &str| {
        let number = |name: &&String| {
            let rest = bare(name).strip_prefix(stack)?.strip_prefix('.')?;
            Some(numbered(rest)?.0)
        };
        own.iter().filter_map(number).max().unwrap_or(0)
    };
    let (mut tensors, mut unknown) = (BTreeMap::new(), Vec::new());
    for key in &own {
        let Some(made) = layers.diffusers_keys(bare(key), last) else {
            unknown.push((*key).clone());
            continue;
        };
        for (name, change) in made {
            check_rows(&file, key, change)?;
            let place = Placement {
                file: 0,
                key: (*key).clone(),
                change,
            };
            tensors.insert(name, place);
        }
    }
    if unknown.is_empty() {
        let files = vec![Arc::new(file)];
        return Ok(Weights::new(path, files, tensors, device, dtype));
    }
    let reason = format!(
        "tensors that are not of {what} ({}): {}",
        unknown.len(),
        abbreviate(&unknown)
    );
    Err(Error::invalid_file(path, reason))
}
