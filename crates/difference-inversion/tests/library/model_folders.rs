//! Model folders as found in practice: details of their files that are easily overlooked.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::util::arrays::{Array, Arrays, Values};
use difference_inversion::weights::Weights;
use serde_json::{Value, json};

use crate::tiny::{copy, edit, golden, opened};

/// Sets fields of a JSON file.
fn set(path: &Path, fields: Value) {
    let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let (Value::Object(config), Value::Object(fields)) = (&mut config, fields) else {
        panic!("not an object: {}", path.display());
    };
    config.extend(fields);
    fs::write(path, serde_json::to_string(config).unwrap()).unwrap();
}

fn message(folder: &Path) -> String {
    opened(folder)
        .err()
        .map_or_else(String::new, |error| error.to_string())
}

#[test]
fn the_index_names_the_scheduler() {
    let model = copy("learning");
    let class = || {
        let pipeline = opened(model.path()).unwrap();
        pipeline.noising().class_name().unwrap().to_owned()
    };
    assert_eq!(class(), "DDIMScheduler");
    let index = model.path().join("model_index.json");
    set(
        &index,
        json!({ "scheduler": ["diffusers", "EulerDiscreteScheduler"] }),
    );
    assert_eq!(class(), "EulerDiscreteScheduler");
    set(
        &index,
        json!({ "scheduler": ["diffusers", "EDMEulerScheduler"] }),
    );
    let found = message(model.path());
    assert!(
        found.contains("EDMEulerScheduler is another kind of noise"),
        "{found}"
    );
}

#[test]
fn noise_of_another_kind_is_refused_when_the_model_is_opened() {
    for fields in [
        json!({ "timestep_type": "continuous", "_class_name": "EulerDiscreteScheduler" }),
        json!({ "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0 }),
    ] {
        let model = copy("learning");
        set(
            &model.path().join("scheduler/scheduler_config.json"),
            fields,
        );
        let found = message(model.path());
        assert!(found.contains("no solver can use this model"), "{found}");
        let files = ModelFiles::open(model.path(), &FileOptions::default()).unwrap();
        assert!(Pipeline::check_configs(&files).is_err());
    }
}

#[test]
fn outdated_u_nets_draw_what_their_pipeline_corrects_them_to() {
    // diffusers 0.42.1: 64 latents where a U-Net of less than 0.9 says less, but not in SDXL.
    for (folder, version, sides) in [
        ("learning", "0.6.0", 64),
        ("learning", "0.8.1", 64),
        ("learning", "0.9.0.dev0", 8),
        ("learning", "0.10.2", 8),
        ("sdxl", "0.6.0", 8),
    ] {
        let model = copy(folder);
        let config = model.path().join("unet/config.json");
        set(
            &config,
            json!({ "_diffusers_version": version, "sample_size": 8 }),
        );
        let [_, _, h, w] = opened(model.path()).unwrap().latent_shape();
        assert_eq!([h, w], [sides; 2], "{folder} {version}");
        set(&config, json!({ "sample_size": [8, 8] }));
        let [_, _, h, w] = opened(model.path()).unwrap().latent_shape();
        assert_eq!([h, w], [8; 2], "{folder} {version}");
    }
}

#[test]
fn only_what_diffusers_looks_at_counts() {
    let model = copy("learning");
    let latents = Tensor::<4>::ones([1, 4, 8, 8], &Device::flex());
    let decoded = |folder: &Path| {
        let pixels = opened(folder).unwrap().decode_pixels(latents.clone());
        pixels.try_into_vec_as::<f32>().unwrap()
    };
    let plain = decoded(model.path());
    set(
        &model.path().join("vae/config.json"),
        json!({ "shift_factor": 0.5 }),
    );
    assert_eq!(decoded(model.path()), plain);

    let masked = json!({ "use_attention_mask": true });
    set(
        &model.path().join("text_encoder/config.json"),
        masked.clone(),
    );
    let found = message(model.path());
    assert!(
        found.contains("field `use_attention_mask`: true is not supported"),
        "{found}"
    );
    let model = copy("sdxl");
    set(&model.path().join("text_encoder/config.json"), masked);
    assert_eq!(message(model.path()), "");
}

#[test]
fn clean_latents_are_clamped_where_the_pipeline_does_not_correct_it() {
    // diffusers 0.42.1: StableDiffusionPipeline sets `clip_sample` to false, the others do not.
    for (folder, clips) in [("pipeline", false), ("sdxl", true), ("inpaint", true)] {
        let model = copy(folder);
        let ddim = json!({ "_class_name": "DDIMScheduler", "clip_sample": true });
        set(&model.path().join("scheduler/scheduler_config.json"), ddim);
        let pipeline = opened(model.path()).unwrap();
        let noising = format!("{:?}", pipeline.noising());
        assert!(
            noising.contains(&format!("clip_sample: {clips}")),
            "{folder}"
        );
    }
}

/// The first number of a tensor of the weights in a folder.
fn first(folder: &Path, name: &str) -> f32 {
    let weights = Weights::open(folder, &Device::flex(), FloatDType::F32).unwrap();
    let shape: [usize; 1] = weights.shape(name).unwrap().try_into().unwrap();
    let tensor = weights.tensor::<1>(name, shape).unwrap();
    tensor.try_into_vec_as::<f32>().unwrap()[0]
}

#[test]
fn of_one_file_beside_shards_that_is_read_which_diffusers_and_transformers_read() {
    for (config, stem, expected) in [
        (
            r#"{"_class_name": "UNet2DConditionModel"}"#,
            "diffusion_pytorch_model",
            2.0,
        ),
        (r#"{"architectures": ["CLIPTextModel"]}"#, "model", 1.0),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value| {
            let array = Array::floats([1], vec![value]);
            let path = folder.path().join(name);
            Arrays::default().with("w", array).write(&path).unwrap();
        };
        write(&format!("{stem}.safetensors"), 1.0);
        let shard = format!("{stem}-00001-of-00001.safetensors");
        write(&shard, 2.0);
        let index = json!({ "metadata": {}, "weight_map": { "w": shard } }).to_string();
        fs::write(
            folder.path().join(format!("{stem}.safetensors.index.json")),
            index,
        )
        .unwrap();
        fs::write(folder.path().join("config.json"), config).unwrap();
        assert_eq!(first(folder.path(), "w"), expected, "{stem}");
    }
    // In a transformers folder, those of transformers, whatever else is there.
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in [("diffusion_pytorch_model", 1.0), ("model", 2.0)] {
        let path = folder.path().join(format!("{name}.safetensors"));
        let array = Array::floats([1], vec![value]);
        Arrays::default().with("w", array).write(&path).unwrap();
    }
    let config = folder.path().join("config.json");
    fs::write(&config, r#"{"architectures": ["CLIPTextModel"]}"#).unwrap();
    assert_eq!(first(folder.path(), "w"), 2.0);
    fs::write(&config, r#"{"_class_name": "AutoencoderKL"}"#).unwrap();
    assert_eq!(first(folder.path(), "w"), 1.0);
}

/// Adds a row to the table of a text encoder, for a word added to its tokenizer.
fn add_word(model: &Path, encoder: &str, tokenizer: &str) {
    let path = model.join(encoder).join("model.safetensors");
    let mut arrays = Arrays::read(&path).unwrap();
    let table = "token_embedding.weight";
    let name = arrays
        .arrays
        .keys()
        .find(|name| name.ends_with(table))
        .unwrap()
        .clone();
    let array = &arrays.arrays[&name];
    let &[rows, width] = array.shape() else {
        panic!("{name} is no matrix");
    };
    let Values::F32(values) = array.values() else {
        panic!("{name} holds no numbers");
    };
    let values = values
        .iter()
        .copied()
        .chain((0..width).map(|i| 0.1 * i as f32));
    let array = Array::floats([rows + 1, width], values.collect());
    arrays.arrays.insert(name, array);
    arrays.write(&path).unwrap();
    set(
        &model.join(encoder).join("config.json"),
        json!({ "vocab_size": rows + 1 }),
    );
    let added = json!({ "<x>": rows }).to_string();
    fs::write(model.join(tokenizer).join("added_tokens.json"), added).unwrap();
}

#[test]
fn a_word_may_be_added_for_one_text_encoder_of_two() {
    let model = copy("sdxl");
    let folder = model.path();
    add_word(folder, "text_encoder", "tokenizer");
    let pipeline = opened(folder).unwrap();
    let prompt = pipeline.prompt("a <x> house").unwrap();
    assert!(prompt.ids(0).contains(&663));
    assert!(prompt.ids(1).len() > prompt.ids(0).len());
    let words = pipeline.read(&prompt, 0).unwrap();
    let [_, n, _] = pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap()
        .context
        .dims();
    assert_eq!(n, 24);

    // The joint space still belongs to the base model, and reads the word.
    let models = crate::tiny::models_in(folder);
    let joint = &models.joints().unwrap()[0];
    joint.text_features(&prompt).unwrap();

    // One word more than rows.
    edit(
        &folder.join("tokenizer/added_tokens.json"),
        "}",
        ", \"<y>\": 664}",
    );
    let found = message(folder);
    assert!(
        found.contains("the tokenizer has 665 tokens, the text encoder 664"),
        "{found}"
    );
}

#[test]
fn an_added_word_is_where_outdated_text_encoders_pool() {
    // transformers 5.24: with `eos_token_id` 2 at the largest id, which an added word has, and what
    // follows it is not pooled.
    let model = copy("sdxl");
    add_word(model.path(), "text_encoder_2", "tokenizer_2");
    let pooled = |text: &str| {
        let pipeline = opened(model.path()).unwrap();
        let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
        let conditions = pipeline.encode_prompts(&[FullPrompt::plain(&words)]);
        let pooled = conditions.unwrap().pooled.unwrap();
        pooled.try_into_vec_as::<f32>().unwrap()
    };
    // Products of other numbers of rows round differently.
    let differ = |one: &str, other: &str| {
        let pairs = pooled(one).into_iter().zip(pooled(other));
        pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max) > 1e-4
    };
    let texts = ["a <x> house", "a <x> boat at night"];
    assert!(differ(texts[0], texts[1]));
    let config = model.path().join("text_encoder_2/config.json");
    set(&config, json!({ "eos_token_id": 2 }));
    assert!(!differ(texts[0], texts[1]));
    assert!(differ("a house", "a boat at night"));
}

#[test]
fn a_text_encoder_may_have_layers_that_its_configuration_leaves_out() {
    let model = copy("learning");
    set(
        &model.path().join("text_encoder/config.json"),
        json!({ "num_hidden_layers": 1 }),
    );
    assert_eq!(message(model.path()), "");
}

#[test]
fn files_that_are_no_weights_say_what_they_are() {
    let model = copy("learning");
    let file = model
        .path()
        .join("unet/diffusion_pytorch_model.safetensors");
    for (contents, expected) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid sha256:44\nsize 3438167536\n"[..],
            "a Git LFS pointer to a file of 3438167536 bytes",
        ),
        (b"<!DOCTYPE html>\n<html><head>", "a web page"),
        (b"  <html lang=en>", "a web page"),
        (b"PK\x03\x04\0\0\0\0\0\0", "pickled, whatever its name"),
        (b"\x80\x02}q\0(X\0\0\0", "pickled, whatever its name"),
        (b"{\n  \"_class_name\": \"X\"}", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"GGUF\x03\0\0\0\0\0\0", "a GGUF file"),
        (
            b"../../../blobs/0123456789",
            "a broken link into the Hub's cache",
        ),
        (b"", "an empty file"),
        (b"junk", "only 4 bytes long"),
    ] {
        fs::write(&file, contents).unwrap();
        let found = message(model.path());
        assert!(found.contains(expected), "{found}");
        let single = ModelFiles::open(&file, &FileOptions::default()).unwrap_err();
        assert!(single.to_string().contains(expected), "{single}");
    }
}

#[test]
fn weights_may_be_wrapped_and_say_when_they_are_quantised() {
    let model = copy("learning");
    let file = model
        .path()
        .join("unet/diffusion_pytorch_model.safetensors");
    let arrays = Arrays::read(&file).unwrap();
    for wrapper in ["_orig_mod.", "module.", "module._orig_mod."] {
        let wrapped = arrays.arrays.iter();
        let wrapped = wrapped.fold(Arrays::default(), |all, (name, array)| {
            all.with(format!("{wrapper}{name}"), array.clone())
        });
        wrapped.write(&file).unwrap();
        assert_eq!(message(model.path()), "", "{wrapper}");
    }
    Arrays::default().write(&file).unwrap();
    let found = message(model.path());
    assert!(found.contains("no such tensor"), "{found}");
    let plain = Arrays::default().with("conv_in.bias", Array::floats([8], vec![0.0; 8]));
    plain.write(&file).unwrap();
    let one = fs::read(&file).unwrap();
    let header = String::from_utf8_lossy(&one[8..one.len() - 32]).into_owned();
    let four = header
        .replace("\"F32\"", "\"F4\"")
        .replace("[0,32]", "[0,4]");
    assert_ne!(four, header);
    let mut file_of_four = (four.len() as u64).to_le_bytes().to_vec();
    file_of_four.extend(four.as_bytes());
    file_of_four.extend([0; 4]);
    fs::write(&file, file_of_four).unwrap();
    let weights = Weights::open(&file, &Device::flex(), FloatDType::F32).unwrap();
    let found = weights.tensor::<1>("conv_in.bias", [8]).unwrap_err();
    assert!(
        found.to_string().contains("its numbers have 4 bits (F4"),
        "{found}"
    );
    assert_eq!(found.hint(), None);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_file() {
    let model = copy("learning");
    for name in [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ] {
        let path = model.path().join(name);
        if let Ok(text) = fs::read_to_string(&path) {
            fs::write(&path, format!("\u{feff}{}", text.replace('\n', "\r\n"))).unwrap();
        }
    }
    assert_eq!(message(model.path()), "");
}

#[test]
fn a_part_in_place_of_the_model_leads_to_the_model() {
    let model = copy("learning");
    let found = message(&model.path().join("unet"));
    assert!(found.contains("one part of the model in"), "{found}");
    fs::remove_file(model.path().join("model_index.json")).unwrap();
    let found = message(&model.path().join("unet"));
    assert!(found.contains("one network, not a whole model"), "{found}");
    let file = golden("learning/unet/diffusion_pytorch_model.safetensors");
    let found = ModelFiles::open(&file, &FileOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        found.contains("name the folder that its model_index.json is in"),
        "{found}"
    );
}
