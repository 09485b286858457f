//! Properties of the readers of untrusted files: whatever is in a file, reading it gives a result or
//! an error, without a panic and without more memory than the file has bytes.
//!
//! `PROPTEST_CASES=100000 cargo test --release --features webgpu fuzz::` tries more and other cases. Cases that failed
//! are tests at the end.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::model_files::embedding::EmbeddingFile;
use difference_inversion::diffusion::model_files::layout::Layout;
use difference_inversion::diffusion::model_files::lora::LoraFile;
use difference_inversion::diffusion::model_files::{FileOptions, MODEL_INDEX, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::diffusion::sample::{
    AlphaSchedule, FlowConfig, FlowSchedule, Noising, SchedulerConfig, SolverKind,
};
use difference_inversion::image::{ImagePreprocessor, RgbImage};
use difference_inversion::models::captioner::Captioner;
use difference_inversion::models::denoiser::Memory;
use difference_inversion::models::denoiser::chroma::{ChromaConfig, ChromaTransformer2DModel};
use difference_inversion::models::denoiser::flux::{FluxConfig, FluxTransformer2DModel};
use difference_inversion::models::denoiser::flux2::{Flux2Config, Flux2Transformer2DModel};
use difference_inversion::models::denoiser::sd3::{SD3Config, SD3Transformer2DModel};
use difference_inversion::models::denoiser::unet::{UNet2DConditionModel, UNetConfig};
use difference_inversion::models::text::clip::ClipModel;
use difference_inversion::models::text::clip_text::{ClipTextConfig, ClipTextModel};
use difference_inversion::models::text::qwen3::{Qwen3Config, Qwen3Model};
use difference_inversion::models::text::t5::{T5Config, T5EncoderModel};
use difference_inversion::models::text::tokenizer::{ClipTokenizer, Tokenizer};
use difference_inversion::models::vae::{AutoencoderKL, AutoencoderKLConfig};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::weights::{Weights, parse_config};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::RngSeed;
use serde_json::{Map, Value, json};

use crate::tiny::golden;

/// The default number of cases is what CI runs, always the same ones; failures are printed, not
/// written to files.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let rng_seed = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default.rng_seed,
        None => RngSeed::Fixed(7),
    };
    ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 2000,
        rng_seed,
        ..default
    }
}

/// A safetensors file whose header is `json`, which claims to be longer by `lie` bytes.
fn with_header(json: &[u8], lie: i64, data: &[u8]) -> Vec<u8> {
    let length = (json.len() as u64).wrapping_add_signed(lie);
    [&length.to_le_bytes(), json, data].concat()
}

/// JSON as text, with the word NaN in place of marked strings, as Python would write it.
fn text_of(value: &Value) -> Vec<u8> {
    value.to_string().replace("\"NaN\"", "NaN").into_bytes()
}

/// Values that are invalid or far too large.
fn nasty() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!("NaN")),
        Just(json!("")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[1, 2], "x"])),
        Just(json!(true)),
        Just(json!(1e308)),
        Just(json!(-1.5)),
        select(vec![
            0_u64,
            1,
            2,
            3,
            7,
            1 << 16,
            1 << 31,
            1 << 32,
            1 << 62,
            1 << 63,
            u64::MAX
        ])
        .prop_map(|number| json!(number)),
        any::<i64>().prop_map(|number| json!(number)),
        vec(0_u64..9, 0..70).prop_map(|numbers| json!(numbers)),
        select(vec![1_u64 << 40, 1 << 63, u64::MAX]).prop_map(|number| json!(vec![number; 4])),
    ]
}

/// Some JSON.
fn some_json() -> impl Strategy<Value = Value> {
    nasty().prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::Array),
            proptest::collection::btree_map("[a-z_]{0,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// `object` with some of its fields replaced, including those of nested objects.
fn changed(object: Value) -> impl Strategy<Value = Value> {
    vec((any::<Index>(), any::<Index>(), nasty()), 0..4).prop_map(move |changes| {
        let mut object = object.clone();
        for (at, inside, value) in changes {
            let Some(fields) = object.as_object_mut().filter(|fields| !fields.is_empty()) else {
                continue;
            };
            let place = at.index(fields.len());
            let field = fields.values_mut().nth(place).unwrap();
            match field.as_object_mut().filter(|fields| !fields.is_empty()) {
                Some(fields) => {
                    let place = inside.index(fields.len());
                    *fields.values_mut().nth(place).unwrap() = value;
                }
                None => *field = value,
            }
        }
        object
    })
}

/// The header of one tensor.
fn tensor_header() -> impl Strategy<Value = Value> {
    let dtype = prop_oneof![
        select(vec![
            "F32", "F16", "BF16", "F64", "I64", "U8", "F8_E4M3", "BOOL", "F4", "X"
        ])
        .prop_map(|name| json!(name)),
        nasty(),
    ];
    let shape = prop_oneof![vec(0_u64..5, 0..5).prop_map(|shape| json!(shape)), nasty()];
    let offsets = prop_oneof![
        (0_u64..64, 0_u64..64).prop_map(|(start, end)| json!([start, end])),
        (any::<u64>(), any::<u64>()).prop_map(|(start, end)| json!([start, end])),
        nasty(),
    ];
    (dtype, shape, offsets).prop_map(|(dtype, shape, offsets)| {
        json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets })
    })
}

/// Reads everything that a file of weights declares.
fn read_all(bytes: Vec<u8>) {
    let length = bytes.len() as u64;
    let Ok(weights) = Weights::from_bytes(bytes, "x", &Device::flex(), FloatDType::F32) else {
        return;
    };
    assert!(weights.bytes() <= length);
    for key in weights.keys() {
        match *weights.shape(key).unwrap() {
            [a] => drop(weights.tensor(key, [a])),
            [a, b] => drop(weights.tensor(key, [a, b])),
            [a, b, c] => drop(weights.tensor(key, [a, b, c])),
            [a, b, c, d] => drop(weights.tensor(key, [a, b, c, d])),
            _ => {}
        }
    }
}

/// A network's tensors: none.
fn nothing() -> Weights {
    let bytes = with_header(b"{}", 0, b"");
    Weights::from_bytes(bytes, "nothing", &Device::flex(), FloatDType::F32).unwrap()
}

/// Parses `json` as the configuration of every network and loads it without tensors, which must give an
/// error and nothing else; the noise schedule needs no tensors.
fn load_all(json: &[u8]) {
    let path = Path::new("config.json");
    if let Ok(config) = parse_config::<UNetConfig>(json, path) {
        assert!(UNet2DConditionModel::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<AutoencoderKLConfig>(json, path) {
        assert!(AutoencoderKL::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<ClipTextConfig>(json, path) {
        assert!(ClipTextModel::load_alone(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<SD3Config>(json, path) {
        assert!(SD3Transformer2DModel::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<FluxConfig>(json, path) {
        assert!(FluxTransformer2DModel::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<ChromaConfig>(json, path) {
        assert!(ChromaTransformer2DModel::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<Flux2Config>(json, path) {
        assert!(Flux2Transformer2DModel::load(&nothing(), &config).is_err());
    }
    if let Ok(config) = parse_config::<Qwen3Config>(json, path) {
        assert!(Qwen3Model::load(&nothing(), &config, &[1]).is_err());
    }
    if let Ok(config) = parse_config::<T5Config>(json, path) {
        assert!(T5EncoderModel::load(&nothing(), &config, Memory::Low).is_err());
    }
    if let Ok(config) = parse_config::<FlowConfig>(json, path)
        && let Ok(schedule) = FlowSchedule::new(&config, path)
    {
        for schedule in [schedule.clone(), schedule.with_empirical_shift()] {
            for steps in [1, 2, 7] {
                for tokens in [1, 4096, 1 << 24] {
                    let times = Noising::Flow(schedule.clone())
                        .for_tokens(tokens)
                        .times(steps);
                    assert!(times.is_err() || times.unwrap().iter().all(|time| time.is_finite()));
                }
            }
        }
    }
    if let Ok(config) = parse_config::<SchedulerConfig>(json, path)
        && let Ok(schedule) = AlphaSchedule::new(&config, path)
    {
        assert!(schedule.alphas_cumprod().len() <= 100_000);
        let schedule = Noising::Discrete(schedule);
        for kind in SolverKind::ALL {
            for steps in [0, 1, 2, 7] {
                if let Ok(solver) = kind.build(&schedule, steps, 0.0) {
                    assert!(solver.timesteps().len() <= 2 * steps);
                }
            }
        }
    }
}

/// A folder with `files` and a file of weights without tensors.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    std::fs::write(
        folder.path().join("model.safetensors"),
        with_header(b"{}", 0, b""),
    )
    .unwrap();
    folder
}

/// Opens a folder with `json` as every configuration of a transformers folder.
fn open_all(json: &[u8]) {
    let names = [
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    ];
    let mut files: Vec<(&str, &[u8])> = names.iter().map(|name| (*name, json)).collect();
    files.extend([("vocab.json", json), ("merges.txt", b"a b".as_slice())]);
    files.push(("tokenizer.json", json));
    files.push(("vocab.txt", b"[UNK]\n"));
    let folder = folder(&files);
    let device = Device::flex();
    assert!(ClipModel::open(folder.path(), &device, FloatDType::F32).is_err());
    assert!(Captioner::open(folder.path(), &device, FloatDType::F32).is_err());
    drop(ClipTokenizer::open(folder.path()));
    drop(Tokenizer::open(folder.path()));
    drop(Tokenizer::open_qwen(folder.path()));
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    drop(Tokenizer::open_qwen(folder.path()));
    drop(ClipTokenizer::open(folder.path()));
    if let Ok(preprocessor) = ImagePreprocessor::open(folder.path()) {
        let picture = RgbImage::from_pixel(5, 4, image::Rgb([9, 8, 7]));
        let [b, channels, height, width] = preprocessor.apply(&picture, &device).dims();
        assert!([b, channels] == [1, 3] && height.max(width) <= 4096);
    }
}

/// Every configuration to start from.
fn configurations() -> Vec<Value> {
    let mut all = Vec::new();
    for name in Layout::names() {
        let family = Layout::by_name(name).unwrap();
        all.extend([family.denoiser, family.vae, family.scheduler]);
        all.extend(
            family
                .text_encoders
                .into_iter()
                .map(|encoder| encoder.config),
        );
    }
    for name in [
        "pipeline/clip/config.json",
        "pipeline/captioner/config.json",
        "blip/base/config.json",
        "pipeline/clip/preprocessor_config.json",
        "pipeline/captioner/preprocessor_config.json",
        "pipeline/tokenizer/tokenizer_config.json",
        "sd3/transformer/config.json",
        "flux/transformer/config.json",
        "chroma/transformer/config.json",
        "klein/transformer/config.json",
        "klein/text_encoder/config.json",
        "klein/vae/config.json",
        "z_image/transformer/config.json",
        "sd3/text_encoder_3/config.json",
        "sd3/tokenizer_3/tokenizer.json",
        "sd3/scheduler/scheduler_config.json",
    ] {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let text = std::fs::read(root.join("tests/golden").join(name)).unwrap();
        all.push(serde_json::from_slice(&text).unwrap());
    }
    all
}

/// A key of a single file, or nearly one.
fn key() -> impl Strategy<Value = String> {
    let part = select(vec![
        "model.diffusion_model.input_blocks.",
        "model.diffusion_model.output_blocks.",
        "model.diffusion_model.middle_block.",
        "model.diffusion_model.",
        "first_stage_model.encoder.down.",
        "first_stage_model.decoder.up.",
        "first_stage_model.encoder.mid.",
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.model.transformer.resblocks.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "conditioner.embedders.1.model.transformer.resblocks.",
        "model_ema.",
        "",
    ]);
    let number = prop_oneof![
        (0_u64..30).prop_map(|number| number.to_string()),
        any::<u64>().prop_map(|number| number.to_string()),
        "[0-9]{0,30}",
        "[-+a-zé.]{0,3}",
    ];
    let rest = select(vec![
        ".0.in_layers.0.weight",
        ".1.transformer_blocks.0.attn2.to_k.weight",
        ".0.op.weight",
        ".2.conv.bias",
        ".block.0.norm1.weight",
        ".attn.in_proj_weight",
        ".attn_1.q.weight",
        "attn_1.proj_out.weight",
        "text_projection",
        "positional_embedding",
        "time_embed.0.weight",
        "",
        ".",
    ]);
    (part, number, rest).prop_map(|(part, number, rest)| format!("{part}{number}{rest}"))
}

/// A whole file with these tensors of f16, all zero.
fn file_of(tensors: &BTreeMap<String, Vec<usize>>) -> Vec<u8> {
    let (mut header, mut end) = (Map::new(), 0);
    for (key, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let info = json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] });
        header.insert(key.clone(), info);
    }
    with_header(&text_of(&Value::Object(header)), 0, &vec![0; end])
}

/// Opens a single file, whatever it is, and reads everything readable in it.
fn open_single(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    drop(Arrays::read(&path));
    let families = [
        None,
        Some(Layout::sd1()),
        Some(Layout::sd2()),
        Some(Layout::sdxl()),
    ];
    for family in families {
        let options = FileOptions {
            family,
            ..FileOptions::default()
        };
        let Ok(files) = ModelFiles::open(&path, &options) else {
            continue;
        };
        for network in ["unet", "vae", "text_encoder", "text_encoder_2"] {
            if let Ok(weights) = files.weights(network, &Device::flex(), FloatDType::F32) {
                assert!(weights.bytes() <= bytes.len() as u64);
                for key in weights.keys() {
                    match *weights.shape(key).unwrap() {
                        [a] => drop(weights.tensor(key, [a]).unwrap()),
                        [a, b] => drop(weights.tensor(key, [a, b]).unwrap()),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Keys of files that are given in addition to a model.
fn key_of_adapter() -> impl Strategy<Value = String> {
    let layers = [
        "lora_unet_mid_block_attentions_0_proj_in",
        "unet.conv_in",
        "diffusion_model.time_embed.0",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "x",
    ];
    let ends = [
        "lora_down.weight",
        "lora_up.weight",
        "lora_A.weight",
        "lora_B.weight",
        "alpha",
    ];
    let of_lora = (select(layers.to_vec()), select(ends.to_vec()));
    let others = [
        "emb_params",
        "clip_g",
        "<x>",
        "decoder.conv_in.weight",
        "decoder.up.9.block.0.norm1.bias",
    ];
    prop_oneof![
        4 => of_lora.prop_map(|(layer, end)| format!("{layer}.{end}")),
        1 => select(others.to_vec()).prop_map(str::to_owned),
    ]
}

/// Opens the tiny pipeline with a file in place of each additional input.
fn open_with(bytes: &[u8]) {
    let folder = folder(&[("x.safetensors", bytes)]);
    let path = folder.path().join("x.safetensors");
    let lora = LoraFile {
        path: path.clone(),
        weight: 0.5,
    };
    let word = EmbeddingFile {
        name: None,
        path: path.clone(),
    };
    for options in [
        FileOptions {
            loras: vec![lora],
            ..FileOptions::default()
        },
        FileOptions {
            embeddings: vec![word],
            ..FileOptions::default()
        },
        FileOptions {
            vae: Some(path),
            ..FileOptions::default()
        },
    ] {
        if let Ok(files) = ModelFiles::open(&golden("pipeline"), &options) {
            drop(Pipeline::open(&files, &Device::flex(), FloatDType::F32));
        }
    }
}

/// A golden file of which some bytes are changed, those of `part` if it is given, and which is cut at `end`.
fn damaged(
    name: &str,
    changes: &[(Index, u8)],
    part: Option<std::ops::Range<usize>>,
    end: Option<Index>,
) -> Vec<u8> {
    let mut bytes = std::fs::read(golden(name)).unwrap();
    let whole = bytes.len();
    let part = part.map_or(0..whole, |part| part.start..part.end.min(whole));
    for (at, byte) in changes {
        bytes[part.start + at.index(part.len())] = *byte;
    }
    if let Some(end) = end {
        bytes.truncate(end.index(whole));
    }
    bytes
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_adapter_is_merged_or_refused(
        tensors in proptest::collection::btree_map(
            key_of_adapter(),
            vec(select(&[0_usize, 1, 2, 4, 16, 32][..]), 0..5),
            0..5,
        ),
        cut in proptest::option::of(any::<Index>()),
    ) {
        let mut bytes = file_of(&tensors);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        open_with(&bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        read_all(bytes.clone());
        load_all(&bytes);
    }

    #[test]
    fn any_header_is_read_or_refused(
        tensors in proptest::collection::btree_map("[a-z.]{0,6}", tensor_header(), 0..4),
        metadata in proptest::option::of(some_json()),
        lie in prop_oneof![Just(0), -9_i64..9, any::<i64>()],
        data in vec(any::<u8>(), 0..64),
    ) {
        let mut header: Map<String, Value> = tensors.into_iter().collect();
        if let Some(metadata) = metadata {
            header.insert("__metadata__".to_owned(), metadata);
        }
        read_all(with_header(&text_of(&Value::Object(header)), lie, &data));
    }

    #[test]
    fn any_index_of_shards_is_read_or_refused(index in some_json()) {
        for json in [index.clone(), json!({ "weight_map": index })] {
            let folder = folder(&[("other.safetensors", b"")]);
            std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
            let path = folder.path().join("model.safetensors.index.json");
            std::fs::write(path, text_of(&json)).unwrap();
            drop(Weights::open(folder.path(), &Device::flex(), FloatDType::F32));
        }
    }

    #[test]
    fn any_configuration_is_read_or_refused(
        config in select(configurations()).prop_flat_map(changed),
    ) {
        load_all(&text_of(&config));
        open_all(&text_of(&config));
    }

    #[test]
    fn any_json_is_read_or_refused_as_configuration(config in some_json()) {
        load_all(&text_of(&config));
        open_all(&text_of(&config));
    }

    #[test]
    fn any_single_file_is_recognised_or_refused(
        tensors in proptest::collection::btree_map(key(), vec(0_usize..5, 0..5), 0..12),
        width in select(vec![0_usize, 1, 768, 1024, 1280, 2048]),
        channels in select(vec![0_usize, 3, 4, 8, 9]),
    ) {
        let mut tensors = tensors;
        let unet = "model.diffusion_model.input_blocks";
        let block = "1.1.transformer_blocks.0.attn2.to_k.weight";
        tensors.insert(format!("{unet}.{block}"), vec![1, width]);
        tensors.insert(format!("{unet}.0.0.weight"), vec![1, channels, 1, 1]);
        for key in [
            "first_stage_model.quant_conv.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "cond_stage_model.model.ln_final.bias",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            "conditioner.embedders.1.model.ln_final.bias",
        ] {
            // Keys of other families make it unknown; those of its own make it complete.
            let family = match width {
                768 => "cond_stage_model.t",
                1024 => "cond_stage_model.m",
                _ => "conditioner",
            };
            if key.starts_with(family) || key.starts_with("first_stage") {
                tensors.insert(key.to_owned(), vec![3]);
            }
        }
        open_single(&file_of(&tensors));
    }

    #[test]
    fn any_damage_to_a_single_file_is_read_or_refused(
        name in select(vec!["sd1", "sd2", "sdxl"]),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        in_header in any::<bool>(),
        end in proptest::option::of(any::<Index>()),
    ) {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden/single_file");
        let mut bytes = std::fs::read(root.join(format!("{name}.safetensors"))).unwrap();
        let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        for (at, byte) in changes {
            let at = at.index(if in_header { header } else { bytes.len() });
            bytes[at] = byte;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        open_single(&bytes);
        read_all(bytes);
    }

    /// Of a GGUF with every type, and of files of 8-bit floats with each kind of scales.
    #[test]
    fn any_damage_to_packed_weights_is_read_or_refused(
        name in select(vec!["blocks.gguf", "fp8_plain.safetensors", "fp8_older.safetensors", "fp8_newer.safetensors"]),
        changes in vec((any::<Index>(), any::<u8>()), 0..4),
        in_header in any::<bool>(),
        end in proptest::option::of(any::<Index>()),
    ) {
        let bytes = damaged(&format!("quantised/{name}"), &changes, in_header.then_some(0..2048), end);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        if let Ok(weights) = Weights::open(&path, &Device::flex(), FloatDType::F32) {
            for key in weights.keys().map(str::to_owned).collect::<Vec<_>>() {
                if let Some(&[rows, columns]) = weights.shape(&key).as_deref() {
                    drop(weights.tensor::<2>(&key, [rows, columns]));
                    drop(weights.linear(&key, [rows, columns]));
                }
            }
        }
    }

    #[test]
    fn any_damage_to_a_sentencepiece_model_is_read_or_refused(
        changes in vec((any::<Index>(), any::<u8>()), 0..4),
        of_the_normaliser in any::<bool>(),
        end in proptest::option::of(any::<Index>()),
        text in "[a-zA-Zﬁ\u{ff21}-\u{ff40} ▁\u{0}-\u{7f}]{0,12}",
    ) {
        let name = "chroma/tokenizer/spiece.model";
        // It is behind the pieces.
        let part = of_the_normaliser.then_some(617..usize::MAX);
        let bytes = damaged(name, &changes, part, end);
        let folder = folder(&[("spiece.model", bytes.as_slice())]);
        if let Ok(tokenizer) = Tokenizer::open_t5(folder.path()) {
            drop(tokenizer.encode(&text));
        }
    }

    #[test]
    fn any_model_index_is_read_or_refused(index in some_json()) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MODEL_INDEX), text_of(&index)).unwrap();
        let files = ModelFiles::open(folder.path(), &FileOptions::default()).unwrap();
        drop(files.config::<Value>(MODEL_INDEX));
    }
}

/// Found above: a level's layers were allocated before any was read, 64 GiB of them.
#[test]
fn sizes_that_no_network_has_are_refused_before_they_are_believed() {
    let path = Path::new("config.json");
    for (json, field) in [
        (
            json!({ "layers_per_block": 1_u64 << 32 }),
            "layers_per_block",
        ),
        (json!({ "layers_per_block": u64::MAX }), "layers_per_block"),
        (
            json!({ "transformer_layers_per_block": u64::MAX }),
            "transformer_layers_per_block",
        ),
        (
            json!({ "block_out_channels": vec![32; 70] }),
            "block_out_channels",
        ),
    ] {
        let config: UNetConfig = parse_config(&text_of(&json), path).unwrap();
        let message = UNet2DConditionModel::load(&nothing(), &config)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(&format!("field `{field}`: expected ")),
            "{message}"
        );
    }
    let mut vae = Layout::sd1().vae;
    vae["layers_per_block"] = json!(u64::MAX);
    let config: AutoencoderKLConfig = parse_config(&text_of(&vae), path).unwrap();
    let message = AutoencoderKL::load(&nothing(), &config)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("field `layers_per_block`: expected 1 to 256"),
        "{message}"
    );
    for (size, field) in [
        (json!(0), "size"),
        (json!({ "height": 1_u64 << 31, "width": 1 }), "size"),
    ] {
        let config = json!({ "size": size });
        let folder = folder(&[("preprocessor_config.json", &text_of(&config))]);
        let message = ImagePreprocessor::open(folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(&format!("field `{field}`: expected edges of 1 to")),
            "{message}"
        );
    }
}

/// Found above: the tokenizer's library panicked on a file that is not JSON from its decoder on, such as a
/// truncated one.
#[test]
fn a_tokenizer_that_is_cut_in_its_decoder_is_refused() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let whole = root.join("tests/golden/klein/tokenizer/tokenizer.json");
    let whole = std::fs::read_to_string(whole).unwrap();
    let decoder = "\"decoder\": {";
    let (start, _) = whole.split_once(decoder).unwrap();
    let nan = format!("{start}\"decoder\": NaN }}");
    for damaged in [format!("{start}{decoder}"), nan] {
        let folder = folder(&[("tokenizer.json", damaged.as_bytes())]);
        for error in [
            Tokenizer::open(folder.path()).unwrap_err(),
            Tokenizer::open_qwen(folder.path()).unwrap_err(),
        ] {
            let message = error.to_string();
            assert!(message.contains("tokenizer.json"), "{message}");
            assert!(message.contains("not valid JSON"), "{message}");
        }
    }
}
