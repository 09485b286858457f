//! Transformers in files of their own, in the original layout and in few bits, against diffusers' conversion, torch and
//! the package `gguf`; golden files by `training/reference/make_golden_quantised.py`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::util::arrays::{Array, Arrays, Values};
use difference_inversion::util::tensors::host;
use difference_inversion::weights::{Weights, read_config};
use dinv_kernels::conv::Matrix;
use serde::Deserialize;

use super::common::open;
use crate::tiny::golden;

/// The stored tensor that a tensor of diffusers is made from, and the parts of its rows: start, end, of.
#[derive(Debug, Deserialize)]
struct Source {
    from: String,
    rows: Vec<[usize; 3]>,
}

type Table = BTreeMap<String, Source>;

const FAMILIES: [&str; 5] = ["sd3", "flux", "chroma", "klein", "z_image"];

/// What diffusers' conversion makes of each family's file.
fn tables() -> BTreeMap<String, Table> {
    read_config(&golden("original/transformers.json")).unwrap()
}

/// A tensor of any shape.
fn values(weights: &Weights, name: &str) -> (Vec<usize>, Vec<f32>) {
    let shape = weights.shape(name).unwrap();
    let floats = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
    let found = match *shape.as_slice() {
        [a] => floats(weights.tensor(name, [a]).unwrap()),
        [a, b] => floats(weights.tensor::<2>(name, [a, b]).unwrap().flatten(0, 1)),
        [a, b, c] => floats(weights.tensor::<3>(name, [a, b, c]).unwrap().flatten(0, 2)),
        [a, b, c, d] => floats(
            weights
                .tensor::<4>(name, [a, b, c, d])
                .unwrap()
                .flatten(0, 3),
        ),
        _ => panic!("{name}: {shape:?}"),
    };
    (shape, found)
}

/// The transformer of a golden folder with the names of its original code, which stand behind `prefix`.
fn original(family: &str, prefix: &str) -> Arrays {
    let weights = open(&golden(family).join("transformer"));
    let mut stored: BTreeMap<&str, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    let tables = tables();
    for (name, source) in &tables[family] {
        let (shape, found) = values(&weights, name);
        let parts: usize = source.rows.iter().map(|[start, end, _]| end - start).sum();
        let of = source.rows[0][2];
        let unit = found.len() / parts;
        let (whole, numbers) = stored.entry(&source.from).or_insert_with(|| {
            let mut whole = shape.clone();
            whole[0] = shape[0] / parts * of;
            (whole, vec![f32::NAN; unit * of])
        });
        assert_eq!(whole[1..], shape[1..], "{name}");
        let mut rest = found.as_slice();
        for [start, end, _] in &source.rows {
            let (part, others) = rest.split_at(unit * (end - start));
            numbers[unit * start..unit * end].copy_from_slice(part);
            rest = others;
        }
    }
    let arrays = stored.into_iter().map(|(name, (shape, numbers))| {
        assert!(numbers.iter().all(|number| number.is_finite()), "{name}");
        (format!("{prefix}{name}"), Array::floats(shape, numbers))
    });
    Arrays {
        arrays: arrays.collect(),
        ..Arrays::default()
    }
}

/// The model of a golden folder with the transformer in `file`.
fn with_transformer(family: &str, file: &Path) -> difference_inversion::Result<Weights> {
    let options = FileOptions {
        unet: Some(file.to_owned()),
        ..FileOptions::default()
    };
    let files = ModelFiles::open(&golden(family), &options)?;
    files.weights("transformer", &Device::flex(), FloatDType::F32)
}

fn written(folder: &Path, arrays: &Arrays) -> PathBuf {
    let path = folder.join("transformer.safetensors");
    arrays.write(&path).unwrap();
    path
}

#[test]
fn files_in_the_original_layout_have_the_tensors_that_diffusers_makes_of_them() {
    let folder = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        let expected = open(&golden(family).join("transformer"));
        for prefix in ["", "model.diffusion_model.", "diffusion_model."] {
            let mut arrays = original(family, prefix);
            if prefix == "model.diffusion_model." {
                // Another network of the same file, and what is left over from training.
                let one = || Array::floats([1], vec![1.0]);
                arrays = arrays.with("vae.decoder.conv_in.bias", one());
            }
            if family == "z_image" {
                let one = Array::floats([32], vec![1.0; 32]);
                arrays = arrays.with(format!("{prefix}norm_final.weight"), one);
            }
            let file = written(folder.path(), &arrays);
            let found = with_transformer(family, &file).unwrap();
            assert!(found.keys().eq(expected.keys()), "{family}");
            for name in expected.keys() {
                assert_eq!(
                    values(&found, name),
                    values(&expected, name),
                    "{family}: {name}"
                );
            }
        }
    }
    // A file with diffusers' own names.
    let file = golden("flux/transformer/diffusion_pytorch_model.safetensors");
    let found = with_transformer("flux", &file).unwrap();
    assert!(found.keys().eq(open(&golden("flux/transformer")).keys()));
}

#[test]
fn a_file_of_another_family_and_unknown_tensors_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let message = |family, arrays: &Arrays| {
        let file = written(folder.path(), arrays);
        with_transformer(family, &file).unwrap_err().to_string()
    };
    let klein = message("flux", &original("klein", ""));
    let expected =
        "the transformer of a Flux2KleinPipeline, where that of a FluxPipeline is expected";
    assert!(klein.contains(expected), "{klein}");
    let one = || Array::floats([1], vec![1.0]);
    let unknown = message("flux", &original("flux", "").with("img_in.other", one()));
    let expected = "tensors that are not of the transformer of a FluxPipeline (1): img_in.other";
    assert!(unknown.contains(expected), "{unknown}");
    let mut uneven = original("z_image", "");
    let name = "layers.0.attention.qkv.weight";
    uneven
        .arrays
        .insert(name.to_owned(), Array::floats([95, 32], vec![0.0; 95 * 32]));
    let uneven = message("z_image", &uneven);
    assert!(uneven.contains("its rows cannot be split in 3"), "{uneven}");
}

// Text encoders.

/// A text encoder of a golden folder in a file, with the names of llama.cpp or its own.
fn encoder_file(folder: &Path, place: &str, of_llama: bool) -> PathBuf {
    let names: BTreeMap<String, BTreeMap<String, String>> =
        read_config(&golden("original/text_encoders.json")).unwrap();
    let weights = open(&golden(place));
    let arrays = weights.keys().map(|name| {
        let (shape, numbers) = values(&weights, name);
        let other = if of_llama { &names[place][name] } else { name };
        (other.to_owned(), Array::floats(shape, numbers))
    });
    let path = folder.join("encoder.safetensors");
    let arrays = Arrays {
        arrays: arrays.collect(),
        ..Arrays::default()
    };
    arrays.write(&path).unwrap();
    path
}

fn with_encoder(family: &str, file: &Path) -> difference_inversion::Result<ModelFiles> {
    let options = FileOptions {
        text_encoders: vec![file.to_owned()],
        ..FileOptions::default()
    };
    ModelFiles::open(&golden(family), &options)
}

#[test]
fn text_encoders_are_recognised_by_their_tensors_with_either_names() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |files: &ModelFiles, part: &str| {
        files
            .weights(part, &Device::flex(), FloatDType::F32)
            .unwrap()
    };
    for (family, part, of_llama) in [
        ("sd3", "text_encoder_3", true),
        ("sd3", "text_encoder_3", false),
        ("klein", "text_encoder", true),
        ("klein", "text_encoder", false),
        // One of two CLIPs, by its width; and one whose tensors have no prefix.
        ("sd3", "text_encoder_2", false),
        ("flux", "text_encoder", false),
    ] {
        let file = encoder_file(folder.path(), &format!("{family}/{part}"), of_llama);
        let files = with_encoder(family, &file).unwrap();
        let (found, expected) = (weights(&files, part), open(&golden(family).join(part)));
        assert_eq!(found.path(), file);
        assert!(found.keys().eq(expected.keys()), "{family} {part}");
        for name in expected.keys() {
            assert_eq!(values(&found, name), values(&expected, name), "{name}");
        }
        if family == "sd3" {
            assert_ne!(weights(&files, "text_encoder").path(), file);
        }
        let device = Device::flex();
        difference_inversion::diffusion::pipeline::Pipeline::open(&files, &device, FloatDType::F32)
            .unwrap();
    }
}

#[test]
fn a_text_encoder_that_does_not_fit_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let message = |family: &str, file: &Path| {
        let opened = with_encoder(family, file).and_then(|files| {
            let device = Device::flex();
            difference_inversion::diffusion::pipeline::Pipeline::open(
                &files,
                &device,
                FloatDType::F32,
            )
        });
        opened.unwrap_err().to_string()
    };
    let qwen = encoder_file(folder.path(), "klein/text_encoder", true);
    let found = message("sd3", &qwen);
    assert!(found.contains("setting `text_encoder`"), "{found}");
    assert!(
        found.contains("encoder.safetensors, Qwen3 of width 16"),
        "{found}"
    );
    let twice = FileOptions {
        text_encoders: vec![qwen.clone(), qwen.clone()],
        ..FileOptions::default()
    };
    let files = ModelFiles::open(&golden("klein"), &twice).unwrap();
    let opened = difference_inversion::diffusion::pipeline::Pipeline::open(
        &files,
        &Device::flex(),
        FloatDType::F32,
    );
    assert!(
        opened
            .unwrap_err()
            .to_string()
            .contains("setting `text_encoder`")
    );
    let other = golden("klein/vae/diffusion_pytorch_model.safetensors");
    let found = message("klein", &other);
    assert!(
        found.contains("not a text encoder: CLIP, T5 and Qwen3"),
        "{found}"
    );
}

// Numbers of few bits.

fn quantised(name: &str) -> PathBuf {
    golden("quantised").join(name)
}

/// Every tensor of a file is to the bit what the reference has.
fn check_numbers(file: &str, names: &[&str]) {
    let found = open(&quantised(file));
    let mut expected_names = names.to_vec();
    expected_names.sort_unstable();
    assert!(found.keys().eq(expected_names.iter().copied()), "{file}");
    let expected = Arrays::read(&quantised("expected.safetensors")).unwrap();
    for name in names {
        let array = expected.array(name).unwrap();
        let Values::F32(numbers) = array.values() else {
            panic!("{name}");
        };
        let (shape, found) = values(&found, name);
        assert_eq!(shape, array.shape(), "{name}");
        let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(numbers), "{name}");
        let is_float = ["F32", "F16", "BF16", "b.weight"].contains(name);
        if let &[rows, columns] = shape.as_slice() {
            // As a linear layer holds it.
            let weights = open(&quantised(file));
            let factor = weights.linear(name, [rows, columns]).unwrap();
            assert_eq!(matches!(factor, Matrix::Packed(_)), !is_float, "{name}");
            assert!(
                is_float || factor.size() <= rows * columns * 5 / 4,
                "{name}"
            );
            let numbers_held = host(factor.dense(&Device::flex()));
            assert_eq!(bits(&numbers_held), bits(numbers), "{name}");
        }
    }
}

/// Matrices of few bits are as small in memory as in their file.
#[test]
fn what_a_file_packs_stays_packed() {
    let whole = open(&quantised("blocks.gguf"));
    for weights in [whole.clone(), whole.in_8_bits()] {
        check_sizes(&weights);
    }
}

/// Floats are packed in 8 bits if that is wanted; what the file packs is not packed again.
fn check_sizes(weights: &Weights) {
    let held: usize = (BLOCKS.iter())
        .filter_map(|name| {
            let shape = weights.shape(name)?;
            let &[rows, columns] = shape.as_slice() else {
                return None;
            };
            Some(weights.linear(name, [rows, columns]).unwrap().size())
        })
        .sum();
    let others = (BLOCKS.iter()).filter_map(|name| {
        let shape = weights.shape(name)?;
        (shape.len() != 2).then(|| 4 * shape.iter().product::<usize>())
    });
    let expected = held + others.sum::<usize>();
    assert_eq!(weights.bytes_in_memory(), expected as u64);
}

const BLOCKS: [&str; 14] = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32", "F16",
    "BF16", "kernel",
];

#[test]
fn blocks_of_gguf_are_what_its_package_makes_of_them() {
    check_numbers("blocks.gguf", &BLOCKS);
}

#[test]
fn floats_of_8_bits_are_what_torch_makes_of_them_with_either_kind_of_scale() {
    check_numbers("fp8_plain.safetensors", &["plain.weight", "wide.weight"]);
    check_numbers("fp8_older.safetensors", &["a.weight", "b.weight"]);
    check_numbers("fp8_newer.safetensors", &["c.weight"]);
}

#[test]
fn the_mark_of_scaled_floats_may_have_the_prefix_of_a_whole_model() {
    let bytes = fs::read(quantised("fp8_older.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, tensors) = bytes[8..].split_at(length);
    let mut header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(header).unwrap();
    let mark = header.remove("scaled_fp8").unwrap();
    header.insert("model.diffusion_model.scaled_fp8".to_owned(), mark);
    let header = serde_json::to_vec(&header).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), &header[..], tensors].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("whole.safetensors");
    fs::write(&path, bytes).unwrap();
    let weights = Weights::open(&path, &Device::flex(), FloatDType::F32).unwrap();
    let names: Vec<&str> = weights.keys().collect();
    assert_eq!(names, ["a.weight", "b.weight"]);
}

#[test]
fn another_quantisation_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |from: &str, to: &str| {
        let bytes = fs::read(quantised("fp8_newer.safetensors")).unwrap();
        let at = bytes
            .windows(from.len())
            .rposition(|part| part == from.as_bytes());
        let mut bytes = bytes;
        bytes[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
        let path = folder.path().join("other.safetensors");
        fs::write(&path, bytes).unwrap();
        let opened = Weights::open(&path, &Device::flex(), FloatDType::F32);
        opened.unwrap_err().to_string()
    };
    let message = refused("float8_e4m3fn", "int8_convrot_");
    assert!(
        message.contains("quantised as `int8_convrot_`, which is not read"),
        "{message}"
    );
    let message = refused("\"format\"", "\"former\"");
    assert!(
        message.contains("quantised as `c.comfy_quant`"),
        "{message}"
    );
}

/// A cut file is an error wherever it is cut, and so is one with any byte of its header changed, if it is read at all
/// the numbers are as many as before.
#[test]
fn a_gguf_file_that_is_cut_or_changed_is_refused_or_read_and_never_panics() {
    let whole = fs::read(quantised("blocks.gguf")).unwrap();
    let open = |bytes: &[u8]| {
        Weights::from_bytes(bytes.to_vec(), "it.gguf", &Device::flex(), FloatDType::F32)
    };
    assert!(open(&whole).is_ok());
    let header = 1200;
    for length in (0..header).chain((header..whole.len()).step_by(97)) {
        let message = open(&whole[..length]).unwrap_err().to_string();
        let is_told = message.contains("truncated") || message.contains("not a safetensors file");
        assert!(is_told, "{length}: {message}");
    }
    for place in 4..header {
        for change in [0xff, 0x80, 0x01] {
            let mut bytes = whole.clone();
            bytes[place] ^= change;
            if let Ok(weights) = open(&bytes) {
                for name in weights.keys() {
                    let shape = weights.shape(name).unwrap();
                    if let [rows, columns] = *shape.as_slice() {
                        let _ = weights.tensor::<2>(name, [rows, columns]);
                    }
                }
            }
        }
    }
}

#[test]
fn a_type_of_gguf_that_is_not_read_is_named() {
    let whole = fs::read(quantised("blocks.gguf")).unwrap();
    let at = whole.windows(4).position(|part| part == b"Q4_0").unwrap();
    let kind = at + 4 + 4 + 16; // name, dimensions
    for (number, expected) in [
        (20u8, "type IQ4_NL, which is not read"),
        (99, "type number 99"),
    ] {
        let mut bytes = whole.clone();
        bytes[kind] = number;
        let opened = Weights::from_bytes(bytes, "it.gguf", &Device::flex(), FloatDType::F32);
        let message = opened.unwrap_err().to_string();
        assert!(
            message.contains(expected) && message.contains("`Q4_0`"),
            "{message}"
        );
        assert!(message.contains("take a file in Q8_0"), "{message}");
    }
}
