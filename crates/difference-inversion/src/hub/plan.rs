//! The files of a repository, or of a folder, that make up a model.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::diffusion::family::{self, Family, STABLE_DIFFUSION};
use crate::diffusion::frozen::CAPTIONER_FOLDER;
use crate::diffusion::joint_space;
use crate::diffusion::model_files::MODEL_INDEX as INDEX;
use crate::diffusion::model_files::{SCHEDULER, tokenizer_of};
use crate::hub::Wanted;
use crate::weights::{STEMS, shards_come_first, suffixes};

/// The contents of a model's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// One network: `config.json` and weights.
    Network,
    Tokenizer,
    Scheduler,
    /// A transformers model with its tokenizer and preprocessor.
    Transformer,
}

/// The pictures of an analogy for a first try, which a model may bring.
const EXAMPLE: [&str; 3] = ["images/a.png", "images/a_prime.png", "images/b.png"];

/// The optional folders of pipelines, and those of their tokenizers.
fn optional_parts() -> impl Iterator<Item = String> {
    let encoders = family::all().flat_map(|family| family.text_encoders);
    let optional = encoders.filter(|encoder| encoder.optional);
    optional.flat_map(|encoder| [encoder.part.to_owned(), tokenizer_of(encoder.part)])
}

/// The folders of diffusers pipelines that this library reads.
fn pipeline_parts() -> impl Iterator<Item = (String, Part)> {
    let networks = family::networks().into_iter();
    let networks = networks.map(|name| (name.to_owned(), Part::Network));
    let tokenizers = family::text_encoders().into_iter();
    let tokenizers = tokenizers.map(|name| (tokenizer_of(name), Part::Tokenizer));
    let others = joint_space::FOLDERS.into_iter().chain([CAPTIONER_FOLDER]);
    let others = others.map(|name| (name.to_owned(), Part::Transformer));
    networks
        .chain(tokenizers)
        .chain([(SCHEDULER.to_owned(), Part::Scheduler)])
        .chain(others)
}

/// The family of a pipeline; of one that does not say, Stable Diffusion.
fn family_of(index: Option<&Map<String, Value>>) -> &'static Family {
    let class = index.and_then(|index| index.get("_class_name")?.as_str());
    let family = class.and_then(Family::of_class);
    family.unwrap_or(&STABLE_DIFFUSION)
}

/// The files of a model, by their paths in the repository, and its missing files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Plan {
    pub(super) files: BTreeSet<String>,
    pub(super) missing: Vec<String>,
}

impl Plan {
    /// Selects among the `paths` of a repository or folder: a diffusers pipeline if there is a
    /// `model_index.json`, whose contents refine the selection if given, else one transformers model.
    pub(super) fn new<'a>(
        paths: &BTreeSet<String>,
        index: Option<&Map<String, Value>>,
        wanted: impl Into<Wanted<'a>>,
    ) -> Self {
        let Wanted {
            variant,
            without_t5,
            without_denoiser,
            without_encoders,
        } = wanted.into();
        let mut plan = Self::default();
        if !paths.contains(INDEX) && !paths.contains("config.json") {
            plan.missing.push(format!("{INDEX} or config.json"));
            return plan;
        }
        for extra in [INDEX, "dinv.json", "README.md"].into_iter().chain(EXAMPLE) {
            plan.take_if_there(paths, extra);
        }
        if !paths.contains(INDEX) {
            plan.part(paths, "", Part::Transformer, Some(variant));
            return plan;
        }
        let family = family_of(index);
        let needed = [family.denoiser.part, family.autoencoder.part, SCHEDULER];
        let is_replaced = |name: &str| {
            let mut encoders = family.text_encoders.iter();
            let Some(own) = encoders.find(|encoder| encoder.part == name) else {
                return without_denoiser && name == family.denoiser.part;
            };
            // Which file belongs to which of two CLIPs is only known from their configurations.
            let kinds = family.text_encoders.iter().map(|encoder| encoder.kind);
            let others: BTreeSet<usize> = (without_encoders.iter())
                .filter(|(kind, _)| *kind == own.kind)
                .map(|(_, width)| *width)
                .collect();
            !others.is_empty() && others.len() >= kinds.filter(|kind| *kind == own.kind).count()
        };
        let optional = |name: &str| optional_parts().any(|part| part == name);
        for (name, part) in pipeline_parts() {
            if without_t5 && optional(&name) {
                continue;
            }
            let folder = format!("{name}/");
            let named = index
                .and_then(|index| index.get(&name))
                .is_some_and(is_used);
            let there = paths.iter().any(|path| path.starts_with(&folder));
            if needed.contains(&name.as_str()) || named || there {
                let weights = (!is_replaced(&name)).then_some(variant);
                plan.part(paths, &folder, part, weights);
            }
        }
        plan
    }

    /// Takes the files of a part, with its weights in a variant, if they are wanted.
    fn part(
        &mut self,
        paths: &BTreeSet<String>,
        folder: &str,
        part: Part,
        weights: Option<Option<&str>>,
    ) {
        if matches!(part, Part::Network | Part::Transformer) {
            self.one_of(paths, folder, &[&["config.json"]]);
            if let Some(variant) = weights {
                self.weights(paths, folder, variant);
            }
        }
        if matches!(part, Part::Tokenizer | Part::Transformer) {
            let names: [&[&str]; 2] = [&["tokenizer.json"], &["vocab.json", "merges.txt"]];
            let model = format!("{folder}spiece.model");
            // T5's, which is not read if there is a tokenizer.json.
            if !paths.contains(&format!("{folder}tokenizer.json")) && paths.contains(&model) {
                self.files.insert(model);
            } else {
                self.one_of(paths, folder, &names);
            }
            let names = [
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
            ];
            for name in names {
                self.take_if_there(paths, &format!("{folder}{name}"));
            }
        }
        if part == Part::Scheduler {
            self.one_of(paths, folder, &[&["scheduler_config.json"]]);
        }
        if part == Part::Transformer {
            let names: [&[&str]; 2] = [&["preprocessor_config.json"], &["processor_config.json"]];
            self.one_of(paths, folder, &names);
            self.take_if_there(paths, &format!("{folder}generation_config.json"));
        }
    }

    /// Selects every existing file of these sets; at least one set must be complete.
    fn one_of(&mut self, paths: &BTreeSet<String>, folder: &str, sets: &[&[&str]]) {
        let there = |name: &&str| paths.contains(&format!("{folder}{name}"));
        if !sets.iter().any(|set| set.iter().all(there)) {
            let sets: Vec<String> = sets.iter().map(|set| set.join(" and ")).collect();
            self.missing.push(format!("{folder}{}", sets.join(" or ")));
        }
        for name in sets.iter().copied().flatten() {
            self.take_if_there(paths, &format!("{folder}{name}"));
        }
    }

    fn take_if_there(&mut self, paths: &BTreeSet<String>, path: &str) {
        if paths.contains(path) {
            self.files.insert(path.to_owned());
        }
    }

    /// Selects the weights in one variant, in one file or in all of its shards with their index, whose stem
    /// may differ.
    fn weights(&mut self, paths: &BTreeSet<String>, folder: &str, variant: Option<&str>) {
        let mut incomplete = None;
        for suffix in &suffixes(variant) {
            let has_shards = |stem: &str| {
                let index = format!("{folder}{stem}.safetensors.index{suffix}.json");
                shards_come_first(stem) && paths.contains(&index)
            };
            let mut stems = STEMS.into_iter().filter(|stem| !has_shards(stem));
            let single = stems.find_map(|stem| {
                let path = format!("{folder}{stem}{suffix}.safetensors");
                paths.contains(&path).then_some(path)
            });
            if let Some(single) = single {
                self.files.insert(single);
                return;
            }
            let mut all = STEMS.into_iter();
            let found = all.find_map(|stem| Shards::find(paths, folder, stem, suffix));
            let Some(Shards { files, missing }) = found else {
                continue;
            };
            let names = STEMS.map(|stem| format!("{folder}{stem}.safetensors.index{suffix}.json"));
            let index = names.iter().find(|path| paths.contains(*path));
            match (index, missing.first()) {
                (Some(index), None) => {
                    self.files.insert(index.clone());
                    self.files.extend(files);
                    return;
                }
                (_, Some(shard)) => incomplete = incomplete.or(Some(shard.clone())),
                (None, None) => incomplete = incomplete.or(Some(names[1].clone())),
            }
        }
        let pickled = ["diffusion_pytorch_model.bin", "pytorch_model.bin"];
        let pickled = pickled.map(|name| format!("{folder}{name}"));
        let pickled = pickled.iter().find(|path| paths.contains(*path));
        self.missing.push(match (incomplete, pickled) {
            (Some(file), _) => file,
            (None, Some(path)) => format!("{folder}*.safetensors ({path} is not read)"),
            (None, None) => format!("{folder}*.safetensors"),
        });
    }
}

/// Whether an entry of `model_index.json` names a class: `[null, null]` is a part left out.
fn is_used(entry: &Value) -> bool {
    entry.get(0).is_some_and(Value::is_string)
}

/// The shards `STEM-00001-of-00002.safetensors`; the suffix of a variant is before or after the
/// numbers.
#[derive(Debug)]
struct Shards {
    files: Vec<String>,
    missing: Vec<String>,
}

impl Shards {
    fn find(paths: &BTreeSet<String>, folder: &str, stem: &str, suffix: &str) -> Option<Self> {
        let forms = [(suffix, ""), ("", suffix)];
        for (before, behind) in forms {
            let start = format!("{folder}{stem}{before}-");
            let end = format!("{behind}.safetensors");
            let count = paths.iter().find_map(|path| {
                let numbers = path.strip_prefix(&start)?.strip_suffix(&end)?;
                let (number, count) = numbers.split_once("-of-")?;
                let _: u16 = number.parse().ok()?;
                count.parse::<u16>().ok()
            });
            let Some(count) = count else { continue };
            let all = (1..=count).map(|number| format!("{start}{number:05}-of-{count:05}{end}"));
            let (files, missing) = all.partition(|path| paths.contains(path));
            return Some(Self { files, missing });
        }
        None
    }
}

/// The files missing from the model in a folder on this machine, by path; empty if it is complete. A
/// requested `variant` must exist for at least one of the networks. The contents of files are not
/// checked.
pub fn missing<'a>(folder: &Path, wanted: impl Into<Wanted<'a>>) -> Vec<String> {
    let wanted = wanted.into();
    let mut paths = BTreeSet::new();
    collect(folder, "", &mut paths);
    let index = std::fs::read(folder.join(INDEX)).ok();
    let index = index.and_then(|text| serde_json::from_slice(&text).ok());
    let Plan { files, mut missing } = Plan::new(&paths, index.as_ref(), wanted);
    let Some(variant) = wanted.variant else {
        return missing;
    };
    let suffix = format!(".{variant}");
    let mut weights = files.iter().filter(|path| path.ends_with(".safetensors"));
    if !weights.any(|path| path.contains(&suffix)) {
        missing.push(format!("*{suffix}.safetensors"));
    }
    missing
}

/// The files in a folder and its subfolders, links followed; unreadable ones count as missing.
fn collect(folder: &Path, prefix: &str, paths: &mut BTreeSet<String>) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        if path.is_file() {
            paths.insert(name);
        } else if prefix.is_empty() && path.is_dir() {
            collect(&path, &format!("{name}/"), paths);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a repository like `stabilityai/stable-diffusion-xl-base-1.0`.
    const SDXL: &str = "
        .gitattributes LICENSE.md README.md model_index.json 01.png
        sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors
        scheduler/scheduler_config.json
        text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors
        text_encoder/model.onnx text_encoder/model.safetensors text_encoder/openvino_model.bin
        text_encoder_2/config.json text_encoder_2/model.safetensors
        text_encoder_2/model.fp16.safetensors text_encoder_2/model.onnx_data
        tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
        tokenizer/vocab.json
        tokenizer_2/merges.txt tokenizer_2/vocab.json
        unet/config.json unet/diffusion_flax_model.msgpack
        unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.safetensors
        unet/model.onnx
        vae/config.json vae/diffusion_pytorch_model.safetensors
        vae_1_0/config.json vae_1_0/diffusion_pytorch_model.safetensors
        safety_checker/config.json safety_checker/model.safetensors";

    fn paths(text: &str) -> BTreeSet<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn plan(text: &str, variant: Option<&str>) -> Plan {
        Plan::new(&paths(text), None, variant)
    }

    #[test]
    fn of_a_pipeline_only_what_is_read_is_taken_in_one_variant() {
        let full = plan(SDXL, None);
        assert!(full.missing.is_empty(), "{:?}", full.missing);
        let expected = "README.md model_index.json scheduler/scheduler_config.json
            text_encoder/config.json text_encoder/model.safetensors
            text_encoder_2/config.json text_encoder_2/model.safetensors
            tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
            tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/vocab.json
            unet/config.json unet/diffusion_pytorch_model.safetensors
            vae/config.json vae/diffusion_pytorch_model.safetensors";
        assert_eq!(full.files, paths(expected));
        let half = plan(SDXL, Some("fp16"));
        let weights: Vec<&String> = half
            .files
            .iter()
            .filter(|path| path.ends_with(".safetensors"))
            .collect();
        let expected = [
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/model.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors", // there is no other
        ];
        assert_eq!(weights, expected);
    }

    #[test]
    fn a_transformers_model_lies_at_the_top() {
        let clip = "README.md config.json flax_model.msgpack merges.txt model.safetensors
            preprocessor_config.json pytorch_model.bin tf_model.h5 tokenizer.json vocab.json";
        let plan = plan(clip, None);
        assert!(plan.missing.is_empty(), "{:?}", plan.missing);
        let expected = "README.md config.json merges.txt model.safetensors
            preprocessor_config.json tokenizer.json vocab.json";
        assert_eq!(plan.files, paths(expected));
    }

    #[test]
    fn shards_come_together_with_their_index() {
        let rest = "config.json tokenizer.json preprocessor_config.json";
        let shards = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors";
        let index = "model.safetensors.index.json";
        let whole = plan(&format!("{rest} {shards} {index}"), None);
        assert!(whole.missing.is_empty(), "{:?}", whole.missing);
        assert!(paths(&format!("{shards} {index}")).is_subset(&whole.files));
        let one = "model-00001-of-00002.safetensors";
        let part = plan(&format!("{rest} {one} {index}"), None);
        assert_eq!(part.missing, ["model-00002-of-00002.safetensors"]);
        let bare = plan(&format!("{rest} {shards}"), None);
        assert_eq!(bare.missing, [index]);
        let old = shards.replace("model", "pytorch_model");
        let old = plan(&format!("{rest} {old} {index}"), None);
        assert!(old.missing.is_empty(), "{:?}", old.missing);
        for form in ["model.fp16-00001-of-00001", "model-00001-of-00001.fp16"] {
            let text = format!("{rest} {form}.safetensors model.safetensors.index.fp16.json");
            assert!(plan(&text, None).missing.is_empty(), "{form}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            plan("weights.safetensors", None).missing,
            ["model_index.json or config.json"]
        );
        let bare = plan("model_index.json unet/config.json", None);
        assert_eq!(
            bare.missing,
            [
                "unet/*.safetensors",
                "vae/config.json",
                "vae/*.safetensors",
                "scheduler/scheduler_config.json"
            ]
        );
        let pickled = "config.json tokenizer.json processor_config.json pytorch_model.bin";
        assert_eq!(
            plan(pickled, None).missing,
            ["*.safetensors (pytorch_model.bin is not read)"]
        );
    }

    #[test]
    fn the_index_of_a_pipeline_tells_of_folders_that_are_not_there() {
        let text = r#"{"_class_name": "X", "text_encoder_2": ["transformers", "Y"],
            "tokenizer_2": [null, null], "requires_safety_checker": false}"#;
        let index: Map<String, Value> = serde_json::from_str(text).unwrap();
        let sd = SDXL.replace("text_encoder_2/", "other/");
        let sd = sd.replace("tokenizer_2/", "other/");
        let plan = Plan::new(&paths(&sd), Some(&index), None);
        assert_eq!(
            plan.missing,
            ["text_encoder_2/config.json", "text_encoder_2/*.safetensors"]
        );
    }

    #[test]
    fn a_sentencepiece_model_is_taken_if_there_is_nothing_else() {
        let chroma = "
            model_index.json scheduler/scheduler_config.json Chroma1-HD.safetensors
            text_encoder/config.json text_encoder/model.safetensors
            tokenizer/added_tokens.json tokenizer/spiece.model tokenizer/tokenizer_config.json
            transformer/config.json transformer/diffusion_pytorch_model.safetensors
            vae/config.json vae/diffusion_pytorch_model.safetensors";
        let index = serde_json::json!({ "_class_name": "ChromaPipeline" });
        let plan = |text: &str| Plan::new(&paths(text), index.as_object(), None);
        let found = plan(chroma);
        assert!(found.missing.is_empty(), "{:?}", found.missing);
        let mut expected = paths(chroma);
        expected.remove("Chroma1-HD.safetensors");
        assert_eq!(found.files, expected);
        let both = plan(&format!("{chroma} tokenizer/tokenizer.json"));
        assert!(!both.files.contains("tokenizer/spiece.model"));
        let neither = plan(&chroma.replace("tokenizer/spiece.model", ""));
        assert_eq!(
            neither.missing,
            ["tokenizer/tokenizer.json or vocab.json and merges.txt"]
        );
    }

    #[test]
    fn t5_is_left_out_where_it_is_not_wanted() {
        let sd3 = "
            model_index.json scheduler/scheduler_config.json
            sd3_medium_incl_clips_t5xxlfp8.safetensors
            text_encoder/config.json text_encoder/model.safetensors
            text_encoder_2/config.json text_encoder_2/model.safetensors
            text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors
            text_encoder_3/model-00002-of-00002.safetensors
            text_encoder_3/model.safetensors.index.json
            tokenizer/merges.txt tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/vocab.json
            tokenizer_3/tokenizer.json tokenizer_3/spiece.model
            transformer/config.json transformer/diffusion_pytorch_model.safetensors
            vae/config.json vae/diffusion_pytorch_model.safetensors";
        let index = serde_json::json!({
            "_class_name": "StableDiffusion3Pipeline",
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        });
        let plan = |text: &str, without_t5| {
            let wanted = Wanted {
                without_t5,
                ..Wanted::default()
            };
            Plan::new(&paths(text), index.as_object(), wanted)
        };
        let whole = plan(sd3, false);
        assert_eq!(whole.missing, Vec::<String>::new());
        let is_third = |path: &&String| path.contains("_3/");
        let third: Vec<&String> = whole.files.iter().filter(is_third).collect();
        assert_eq!(third.len(), 5, "{third:?}");
        assert!(
            !whole
                .files
                .contains("sd3_medium_incl_clips_t5xxlfp8.safetensors")
        );
        let without = plan(sd3, true);
        assert_eq!(without.missing, Vec::<String>::new());
        let others = whole.files.iter().filter(|path| !is_third(path));
        assert!(without.files.iter().eq(others));
        // A copy without it is complete for users who do not want it.
        let incomplete = sd3.replace("text_encoder_3/", "other/");
        assert_eq!(plan(&incomplete, true).missing, Vec::<String>::new());
        assert!(plan(&incomplete, false).missing[0].starts_with("text_encoder_3/"));
        // A transformer that is replaced keeps its configuration.
        let wanted = Wanted {
            without_denoiser: true,
            ..Wanted::default()
        };
        let replaced = Plan::new(&paths(sd3), index.as_object(), wanted);
        let weights = "transformer/diffusion_pytorch_model.safetensors";
        let others = whole.files.iter().filter(|path| *path != weights);
        assert!(replaced.files.iter().eq(others));
        assert_eq!(replaced.missing, Vec::<String>::new());
    }

    #[test]
    fn a_folder_is_looked_through() {
        let folder =
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden/pipeline");
        assert_eq!(missing(&folder, None), Vec::<String>::new());
        assert_eq!(missing(&folder, Some("fp16")), ["*.fp16.safetensors"]);
        let some = tempfile::tempdir().unwrap();
        for path in paths(SDXL).iter().filter(|path| !path.contains("fp16")) {
            let path = some.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let unet = "unet/diffusion_pytorch_model.non_ema.safetensors";
        std::fs::write(some.path().join(unet), "").unwrap();
        assert_eq!(
            missing(some.path(), Some("non_ema")),
            Vec::<String>::new(),
            "networks without a variant are taken as they are"
        );
        assert_eq!(
            missing(&folder.join("absent"), None),
            ["model_index.json or config.json"]
        );
    }
}
