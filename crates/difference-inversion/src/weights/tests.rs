use std::fs;

use half::{bf16, f16};
use safetensors::tensor::{TensorView, serialize};

use crate::weights::*;

/// A file with `w` [2, 2] f32, `half` [3] f16, `brain` `[1]` bf16 and `ids` [2] i64.
fn sample() -> Vec<u8> {
    let w: Vec<u8> = [1f32, 2., 3., 4.]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let half: Vec<u8> = [0.5, -1., 2.]
        .iter()
        .flat_map(|&v| f16::from_f32(v).to_le_bytes())
        .collect();
    let brain: Vec<u8> = bf16::from_f32(8.).to_le_bytes().to_vec();
    let ids: Vec<u8> = [0i64, 1].iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors = [
        (
            "block.w",
            TensorView::new(Dtype::F32, vec![2, 2], &w).unwrap(),
        ),
        (
            "block.half",
            TensorView::new(Dtype::F16, vec![3], &half).unwrap(),
        ),
        (
            "brain",
            TensorView::new(Dtype::BF16, vec![1], &brain).unwrap(),
        ),
        ("ids", TensorView::new(Dtype::I64, vec![2], &ids).unwrap()),
    ];
    serialize(tensors, None).unwrap()
}

fn weights(bytes: Vec<u8>) -> Result<Weights> {
    Weights::from_bytes(bytes, "model.safetensors", &Device::flex(), FloatDType::F32)
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// As on a GPU that computes in the type of the weights.
#[test]
fn in_wide_range_only_matrices_stay_in_f16() {
    let half = Weights::from_bytes(sample(), "x", &Device::flex(), FloatDType::F16).unwrap();
    let half = half.with_store(|store| store.compute = FloatDType::F16);
    assert_eq!(half.tensor("block.w", [2, 2]).unwrap().dtype(), DType::F16);
    let before = half.bytes_in_memory();
    let wide = half.in_wide_range();
    assert_eq!(wide.matrix("block.w", [2, 2]).unwrap().dtype(), DType::F16);
    assert_eq!(wide.tensor("block.w", [2, 2]).unwrap().dtype(), DType::F32);
    let vectors = 2 * (3 + 1 + 2); // two more bytes for each number of the others
    assert_eq!(wide.bytes_in_memory(), before + vectors);
}

/// A file whose header is `json`, followed by `data`.
fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), data].concat()
}

#[test]
fn reads_every_float_type_as_the_one_asked_for() {
    let weights = weights(sample()).unwrap();
    let block = weights.scope("block");
    let values = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
    assert_eq!(
        values(block.tensor("w", [2, 2]).unwrap().flatten(0, 1)),
        [1., 2., 3., 4.]
    );
    assert_eq!(values(block.tensor("half", [3]).unwrap()), [0.5, -1., 2.]);
    assert_eq!(values(weights.tensor("brain", [1]).unwrap()), [8.]);
    let half = Weights::from_bytes(sample(), "x", &Device::flex(), FloatDType::F16).unwrap();
    assert_eq!(half.matrix("block.w", [2, 2]).unwrap().dtype(), DType::F16);
    // The CPU computes in f32.
    assert_eq!(half.tensor("block.w", [2, 2]).unwrap().dtype(), DType::F32);
}

#[test]
fn wrong_shape_missing_tensor_and_wrong_type_are_named() {
    let weights = weights(sample()).unwrap();
    assert_eq!(
        message(weights.scope("block").tensor("w", [4, 1])),
        "model.safetensors: tensor `block.w`: expected shape [4, 1], found shape [2, 2]"
    );
    assert_eq!(
        message(weights.scope("block").scope(0).tensor("w", [1])),
        "model.safetensors: tensor `block.0.w`: expected shape [1], found no such tensor"
    );
    let text = message(weights.tensor("ids", [2]));
    assert!(
        text.ends_with("found elements of type I64, not f16, bf16, f32 or f64"),
        "{text}"
    );
}

#[test]
fn unused_tensors_are_named_unless_ignored() {
    let weights = weights(sample()).unwrap();
    weights.tensor("block.w", [2, 2]).unwrap();
    weights.scope("block").tensor("half", [3]).unwrap();
    assert!(weights.scope("block").check_all_used(&[]).is_ok());
    let text = message(weights.check_all_used(&["ids"]));
    assert!(text.ends_with("describes: brain"), "{text}");
    assert!(weights.check_all_used(&["ids", "brain"]).is_ok());
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert!(
            weights(bytes[..len].to_vec()).is_err(),
            "{len} of {} bytes",
            bytes.len()
        );
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(message(weights(longer)).contains("followed by other data"));
}

#[test]
fn absurd_headers_are_errors() {
    for claim in [u64::MAX, 1 << 63, i64::MAX as u64, 1 << 40, 3] {
        let huge = [claim.to_le_bytes().as_slice(), b"{}"].concat();
        let expected = format!("claims {claim} bytes");
        assert!(message(weights(huge)).contains(&expected));
    }
    let cases = [
        "not json",
        "[]",
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#,
        r#"{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [9223372036854775807, 8], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 399999999996]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, NaN]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [1]}}"#,
        r#"{"a": null}"#,
    ];
    for json in cases {
        assert!(weights(with_header(json, &[0; 4])).is_err(), "{json}");
    }
}

#[test]
fn folders_follow_the_conventions_of_diffusers_and_transformers() {
    let open = |folder: &Path| Weights::open(folder, &Device::flex(), FloatDType::F32);
    for name in [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors",
        "model.fp16.safetensors",
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), sample()).unwrap();
        open(folder.path()).unwrap().tensor("brain", [1]).unwrap();
        open(&folder.path().join(name))
            .unwrap()
            .tensor("brain", [1])
            .unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(message(open(folder.path())).contains("no model weights: expected diffusion_pytorch"));
    fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
    let pickled = "pytorch_model.bin: a pickled file is not read";
    assert!(message(open(folder.path())).contains(pickled));
    let single = open(&folder.path().join("pytorch_model.bin"));
    assert!(message(single).contains("a pickled file is not read"));
    assert!(matches!(
        open(&folder.path().join("absent")),
        Err(Error::Io { .. })
    ));
}

/// A file with the one number `value` under `key`.
fn one(key: &str, value: f32) -> Vec<u8> {
    let json = format!(r#"{{"{key}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}"#);
    with_header(&json, &value.to_le_bytes())
}

#[test]
fn shards_are_read_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
    let index_of = |json: &str| fs::write(&index, json).unwrap();
    let open = || Weights::open(folder.path(), &Device::flex(), FloatDType::F32);
    index_of(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#);
    write("1.safetensors", one("a", 1.));
    assert!(message(open()).contains("names a shard `2.safetensors` that is not in the folder"));
    write("2.safetensors", one("b", 2.));
    let weights = open().unwrap();
    assert_eq!(weights.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(weights.bytes(), 8);
    weights.tensor("b", [1]).unwrap();
    write("2.safetensors", one("a", 2.));
    assert!(message(open()).contains("`a` is also in another file"));
    write("2.safetensors", one("c", 2.));
    let absent = "says that tensor `b` is in `2.safetensors`, where it is not";
    assert!(message(open()).contains(absent));
    index_of(r#"{"weight_map": {"a": "1.safetensors", "c": "1.safetensors"}}"#);
    assert!(message(open()).contains("says that tensor `c` is in `1.safetensors`"));
    index_of(r#"{"weight_map": {"c": "2.safetensors", "a": "2.safetensors"}}"#);
    assert!(message(open()).contains("says that tensor `a` is in `2.safetensors`"));
    write("2.safetensors", sample());
    index_of(r#"{"weight_map": {"a": "1.safetensors", "brain": "2.safetensors"}}"#);
    assert!(message(open()).contains("does not name tensor `block.half`"));
    for (json, expected) in [
        (
            r#"{"weight_map": {"a": "../1.safetensors"}}"#,
            "names a shard",
        ),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "names a shard"),
        (r#"{"weight_map": {"a": ".."}}"#, "names a shard"),
        (r#"{"weight_map": {"a": ""}}"#, "names a shard"),
        (r#"{"weight_map": {"a": 1}}"#, "field `weight_map.a`"),
        ("{}", "missing field `weight_map`"),
        ("{", "not valid JSON"),
    ] {
        index_of(json);
        assert!(
            message(open()).contains(expected),
            "{json}: {}",
            message(open())
        );
    }
}

#[test]
fn the_variant_decides_which_of_several_files_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
    let value = |variant: Option<&str>| {
        let device = Device::flex();
        let weights = Weights::open_variant(folder.path(), variant, &device, FloatDType::F32)?;
        Ok(weights.tensor("a", [1])?.try_into_vec_as::<f32>().unwrap()[0])
    };
    write("model.fp16.safetensors", one("a", 16.));
    assert_eq!(value(None).unwrap(), 16.);
    write("model.safetensors", one("a", 32.));
    assert_eq!(value(None).unwrap(), 32.);
    assert_eq!(value(Some("fp16")).unwrap(), 16.);
    assert_eq!(value(Some("bf16")).unwrap(), 32.); // as diffusers takes it
    let index = r#"{"weight_map": {"a": "model-00001-of-00001.bf16.safetensors"}}"#;
    write("model.safetensors.index.bf16.json", index.into());
    write("model-00001-of-00001.bf16.safetensors", one("a", 8.));
    assert_eq!(value(Some("bf16")).unwrap(), 8.);
    assert_eq!(value(None).unwrap(), 32.);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let missing = message(value(Some("bf32")));
    let expected = "expected diffusion_pytorch_model.bf32.safetensors";
    assert!(missing.contains(expected), "{missing}");
}
