//! `unet/config.json`.

use std::path::Path;

use serde::Deserialize;

use crate::models::denoiser::unet_blocks::TransformerOptions;
use crate::models::layers::{Activation, MOST_LAYERS};
use crate::weights::{OtherFields, PerBlock, check_fixed_fields};
use crate::{Error, Result};

/// The configuration of a [`UNet2DConditionModel`](super::unet::UNet2DConditionModel), with the
/// names and defaults of diffusers.
///
/// Other fields of diffusers either do not influence a forward pass (`sample_size`, `dropout`,
/// `upcast_attention` in f32) or are supported with one value only, which is checked when the model is
/// loaded.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    /// Channels of the noisy latents (and of what is concatenated to them).
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Whether the input is mapped from `[0, 1]` to `[-1, 1]` first.
    pub center_input_sample: bool,
    /// Whether cosines precede sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the time embedding's frequencies.
    pub freq_shift: f64,
    /// `CrossAttnDownBlock2D` or `DownBlock2D` for every level.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2DCrossAttn`, `UNetMidBlock2D` or null.
    pub mid_block_type: Option<String>,
    /// `CrossAttnUpBlock2D` or `UpBlock2D` for every level, from the coarsest.
    pub up_block_types: Vec<String>,
    /// Whether the first attention of a transformer block also attends to the prompt.
    pub only_cross_attention: PerBlock<bool>,
    /// Channels of every level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of every level.
    pub layers_per_block: PerBlock<usize>,
    /// Padding of the downsampling convolution: 1, or 0 for zeros right and below only.
    pub downsample_padding: usize,
    /// Non-linearity.
    pub act_fn: Activation,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' normalisations.
    pub norm_eps: f64,
    /// Width of the prompt's hidden states.
    pub cross_attention_dim: PerBlock<usize>,
    /// Transformer blocks in every transformer: for all, for each level, or for each transformer of a level.
    pub transformer_layers_per_block: PerBlock<PerBlock<usize>>,
    /// The same for the up path, from the coarsest level, if it differs from the down path.
    pub reverse_transformer_layers_per_block: Option<PerBlock<PerBlock<usize>>>,
    /// The *number* of attention heads, in spite of its name.
    pub attention_head_dim: PerBlock<usize>,
    /// Whether transformers project with linear layers instead of 1×1 convolutions.
    pub use_linear_projection: bool,
    /// `text_time` for SDXL's conditions, else null.
    pub addition_embed_type: Option<String>,
    /// Width of the embedding of each of SDXL's `time_ids`.
    pub addition_time_embed_dim: Option<usize>,
    /// Width of SDXL's pooled prompt and embedded `time_ids` together.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Width of the time embedding, if not four times the first level's channels.
    pub time_embedding_dim: Option<usize>,
    /// Width of an embedded guidance scale that is added to the embedded time, for networks distilled from guided
    /// predictions, such as latent consistency models.
    pub time_cond_proj_dim: Option<usize>,
    /// Kernel of the first convolution.
    pub conv_in_kernel: usize,
    /// Kernel of the last convolution.
    pub conv_out_kernel: usize,
    /// All other fields.
    #[serde(flatten)]
    pub other: OtherFields,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let names = |names: [&str; 4]| names.map(str::to_owned).to_vec();
        let (down, up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
        Self {
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: names([down, down, down, "DownBlock2D"]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".to_owned()),
            up_block_types: names(["UpBlock2D", up, up, up]),
            only_cross_attention: PerBlock::Same(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::Same(2),
            downsample_padding: 1,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::Same(1280),
            transformer_layers_per_block: PerBlock::Same(PerBlock::Same(1)),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerBlock::Same(8),
            use_linear_projection: false,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            time_embedding_dim: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            other: OtherFields::new(),
        }
    }
}

const DEPTH: &str = "transformer_layers_per_block";
const UP_DEPTH: &str = "reverse_transformer_layers_per_block";

/// The maximum number of levels, more than any network has; each halves the picture.
pub(crate) const MOST_LEVELS: usize = 16;

/// Fields with only one supported value.
const FIXED_FIELDS: &[(&str, &str)] = &[
    ("mid_block_scale_factor", "1"),
    ("encoder_hid_dim", "null"),
    ("encoder_hid_dim_type", "null"),
    ("num_attention_heads", "null"),
    ("dual_cross_attention", "false"),
    ("class_embed_type", "null"),
    ("num_class_embeds", "null"),
    ("resnet_time_scale_shift", "\"default\""),
    ("resnet_skip_time_act", "false"),
    ("resnet_out_scale_factor", "1"),
    ("time_embedding_type", "\"positional\""),
    ("time_embedding_act_fn", "null"),
    ("timestep_post_act", "null"),
    ("attention_type", "\"default\""),
    ("class_embeddings_concat", "false"),
    ("cross_attention_norm", "null"),
];

/// Resolves a flat list of numbers, which is ambiguous, to one number per level.
fn per_level(depth: &PerBlock<PerBlock<usize>>) -> PerBlock<PerBlock<usize>> {
    match depth {
        PerBlock::Same(PerBlock::Each(counts)) => {
            PerBlock::Each(counts.iter().copied().map(PerBlock::Same).collect())
        }
        other => other.clone(),
    }
}

/// The blocks of each of `count` transformers of a level, or the problem with them.
fn blocks_of(
    depth: &PerBlock<usize>,
    count: usize,
    level: usize,
) -> std::result::Result<Vec<usize>, String> {
    let blocks = depth.expand(count);
    let blocks = blocks.ok_or_else(|| format!("expected {count} values for level {level}"))?;
    match blocks.iter().find(|blocks| **blocks > MOST_LAYERS) {
        Some(found) => Err(format!("expected 0 to {MOST_LAYERS}, found {found}")),
        None => Ok(blocks),
    }
}

fn wrong(path: &Path, field: &str, reason: String) -> Error {
    Error::Config {
        path: path.to_owned(),
        field: field.to_owned(),
        reason,
    }
}

/// One resolution of the network, in the down and up paths.
#[derive(Debug)]
pub(crate) struct LevelConfig {
    pub(crate) channels: usize,
    pub(crate) layers: usize,
    pub(crate) down_transformer: Option<TransformerOptions>,
    pub(crate) up_transformer: Option<TransformerOptions>,
    transformer: TransformerOptions,
}

impl UNetConfig {
    /// Whether [`forward`](super::unet::UNet2DConditionModel::forward) needs
    /// [`AddedConditions`](super::unet::AddedConditions), as SDXL's does.
    pub fn needs_added_conditions(&self) -> bool {
        self.addition_embed_type.is_some()
    }

    /// Width of the prompt's hidden states; the first level's, if there are several.
    pub fn context_dim(&self) -> usize {
        match &self.cross_attention_dim {
            PerBlock::Same(dim) => *dim,
            PerBlock::Each(dims) => dims.first().copied().unwrap_or_default(),
        }
    }

    /// Factor between the input's size and that of the coarsest level.
    pub fn downsampling_factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    pub(crate) fn added_input_dim(&self) -> Option<usize> {
        self.addition_embed_type
            .as_ref()
            .and(self.projection_class_embeddings_input_dim)
    }

    /// Checks the configuration and returns the levels from the finest to the coarsest; `path` is
    /// named in errors.
    pub(crate) fn levels(&self, path: &Path) -> Result<Vec<LevelConfig>> {
        let wrong = |field: &str, reason: String| Err(wrong(path, field, reason));
        check_fixed_fields(&self.other, FIXED_FIELDS, path)?;
        let blocks = self.block_out_channels.len();
        if !(1..=MOST_LEVELS).contains(&blocks) || self.block_out_channels[0] % 2 == 1 {
            let reason = format!(
                "expected 1 to {MOST_LEVELS} even channel counts, found {:?}",
                self.block_out_channels
            );
            return wrong("block_out_channels", reason);
        }
        for (field, kernel) in [
            ("conv_in_kernel", self.conv_in_kernel),
            ("conv_out_kernel", self.conv_out_kernel),
        ] {
            if kernel % 2 == 0 {
                return wrong(field, format!("expected an odd number, found {kernel}"));
            }
        }
        if self.downsample_padding > 1 {
            let reason = format!("expected 0 or 1, found {}", self.downsample_padding);
            return wrong("downsample_padding", reason);
        }
        self.check_added(path)?;
        if let Some(width) = (self.time_cond_proj_dim).filter(|width| *width < 4 || width % 2 == 1)
        {
            let reason = format!("expected an even number of 4 or more, found {width}");
            return wrong("time_cond_proj_dim", reason);
        }
        if let Some(kind) = self.mid_block_type.as_deref()
            && !["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"].contains(&kind)
        {
            return wrong("mid_block_type", format!("`{kind}` is not supported"));
        }
        let down = self.with_attention("down_block_types", &self.down_block_types, path)?;
        let mut up = self.with_attention("up_block_types", &self.up_block_types, path)?;
        up.reverse();
        let heads = self.expand("attention_head_dim", &self.attention_head_dim, path)?;
        let context_dims = self.expand("cross_attention_dim", &self.cross_attention_dim, path)?;
        let [depth, up_depth] = self.depths(path)?;
        let only_cross = self.expand("only_cross_attention", &self.only_cross_attention, path)?;
        let layers = self.expand("layers_per_block", &self.layers_per_block, path)?;

        let mut levels = Vec::with_capacity(blocks);
        for (i, &channels) in self.block_out_channels.iter().enumerate() {
            // Concatenated skip connections are multiples of the groups if every level is.
            if self.norm_num_groups == 0 || channels % self.norm_num_groups != 0 {
                let reason = format!(
                    "{} does not divide {channels} channels",
                    self.norm_num_groups
                );
                return wrong("norm_num_groups", reason);
            }
            if heads[i] == 0 || channels % heads[i] != 0 {
                let reason = format!(
                    "{channels} channels cannot be split into {} heads",
                    heads[i]
                );
                return wrong("attention_head_dim", reason);
            }
            let count = layers[i];
            if !(1..=MOST_LAYERS).contains(&count) {
                let reason = format!("expected 1 to {MOST_LAYERS}, found {count}");
                return wrong("layers_per_block", reason);
            }
            let transformer = |field, depth: &PerBlock<usize>, count: usize| {
                Ok::<_, Error>(TransformerOptions {
                    heads: heads[i],
                    layers: blocks_of(depth, count, i)
                        .map_err(|reason| self::wrong(path, field, reason))?,
                    cross_attention_dim: context_dims[i],
                    use_linear_projection: self.use_linear_projection,
                    only_cross_attention: only_cross[i],
                })
            };
            let of_down = |count| transformer(DEPTH, &depth[i], count);
            let of_up = || transformer(UP_DEPTH, &up_depth[i], count + 1);
            levels.push(LevelConfig {
                channels,
                layers: count,
                down_transformer: down[i].then(|| of_down(count)).transpose()?,
                up_transformer: up[i].then(of_up).transpose()?,
                transformer: match &depth[i] {
                    PerBlock::Same(_) => of_down(1)?,
                    PerBlock::Each(_) => of_down(count)?,
                },
            });
        }
        Ok(levels)
    }

    /// Checks the fields of SDXL's added conditions.
    fn check_added(&self, path: &Path) -> Result<()> {
        let Some(added) = self.addition_embed_type.as_deref() else {
            return Ok(());
        };
        let dims = (
            self.addition_time_embed_dim,
            self.projection_class_embeddings_input_dim,
        );
        let reason = if added != "text_time" {
            format!("expected text_time, found {added}")
        } else if !matches!(dims, (Some(d), Some(_)) if d > 0 && d % 2 == 0) {
            "text_time needs an even addition_time_embed_dim and projection_class_embeddings_input_dim"
                .to_owned()
        } else {
            return Ok(());
        };
        Err(wrong(path, "addition_embed_type", reason))
    }

    /// The transformer blocks of every level, from the finest: in the down path, and in the up path.
    fn depths(&self, path: &Path) -> Result<[Vec<PerBlock<usize>>; 2]> {
        let depth = per_level(&self.transformer_layers_per_block);
        let depth = self.expand(DEPTH, &depth, path)?;
        let up = match &self.reverse_transformer_layers_per_block {
            Some(up) => {
                let mut up = self.expand(UP_DEPTH, &per_level(up), path)?;
                up.reverse();
                up
            }
            None if depth.iter().any(|depth| matches!(depth, PerBlock::Each(_))) => {
                let reason = format!("missing, though {DEPTH} has lists in it");
                return Err(wrong(path, UP_DEPTH, reason));
            }
            None => depth.clone(),
        };
        Ok([depth, up])
    }

    /// The middle block, if there is one: its transformer, if it has one.
    pub(crate) fn mid_block(&self, levels: &[LevelConfig]) -> Option<Option<TransformerOptions>> {
        let kind = self.mid_block_type.as_deref()?;
        let last = levels.last().filter(|_| kind == "UNetMidBlock2DCrossAttn");
        Some(last.map(|level| TransformerOptions {
            only_cross_attention: false,
            ..level.transformer.clone()
        }))
    }

    /// Whether each of the blocks named by `kinds` has cross-attention.
    fn with_attention(&self, field: &str, kinds: &[String], path: &Path) -> Result<Vec<bool>> {
        let wrong = |reason| Error::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            reason,
        };
        let blocks = self.block_out_channels.len();
        if kinds.len() != blocks {
            return Err(wrong(format!(
                "{} blocks, but block_out_channels has {blocks}",
                kinds.len()
            )));
        }
        kinds
            .iter()
            .map(|kind| match kind.as_str() {
                "CrossAttnDownBlock2D" | "CrossAttnUpBlock2D" => Ok(true),
                "DownBlock2D" | "UpBlock2D" => Ok(false),
                _ => Err(wrong(format!("`{kind}` is not supported"))),
            })
            .collect()
    }

    fn expand<T: Clone>(&self, field: &str, value: &PerBlock<T>, path: &Path) -> Result<Vec<T>> {
        let blocks = self.block_out_channels.len();
        value.expand(blocks).ok_or_else(|| Error::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            reason: format!("expected {blocks} values, as block_out_channels has"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::parse_config;

    fn message(json: &str) -> String {
        let path = Path::new("unet/config.json");
        let config = parse_config::<UNetConfig>(json.as_bytes(), path);
        match config.and_then(|config| config.levels(path)) {
            Ok(_) => "ok".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn defaults_are_those_of_stable_diffusion_1() {
        assert_eq!(message("{}"), "ok");
        let config = UNetConfig::default();
        let levels = config.levels(Path::new("x")).unwrap();
        let transformers: Vec<bool> = levels
            .iter()
            .map(|level| level.down_transformer.is_some())
            .collect();
        assert_eq!(transformers, [true, true, true, false]);
        assert!(
            levels
                .iter()
                .all(|l| l.up_transformer.is_some() == l.down_transformer.is_some())
        );
        assert!(matches!(config.mid_block(&levels), Some(Some(_))));
        assert_eq!(config.downsampling_factor(), 8);
    }

    #[test]
    fn unsupported_and_contradictory_values_name_the_field() {
        for (json, expected) in [
            (
                r#"{"class_embed_type": "timestep"}"#,
                "field `class_embed_type`",
            ),
            (
                r#"{"down_block_types": ["AttnDownBlock2D"]}"#,
                "field `down_block_types`: 1 blocks",
            ),
            (
                r#"{"attention_head_dim": [8, 8]}"#,
                "field `attention_head_dim`: expected 4 values",
            ),
            (
                r#"{"attention_head_dim": 7}"#,
                "320 channels cannot be split into 7 heads",
            ),
            (
                r#"{"attention_head_dim": 0}"#,
                "320 channels cannot be split into 0 heads",
            ),
            (
                r#"{"norm_num_groups": 33}"#,
                "33 does not divide 320 channels",
            ),
            (
                r#"{"norm_num_groups": 0}"#,
                "0 does not divide 320 channels",
            ),
            (
                r#"{"block_out_channels": []}"#,
                "field `block_out_channels`",
            ),
            (
                r#"{"block_out_channels": "320"}"#,
                "field `block_out_channels`: invalid type",
            ),
            (
                r#"{"act_fn": "mish"}"#,
                "field `act_fn`: unknown variant `mish`",
            ),
            (
                r#"{"addition_embed_type": "text"}"#,
                "expected text_time, found text",
            ),
            (
                r#"{"addition_embed_type": "text_time"}"#,
                "needs an even addition_time_embed_dim",
            ),
            (
                r#"{"mid_block_type": "X"}"#,
                "field `mid_block_type`: `X` is not supported",
            ),
            (
                r#"{"layers_per_block": 0}"#,
                "field `layers_per_block`: expected 1 to 256, found 0",
            ),
            (r#"{"layers_per_block": -1}"#, "field `layers_per_block`"),
            (
                r#"{"layers_per_block": 4294967296}"#,
                "expected 1 to 256, found 4294967296",
            ),
            (
                r#"{"transformer_layers_per_block": [1, 1, [2], 1],
                    "reverse_transformer_layers_per_block": [1, 1, 1, 1]}"#,
                "field `transformer_layers_per_block`: expected 2 values for level 2",
            ),
            (
                r#"{"transformer_layers_per_block": [1, 1, [2, 2], 1]}"#,
                "field `reverse_transformer_layers_per_block`: missing",
            ),
            (
                r#"{"reverse_transformer_layers_per_block": [1, [1, 2], 1, 1]}"#,
                "field `reverse_transformer_layers_per_block`: expected 3 values for level 2",
            ),
            (
                r#"{"transformer_layers_per_block": 18446744073709551615}"#,
                "field `transformer_layers_per_block`: expected 0 to 256",
            ),
        ] {
            let message = message(json);
            assert!(message.contains(expected), "{json}: {message}");
        }
    }
}
