use std::fs;

use half::{bf16, f16};
use safetensors::tensor::{TensorView, serialize};

use super::*;

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
    assert_eq!(half.tensor("block.w", [2, 2]).unwrap().dtype(), DType::F16);
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
        text.ends_with("found elements of type I64, not floating-point"),
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
    let huge = [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat();
    assert!(message(weights(huge)).contains("claims 18446744073709551615 bytes"));
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
    assert!(message(open(folder.path())).contains("pytorch_model.bin is not read"));
    assert!(matches!(
        open(&folder.path().join("absent")),
        Err(Error::Io { .. })
    ));
}

#[test]
fn shards_are_read_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let one = with_header(
        r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#,
        &[0; 4],
    );
    let two = with_header(
        r#"{"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#,
        &[0; 4],
    );
    fs::write(
        &index,
        r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
    )
    .unwrap();
    fs::write(folder.path().join("1.safetensors"), &one).unwrap();
    let open = || Weights::open(folder.path(), &Device::flex(), FloatDType::F32);
    assert!(message(open()).contains("names a shard `2.safetensors` that is not in the folder"));
    fs::write(folder.path().join("2.safetensors"), two).unwrap();
    let weights = open().unwrap();
    assert_eq!(weights.keys().collect::<Vec<_>>(), ["a", "b"]);
    weights.tensor("b", [1]).unwrap();
    fs::write(folder.path().join("2.safetensors"), one).unwrap();
    assert!(message(open()).contains("`a` is also in another file"));
    fs::write(&index, r#"{"weight_map": {"a": "../1.safetensors"}}"#).unwrap();
    assert!(message(open()).contains("names a shard"));
}
