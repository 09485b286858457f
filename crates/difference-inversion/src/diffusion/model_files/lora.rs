//! LoRA files, and the layers of a model that their tensors change.
//!
//! The names are those of diffusers and PEFT (`unet.….lora_A.weight`, `lora.down`, attention processors), kohya's
//! scripts (`lora_unet_…`, `lora_te_…`, of diffusers' and of the original blocks) and ComfyUI (`diffusion_model.…`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::diffusion::family;
use crate::diffusion::model_files::original::OriginalNames;
use crate::weights::file::TensorFile;
use crate::weights::folder::refuse_pickled;
use crate::weights::json::{from_value, read_config};
use crate::weights::low_rank::{LowRank, numbers};
use crate::weights::placement::Change;
use crate::weights::{Changes, Weights};
use crate::{Error, Result};

/// A LoRA file, or a folder of diffusers or PEFT with one, and its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFile {
    /// The file or folder.
    pub path: PathBuf,
    /// 1 adds all of it.
    pub weight: f64,
}

/// The files that a folder may hold.
const IN_FOLDERS: [&str; 2] = [
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
];

/// PEFT's settings next to its file.
const PEFT_CONFIG: &str = "adapter_config.json";
/// The same in the metadata of a file of diffusers.
const METADATA: &str = "lora_adapter_metadata";
/// Embeddings that kohya's scripts put into the same file.
const EMBEDDINGS: &str = "bundle_emb.";

/// The suffixes of a layer's keys: of the right-hand matrix and of the left-hand one.
const DOWN: [&str; 5] = [
    ".lora_down.weight",
    ".lora.down.weight",
    ".lora_linear_layer.down.weight",
    "_lora.down.weight",
    ".lora_A.weight",
];
const UP: [&str; 5] = [
    ".lora_up.weight",
    ".lora.up.weight",
    ".lora_linear_layer.up.weight",
    "_lora.up.weight",
    ".lora_B.weight",
];
const ALPHA: &str = ".alpha";

/// The suffixes of keys of other kinds of adapters (or substrings, if they end in a dot or a dash), with the
/// names of these kinds.
const OTHER_KINDS: [(&str, &str); 18] = [
    (".dora_scale", "a DoRA"),
    (".lora_magnitude_vector", "a DoRA"),
    (".lora_magnitude_vector.", "a DoRA"),
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    (".oft_", "an OFT"),
    (".lora_mid.", "a LoCon in Tucker's form (`lora_mid`)"),
    (".lora_B.bias", "a LoRA with biases"),
    (".lora_up.bias", "a LoRA with biases"),
    (".lora_embedding_", "a LoRA of token embeddings"),
    (".on_input", "an IA³"),
    (".diff", "a file with whole layers (`diff`)"),
    (".diff_b", "a file with whole biases (`diff_b`)"),
    (".w_norm", "a file with whole norms (`w_norm`)"),
    (".b_norm", "a file with whole norms (`b_norm`)"),
    (".set_weight", "a file with whole layers (`set_weight`)"),
    (".proj_lora1.", "a LoRA in the layout of XLabs"),
    (".qkv_lora1.", "a LoRA in the layout of XLabs"),
];

/// The matrices of a network by every name that files use for their layers, and how each is made of the layer. A
/// name stands for several matrices where the original code has a single one with the rows of all.
#[derive(Debug, Default)]
pub(super) struct LayerNames(BTreeMap<String, Vec<(String, Change)>>);

/// The matrix of a layer that is itself in diffusers.
fn whole(layer: &str) -> Vec<(String, Change)> {
    vec![(format!("{layer}.weight"), Change::None)]
}

impl LayerNames {
    /// The names for the `network` with these weights.
    pub(super) fn of(network: &str, weights: &Weights) -> Self {
        let mut names = Self::default();
        let keys = || weights.keys().filter_map(|key| key.strip_suffix(".weight"));
        let is_matrix = |layer: &&str| {
            let shape = weights.shape(&format!("{layer}.weight"));
            shape.is_some_and(|shape| shape.len() >= 2)
        };
        if let Some(number) = encoder_number(network) {
            for layer in keys().filter(is_matrix) {
                names.add_of_encoder(network, number, layer);
            }
        } else if family::all().any(|family| family.denoiser.part == network) {
            let originals = OriginalNames::of(weights.keys());
            for layer in keys().filter(is_matrix) {
                let of_diffusers = [
                    format!("{network}."),
                    format!("{network}.base_model.model."),
                    "base_model.model.".to_owned(),
                    String::new(),
                ];
                names.add_all(&of_diffusers, layer, layer);
                let original = originals.get(layer);
                names.add_original(original.as_deref().unwrap_or(layer), &whole(layer));
                names.add_original(layer, &whole(layer));
            }
            // Names of other transformers are of layers that are not there.
            for layers in family::all().filter_map(|family| family.original) {
                for (name, matrices) in layers.matrices(weights) {
                    names.add_original(&name, &matrices);
                }
            }
        }
        names
    }

    fn add_all(&mut self, prefixes: &[String], name: &str, layer: &str) {
        for prefix in prefixes {
            self.0.insert(format!("{prefix}{name}"), whole(layer));
        }
    }

    /// Adds the names of a denoiser's layer in ComfyUI and kohya's scripts.
    fn add_original(&mut self, name: &str, matrices: &[(String, Change)]) {
        let flat = name.replace('.', "_");
        for name in [
            format!("diffusion_model.{name}"),
            format!("model.diffusion_model.{name}"),
            format!("base_model.model.{name}"),
            format!("lora_unet_{flat}"),
            format!("lora_transformer_{flat}"),
            format!("lycoris_{flat}"),
        ] {
            self.0.insert(name, matrices.to_vec());
        }
    }

    /// Adds the names of a layer of the text encoder `number`, counted from 1.
    fn add_of_encoder(&mut self, network: &str, number: usize, layer: &str) {
        let bare = layer.strip_prefix("text_model.").unwrap_or(layer);
        let is_of_clip = bare.starts_with("encoder.layers.");
        let whole = match is_of_clip {
            true => format!("text_model.{bare}"),
            false => bare.to_owned(),
        };
        let comfy: &[&str] = match (is_of_clip, number) {
            (true, 1) => &["clip_l", "clip_h"],
            (true, _) => &["clip_g"],
            (false, 1) => &[],
            (false, _) => &["t5xxl", "clip_g"],
        };
        let mut prefixes = vec![
            format!("{network}."),
            format!("{network}.base_model.model."),
        ];
        self.add_all(&prefixes, bare, layer);
        prefixes.extend(
            comfy
                .iter()
                .map(|name| format!("text_encoders.{name}.transformer.")),
        );
        self.add_all(&prefixes, &whole, layer);
        let mut of_kohya = vec![format!("lora_te{number}_")];
        of_kohya.extend((number == 1).then(|| "lora_te_".to_owned()));
        of_kohya.extend((!is_of_clip && number == 2).then(|| "lora_te3_".to_owned()));
        self.add_all(&of_kohya, &whole.replace('.', "_"), layer);
    }
}

/// The number of a network among a model's text encoders, counted from 1.
fn encoder_number(network: &str) -> Option<usize> {
    match network.strip_prefix("text_encoder")? {
        "" => Some(1),
        number => number.strip_prefix('_')?.parse().ok(),
    }
}

/// The tensors that change one layer, or several that are one layer in the file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Parts {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

/// PEFT's settings of a LoRA, or of one network in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PeftConfig {
    lora_alpha: Option<f64>,
    alpha_pattern: BTreeMap<String, f64>,
    use_rslora: bool,
    use_dora: bool,
}

/// An opened LoRA file.
#[derive(Debug)]
pub(super) struct Lora {
    file: Arc<TensorFile>,
    weight: f64,
    /// By the layer's name in the file.
    layers: BTreeMap<String, Parts>,
    /// By the prefix of the network's names in the file; "" matches all.
    configs: Vec<(String, PeftConfig)>,
    /// Tensors of embeddings in the file.
    embeddings: usize,
}

impl Lora {
    pub(super) fn open(lora: &LoraFile) -> Result<Self> {
        let path = find(&lora.path)?;
        refuse_pickled(&path)?;
        if !lora.weight.is_finite() {
            return Err(Error::Setting {
                name: "lora",
                expected: "a finite weight".to_owned(),
                found: lora.weight.to_string(),
            });
        }
        let file = TensorFile::open(&path)?;
        let mut layers: BTreeMap<String, Parts> = BTreeMap::new();
        let (mut unknown, mut embeddings) = (Vec::new(), 0);
        let mut names = file.names();
        names.sort();
        for (mark, kind) in OTHER_KINDS {
            let is_inside = mark.ends_with(['.', '_']);
            let is_marked =
                |key: &&String| key.ends_with(mark) || (is_inside && key.contains(mark));
            let found: Vec<&String> = names.iter().filter(is_marked).collect();
            if let Some(first) = found.first() {
                let reason = format!(
                    "{kind}, which is not supported, only LoRA and LoCon are: {} of its tensors are of that kind, \
                     the first is `{first}`; merge it into the model with the program that made it",
                    found.len()
                );
                return Err(Error::invalid_file(&path, reason));
            }
        }
        for key in names {
            if key.starts_with(EMBEDDINGS) {
                embeddings += 1;
            } else if let Some((layer, part)) = split(&key) {
                let parts = layers.entry(layer).or_default();
                let place = match part {
                    Part::Down => &mut parts.down,
                    Part::Up => &mut parts.up,
                    Part::Alpha => &mut parts.alpha,
                };
                if let Some(other) = place.replace(key.clone()) {
                    let reason = format!("tensors `{other}` and `{key}` are the same");
                    return Err(Error::invalid_file(&path, reason));
                }
            } else {
                unknown.push(key);
            }
        }
        if layers.values().all(|parts| parts.down.is_none()) {
            let first = unknown
                .first()
                .map(|key| format!(" (its first is `{key}`)"));
            let reason = format!(
                "not a LoRA: none of its tensors{} has a name that ends with `lora_down.weight` or \
                 `lora_A.weight`; a whole model is given with `--model`, a textual inversion with `--embedding`",
                first.unwrap_or_default()
            );
            return Err(Error::invalid_file(&path, reason));
        }
        if let Some(first) = unknown.first() {
            let reason = format!(
                "tensors that do not belong to a LoRA: {}; the first is `{first}`",
                unknown.len()
            );
            return Err(Error::invalid_file(&path, reason));
        }
        for (layer, parts) in &layers {
            if parts.down.is_none() || parts.up.is_none() {
                let lacks = if parts.down.is_none() { "down" } else { "up" };
                let reason = format!("damaged: layer `{layer}` has no `{lacks}` matrix");
                return Err(Error::invalid_file(&path, reason));
            }
        }
        let configs = configs(&file)?;
        if configs.iter().any(|(_, config)| config.use_dora) {
            let reason = "a DoRA by its settings, which is not supported, only LoRA and LoCon are";
            return Err(Error::invalid_file(&path, reason));
        }
        Ok(Self {
            file: Arc::new(file),
            weight: lora.weight,
            layers,
            configs,
            embeddings,
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// A note about unused parts.
    pub(super) fn notice(&self) -> Option<String> {
        (self.embeddings > 0).then(|| {
            format!(
                "{}: {} tensors of embeddings in it are left out; save them in a file of their own for `--embedding`",
                self.path().display(),
                self.embeddings
            )
        })
    }

    /// Adds its changes of a network to `changes`.
    pub(super) fn add_changes(
        &self,
        names: &LayerNames,
        weights: &Weights,
        changes: &mut Changes,
    ) -> Result<()> {
        for (layer, parts) in &self.layers {
            let (Some(keys), Some(up), Some(down)) = (names.0.get(layer), &parts.up, &parts.down)
            else {
                continue;
            };
            let shapes: Vec<Vec<usize>> = (keys.iter())
                .map(|(key, _)| weights.shape(key).unwrap_or_default())
                .collect();
            let rows = |(shape, (_, part)): (&Vec<usize>, &(String, Change))| {
                part.stored_rows(shape.first().copied().unwrap_or(0))
            };
            let columns = |shape: &[usize]| shape.iter().skip(1).product::<usize>();
            let of_file =
                [up, down].map(|key| self.file.info(key).map_or(&[][..], |(_, shape)| shape));
            let [of_up, of_down] = of_file;
            let rank = of_down.first().copied().unwrap_or(0);
            let fits = !of_up.is_empty()
                && rank > 0
                && (shapes.iter().zip(keys)).all(|one| rows(one) == of_up[0])
                && columns(of_up) == rank
                && shapes
                    .iter()
                    .all(|shape| columns(shape) == columns(of_down) && kernels_fit(shape, of_down));
            if !fits {
                let reason = format!(
                    "{}layer `{layer}` has the shapes {of_up:?} and {of_down:?}, which do not fit the model's `{}` of \
                     shape {:?}",
                    self.made_for()
                        .map(|family| format!("a LoRA for {family}: "))
                        .unwrap_or_default(),
                    keys.iter()
                        .map(|(key, _)| key.as_str())
                        .collect::<Vec<_>>()
                        .join("`, `"),
                    shapes.first().unwrap_or(&Vec::new()),
                );
                return Err(Error::invalid_file(self.path(), reason));
            }
            let scale = self.weight * self.scale(layer, parts, rank)?;
            for (key, part) in keys {
                changes.entry(key.clone()).or_default().push(LowRank {
                    file: Arc::clone(&self.file),
                    down: down.clone(),
                    up: up.clone(),
                    part: *part,
                    scale,
                    name: self.name(),
                });
            }
        }
        Ok(())
    }

    /// The file's name, and its weight if that is not 1.
    fn name(&self) -> String {
        let name = self
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        match self.weight == 1.0 {
            true => name.into_owned(),
            false => format!("{name}:{}", self.weight),
        }
    }

    /// α/r, or α/√r with rank-stabilised scaling. Without α in the file, α = r.
    fn scale(&self, layer: &str, parts: &Parts, rank: usize) -> Result<f64> {
        let rank = rank as f64;
        if let Some(key) = &parts.alpha {
            return Ok(self.number(key)? / rank);
        }
        let mut configs = self.configs.iter();
        let config = configs
            .find_map(|(prefix, config)| Some((layer.strip_prefix(prefix.as_str())?, config)));
        let Some((layer, config)) = config else {
            return Ok(1.0);
        };
        let mut patterns = config.alpha_pattern.iter();
        let alpha = patterns.find_map(|(pattern, alpha)| {
            let pattern = pattern.trim_start_matches('^');
            let matches = layer == pattern || layer.ends_with(&format!(".{pattern}"));
            matches.then_some(*alpha)
        });
        let Some(alpha) = alpha.or(config.lora_alpha) else {
            return Ok(1.0);
        };
        Ok(match config.use_rslora {
            true => alpha / rank.sqrt(),
            false => alpha / rank,
        })
    }

    /// The value of a one-element tensor.
    fn number(&self, key: &str) -> Result<f64> {
        let numbers = numbers(&self.file, key)?;
        match numbers[..] {
            [number] if number.is_finite() => Ok(f64::from(number)),
            _ => Err(Error::Tensor {
                path: self.path().to_owned(),
                name: key.to_owned(),
                expected: "one finite number".to_owned(),
                found: format!("{numbers:?}").chars().take(40).collect(),
            }),
        }
    }

    /// Refuses layers that no network of a model has.
    pub(super) fn check_known(&self, networks: &[LayerNames], model: &str) -> Result<()> {
        let is_known = |layer: &&String| networks.iter().any(|names| names.0.contains_key(*layer));
        let unknown: Vec<&String> = self
            .layers
            .keys()
            .filter(|layer| !is_known(layer))
            .collect();
        let Some(first) = unknown.first() else {
            return Ok(());
        };
        let reason = format!(
            "{}{} of its {} layers are not in the model, a {model}; the first is `{first}`",
            self.made_for()
                .map(|family| format!("a LoRA for {family}: "))
                .unwrap_or_default(),
            unknown.len(),
            self.layers.len(),
        );
        Err(Error::invalid_file(self.path(), reason))
    }

    /// The model that it was made for, as far as names, the width of prompts, and metadata show it.
    fn made_for(&self) -> Option<String> {
        let has = |mark: &str| self.layers.keys().any(|layer| layer.contains(mark));
        let marks = [
            ("double_blocks", "FLUX"),
            ("single_transformer_blocks", "FLUX"),
            ("joint_blocks", "Stable Diffusion 3"),
            ("noise_refiner", "Z-Image or Lumina"),
            ("img_mlp", "Qwen-Image"),
            ("add_q_proj", "Stable Diffusion 3 or FLUX"),
            ("temporal_transformer", "a video model"),
            ("motion_modules", "a video model"),
            ("lora_prior", "Stable Cascade"),
            ("adaln_single", "PixArt"),
        ];
        let by_name = marks
            .iter()
            .find(|(mark, _)| has(mark) || has(&mark.replace('.', "_")));
        if let Some((_, family)) = by_name {
            return Some((*family).to_owned());
        }
        let mut keys = self
            .layers
            .iter()
            .filter(|(layer, _)| layer.ends_with("attn2_to_k") || layer.ends_with("attn2.to_k"));
        let width = keys.find_map(|(_, parts)| {
            let (_, shape) = self.file.info(parts.down.as_deref()?)?;
            shape.get(1).copied()
        });
        let family = match width {
            Some(768) => "Stable Diffusion 1",
            Some(1024) => "Stable Diffusion 2",
            Some(2048) => "Stable Diffusion XL",
            _ if has("lora_te2_") || has("text_encoder_2.") || has("clip_g.") => {
                "Stable Diffusion XL"
            }
            _ => {
                let said = ["modelspec.architecture", "ss_base_model_version"];
                let said = said.iter().find_map(|name| {
                    self.file
                        .metadata()
                        .find(|(key, _)| key == name)
                        .map(|(_, value)| value.to_owned())
                });
                return said.filter(|said| !said.is_empty());
            }
        };
        Some(family.to_owned())
    }
}

/// The file that a path stands for.
fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let mut files = IN_FOLDERS.iter().map(|name| path.join(name));
    files.find(|file| file.is_file()).ok_or_else(|| {
        let reason = format!(
            "no LoRA in this folder: expected {}",
            IN_FOLDERS.join(" or ")
        );
        Error::invalid_file(path, reason)
    })
}

enum Part {
    Down,
    Up,
    Alpha,
}

/// The layer of a key, and its role in the layer.
fn split(key: &str) -> Option<(String, Part)> {
    // PEFT inserts the adapter's name before the suffix.
    let plain = match key.rsplit_once(".lora_A.").or(key.rsplit_once(".lora_B.")) {
        Some((layer, rest)) if rest.ends_with("weight") && rest.split('.').count() <= 2 => {
            let matrix = &key[layer.len()..layer.len() + ".lora_A.".len()];
            format!("{layer}{matrix}weight")
        }
        _ => key.to_owned(),
    };
    let ends = (DOWN.iter().map(|end| (*end, Part::Down)))
        .chain(UP.iter().map(|end| (*end, Part::Up)))
        .chain([(ALPHA, Part::Alpha)]);
    for (end, part) in ends {
        if let Some(layer) = plain.strip_suffix(end) {
            return Some((unprocessed(layer), part));
        }
    }
    None
}

/// A layer's own name if the file uses that of diffusers' attention processors, or their names in a text
/// encoder.
fn unprocessed(layer: &str) -> String {
    let of_processor = layer.contains(".processor.");
    let layer = layer.replace(".processor.", ".");
    if of_processor && layer.ends_with(".to_out") {
        return format!("{layer}.0");
    }
    let names = [
        ("to_q", "q_proj"),
        ("to_k", "k_proj"),
        ("to_v", "v_proj"),
        ("to_out", "out_proj"),
    ];
    for (theirs, ours) in names {
        if let Some(start) = layer.strip_suffix(&format!(".self_attn.{theirs}")) {
            return format!("{start}.self_attn.{ours}");
        }
    }
    layer
}

/// Whether the kernel of a convolution has the size of that of the change, or either is a linear layer.
fn kernels_fit(weight: &[usize], down: &[usize]) -> bool {
    match (weight, down) {
        ([_, _, kernel @ ..], [_, _, of_down @ ..]) => {
            let same = kernel == of_down;
            let single = |kernel: &[usize]| kernel.iter().all(|side| *side == 1);
            same || (single(kernel) && single(of_down))
        }
        _ => false,
    }
}

/// PEFT's settings of a file: in its metadata by network, or next to it.
fn configs(file: &TensorFile) -> Result<Vec<(String, PeftConfig)>> {
    let path = file.path();
    let said = file.metadata().find(|(key, _)| *key == METADATA);
    if let Some((_, json)) = said {
        let wrong = |error: serde_json::Error| {
            Error::invalid_file(path, format!("metadata `{METADATA}`: {error}"))
        };
        let flat: BTreeMap<String, Value> = serde_json::from_str(json).map_err(wrong)?;
        let mut networks: BTreeMap<&str, serde_json::Map<String, Value>> = BTreeMap::new();
        for (key, value) in &flat {
            // Without a prefix they belong to a network that was saved on its own.
            let (network, name) = match key.split_once('.') {
                Some((network, name)) => (network, name),
                None => ("", key.as_str()),
            };
            let fields = networks.entry(network).or_default();
            fields.insert(name.to_owned(), value.clone());
        }
        let networks = networks.into_iter().rev().map(|(network, fields)| {
            let prefix = if network.is_empty() {
                String::new()
            } else {
                format!("{network}.")
            };
            Ok((prefix, from_value(Value::Object(fields), path)?))
        });
        return networks.collect();
    }
    let config = path.with_file_name(PEFT_CONFIG);
    let is_of_peft = path.file_name().is_some_and(|name| name == IN_FOLDERS[1]);
    match is_of_peft && config.is_file() {
        true => Ok(vec![(String::new(), read_config(&config)?)]),
        false => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_split_into_layer_and_part() {
        let layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
        for end in [
            "lora_A.weight",
            "lora_A.default.weight",
            "lora.down.weight",
            "lora_down.weight",
        ] {
            let (found, part) = split(&format!("{layer}.{end}")).unwrap();
            assert!(found == layer && matches!(part, Part::Down), "{end}");
        }
        for (key, layer) in [
            ("x.attn1.processor.to_q_lora.up.weight", "x.attn1.to_q"),
            (
                "x.attn1.processor.to_out_lora.up.weight",
                "x.attn1.to_out.0",
            ),
            (
                "text_encoder.l.self_attn.to_out_lora.up.weight",
                "text_encoder.l.self_attn.out_proj",
            ),
            (
                "text_encoder.l.self_attn.q_proj.lora_linear_layer.up.weight",
                "text_encoder.l.self_attn.q_proj",
            ),
            ("lora_unet_x.lora_up.weight", "lora_unet_x"),
        ] {
            let (found, part) = split(key).unwrap();
            assert!(matches!(part, Part::Up));
            assert_eq!(found, layer);
        }
        for other in ["conv_in.weight", "x.lora_A.a.b.weight", "x.lora_B.bias"] {
            assert!(split(other).is_none(), "{other}");
        }
    }

    #[test]
    fn kernels_fit_their_own_size() {
        assert!(kernels_fit(&[8, 4, 3, 3], &[2, 4, 3, 3]));
        assert!(kernels_fit(&[8, 4], &[2, 4, 1, 1]));
        assert!(kernels_fit(&[8, 4, 1, 1], &[2, 4]));
        assert!(!kernels_fit(&[8, 9, 1, 1], &[2, 1, 3, 3]));
    }
}
