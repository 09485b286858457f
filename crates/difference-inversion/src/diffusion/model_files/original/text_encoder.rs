//! Text encoders in one file: with the names of transformers, as ComfyUI's folder `text_encoders` has them, or with those
//! of llama.cpp in GGUF files.

use std::path::Path;

use burn::tensor::{Device, FloatDType};

use super::transformer::Made::One;
use super::transformer::{OriginalLayers, mapped};
use crate::models::text::tower::TowerKind;
use crate::weights::Weights;
use crate::weights::file::TensorFile;
use crate::weights::folder::refuse_pickled;
use crate::{Error, Result};

/// T5's encoder in llama.cpp (`gguf.MODEL_ARCH.T5ENCODER`).
const T5: OriginalLayers = OriginalLayers {
    mark: "enc.blk.0.attn_q.weight",
    once: &[
        ("token_embd", One("shared")),
        ("enc.output_norm", One("encoder.final_layer_norm")),
    ],
    blocks: &[(
        "enc.blk",
        "encoder.block",
        &[
            ("attn_norm", One("layer.0.layer_norm")),
            ("attn_q", One("layer.0.SelfAttention.q")),
            ("attn_k", One("layer.0.SelfAttention.k")),
            ("attn_v", One("layer.0.SelfAttention.v")),
            ("attn_o", One("layer.0.SelfAttention.o")),
            (
                "attn_rel_b",
                One("layer.0.SelfAttention.relative_attention_bias"),
            ),
            ("ffn_norm", One("layer.1.layer_norm")),
            ("ffn_gate", One("layer.1.DenseReluDense.wi_0")),
            ("ffn_up", One("layer.1.DenseReluDense.wi_1")),
            ("ffn_down", One("layer.1.DenseReluDense.wo")),
        ],
    )],
    swapped_last: None,
};

/// Qwen3 in llama.cpp (`gguf.MODEL_ARCH.QWEN3`).
const QWEN3: OriginalLayers = OriginalLayers {
    mark: "blk.0.attn_q_norm.weight",
    once: &[
        ("token_embd", One("model.embed_tokens")),
        ("output_norm", One("model.norm")),
        ("output", One("lm_head")),
    ],
    blocks: &[(
        "blk",
        "model.layers",
        &[
            ("attn_norm", One("input_layernorm")),
            ("attn_q", One("self_attn.q_proj")),
            ("attn_k", One("self_attn.k_proj")),
            ("attn_v", One("self_attn.v_proj")),
            ("attn_q_norm", One("self_attn.q_norm")),
            ("attn_k_norm", One("self_attn.k_norm")),
            ("attn_output", One("self_attn.o_proj")),
            ("ffn_norm", One("post_attention_layernorm")),
            ("ffn_gate", One("mlp.gate_proj")),
            ("ffn_up", One("mlp.up_proj")),
            ("ffn_down", One("mlp.down_proj")),
        ],
    )],
    swapped_last: None,
};

/// Each architecture, its llama.cpp names if they are read, and the names of its token-embedding table in transformers.
const KINDS: [(TowerKind, Option<&OriginalLayers>, &[&str]); 3] = [
    (
        TowerKind::Clip,
        None,
        &[
            "text_model.embeddings.token_embedding.weight",
            "embeddings.token_embedding.weight",
        ],
    ),
    (
        TowerKind::T5,
        Some(&T5),
        &["shared.weight", "encoder.embed_tokens.weight"],
    ),
    (
        TowerKind::Qwen3,
        Some(&QWEN3),
        &["model.embed_tokens.weight", "embed_tokens.weight"],
    ),
];
/// The table in llama.cpp's names.
const TABLE: &str = "token_embd.weight";
/// Tensors of whole CLIPs and of old versions that a text tower does not use.
const UNUSED: [&str; 3] = [
    "logit_scale",
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
];
/// The projection into the joint space, which ComfyUI's files have for every CLIP.
const PROJECTION: &str = "text_projection.weight";

/// A text encoder in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderFile {
    /// Its architecture.
    pub kind: TowerKind,
    /// The width of its token embeddings.
    pub width: usize,
    /// The llama.cpp names, if the file uses them.
    layers: Option<&'static OriginalLayers>,
}

impl PartialEq for OriginalLayers {
    fn eq(&self, other: &Self) -> bool {
        self.mark == other.mark
    }
}

impl Eq for OriginalLayers {}

impl EncoderFile {
    /// Recognises a file by its tensors.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::InvalidFile`] if it is not a known text encoder.
    pub fn recognise(path: &Path) -> Result<Self> {
        refuse_pickled(path)?;
        let file = TensorFile::open(path)?;
        let names = file.names();
        let width = |table: &&str| match file.info(table)? {
            (_, &[_, width]) => Some(width),
            _ => None,
        };
        for (kind, layers, tables) in KINDS {
            if let Some(layers) = layers.filter(|layers| layers.are_in(&names))
                && let Some(width) = width(&TABLE)
            {
                let layers = Some(layers);
                return Ok(Self {
                    kind,
                    width,
                    layers,
                });
            }
            if let Some(width) = tables.iter().find_map(width) {
                return Ok(Self {
                    kind,
                    width,
                    layers: None,
                });
            }
        }
        let reason = "not a text encoder: CLIP, T5 and Qwen3 are read, with the names of transformers, and T5 and Qwen3 \
                      with those of llama.cpp";
        Err(Error::invalid_file(path, reason))
    }

    /// Opens its weights under transformers' names, for a tower that has a projection or not.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it has tensors that are not known.
    pub(crate) fn open(
        self,
        path: &Path,
        has_projection: bool,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Weights> {
        if let Some(layers) = self.layers {
            let file = TensorFile::open(path)?;
            return mapped(path, file, layers, "this text encoder", device, dtype);
        }
        let is_unused = |key: &str| {
            let is_projection = self.kind == TowerKind::Clip && key == PROJECTION;
            UNUSED.contains(&key) || (is_projection && !has_projection)
        };
        Ok(Weights::open(path, device, dtype)?.without(is_unused))
    }
}
