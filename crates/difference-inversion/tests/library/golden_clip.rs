//! CLIP's towers against transformers, on tiny networks with random weights made by
//! `training/reference/make_golden_clip.py`.

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::models::text::clip::ClipModel;
use difference_inversion::models::text::clip_text::{ClipTextModel, shared_bytes};
use difference_inversion::models::text::tower::Encoded;
use difference_inversion::models::vision::clip_image::ClipVisionModel;
use difference_inversion::util::arrays::{Array, Arrays, Values};
use difference_inversion::weights::Weights;

use super::common::{assert_matches, golden, open, read};

/// The prompts of the script that made the files.
fn prompts() -> [Vec<u32>; 2] {
    [
        (vec![58, 3, 17, 42, 5, 59], 59),
        (vec![58, 9, 9, 30, 21, 8, 11, 55, 2, 59], 0),
    ]
    .map(|(mut ids, pad)| {
        ids.resize(16, pad);
        ids
    })
}

fn text_model(name: &str) -> (ClipTextModel, Weights) {
    let model = ClipTextModel::open(&golden(name), &Device::flex(), FloatDType::F32).unwrap();
    (model, open(&golden(name).join("expected.safetensors")))
}

fn encode(model: &ClipTextModel) -> Encoded {
    let ids = prompts();
    let ends = ids.each_ref().map(|ids| model.eos_position(ids));
    model
        .forward_embeds(model.embed_tokens(&ids).unwrap(), &ends)
        .unwrap()
}

#[test]
fn text_tower_of_stable_diffusion_1() {
    for name in ["clip/text", "clip/text_prefixed"] {
        let (model, expected) = text_model(name);
        let output = encode(&model);
        assert_matches(
            &format!("{name} last"),
            output.last_hidden_state,
            read(&expected, "last"),
        );
        assert_matches(
            &format!("{name} pooled"),
            output.pooled,
            read(&expected, "pooled"),
        );
    }
}

#[test]
fn text_tower_with_projection_of_sdxl() {
    let (model, expected) = text_model("clip/text_projected");
    let mut output = encode(&model);
    let embeds = model.project(output.pooled).unwrap();
    assert_matches("text_projected embeds", embeds, read(&expected, "embeds"));
    assert_matches(
        "text_projected last",
        output.last_hidden_state,
        read(&expected, "last"),
    );
    let penultimate = output
        .hidden_states
        .swap_remove(model.config().num_hidden_layers - 1);
    assert_matches(
        "text_projected penultimate",
        penultimate,
        read(&expected, "penultimate"),
    );
}

#[test]
fn image_tower_with_projection() {
    let folder = golden("clip/vision_projected");
    let model = ClipVisionModel::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
    let expected = open(&folder.join("expected.safetensors"));
    let embeds = model
        .project(model.forward(read(&expected, "pixels")).unwrap())
        .unwrap();
    assert_matches("vision_projected embeds", embeds, read(&expected, "embeds"));
}

#[test]
fn both_towers_of_the_joint_space() {
    let folder = golden("clip/joint");
    let model = ClipModel::open(&folder, &Device::flex(), FloatDType::F32).unwrap();
    let expected = open(&folder.join("expected.safetensors"));
    let image = model.vision.forward(read(&expected, "pixels")).unwrap();
    assert_matches(
        "joint image",
        model.vision.project(image).unwrap(),
        read(&expected, "image"),
    );
    let text = model.text.project(encode(&model.text).pooled).unwrap();
    assert_matches("joint text", text, read(&expected, "text"));
}

#[test]
fn without_a_projection_there_is_no_joint_space() {
    let golden = golden("clip/joint");
    for name in ["text_projection.weight", "visual_projection.weight"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(
            golden.join("config.json"),
            folder.path().join("config.json"),
        )
        .unwrap();
        let mut arrays = Arrays::read(&golden.join("model.safetensors")).unwrap();
        assert!(arrays.arrays.remove(name).is_some());
        arrays
            .write(&folder.path().join("model.safetensors"))
            .unwrap();
        let opened = ClipModel::open(folder.path(), &Device::flex(), FloatDType::F32);
        let message = opened.unwrap_err().to_string();
        assert!(
            message.contains(name) && message.contains("the projection into the joint space"),
            "{message}"
        );
    }
}

#[test]
fn a_cached_prefix_changes_nothing() {
    let (model, _) = text_model("clip/text_projected");
    let whole = encode(&model);
    let embeds = model.embed_tokens(&prompts()).unwrap();
    for length in [1, 5, 15] {
        let prefix = model.prefix(embeds.clone().narrow(1, 0, length)).unwrap();
        assert_eq!(prefix.len(), length);
        let rest = embeds.clone().narrow(1, length, 16 - length);
        let after = model.forward_embeds_after(&prefix, rest, &[5, 9]).unwrap();
        for (found, expected) in after.hidden_states.into_iter().zip(&whole.hidden_states) {
            assert!(super::common::relative_error(found, expected.clone()) < 1e-5);
        }
        assert!(super::common::relative_error(after.pooled, whole.pooled.clone()) < 1e-5);
    }
}

/// A scalar that depends on every output of two learned tokens among a prompt's embeddings.
fn probe(model: &ClipTextModel, learned: Tensor<3>) -> Tensor<1> {
    let [ids, _] = prompts();
    let embeds = model.embed_tokens(&[ids]).unwrap();
    let prefix = model.prefix(embeds.clone().narrow(1, 0, 5)).unwrap();
    let rest = Tensor::cat(vec![learned, embeds.narrow(1, 5, 9)], 1);
    let output = model.forward_embeds_after(&prefix, rest, &[7]).unwrap();
    let weights = Tensor::from_data(
        burn::tensor::TensorData::new(
            (0..16 * 24).map(|i| (i as f32 * 0.7).sin()).collect(),
            [1, 16, 24],
        ),
        &Device::flex(),
    );
    (output.last_hidden_state * weights).sum() + model.project(output.pooled).unwrap().sum() * 3.0
}

#[test]
fn gradients_to_the_input_embeddings_equal_finite_differences() {
    let (model, _) = text_model("clip/text_projected");
    let values: Vec<f32> = (0..2 * 24).map(|i| (i as f32 * 1.3).cos() * 0.5).collect();
    let tensor = |values: Vec<f32>| {
        Tensor::<3>::from_data(
            burn::tensor::TensorData::new(values, [1, 2, 24]),
            &Device::flex(),
        )
    };
    let learned = tensor(values.clone()).autodiff().require_grad();
    let gradients = probe(&model, learned.clone()).backward();
    let gradient: Vec<f32> = learned
        .grad(&gradients)
        .unwrap()
        .into_data()
        .iter::<f32>()
        .collect();

    let step = 4e-3f32;
    let at = |i: usize, step: f32| {
        let mut values = values.clone();
        values[i] += step;
        f64::from(probe(&model, tensor(values)).into_scalar::<f32>())
    };
    let largest = gradient.iter().fold(0f32, |a, b| a.max(b.abs()));
    for (i, &derivative) in gradient.iter().enumerate() {
        // The five-point rule: its error falls with the fourth power of the step.
        let near = at(i, step) - at(i, -step);
        let far = at(i, 2.0 * step) - at(i, -2.0 * step);
        let numeric = (8.0 * near - far) / (12.0 * f64::from(step));
        let error = (f64::from(derivative) - numeric).abs() / f64::from(largest);
        assert!(
            error < 5e-3,
            "element {i}: autodiff {derivative}, finite difference {numeric}"
        );
    }
    for token in gradient.chunks(24) {
        assert!(
            token.iter().any(|g| g.abs() > 1e-3 * largest),
            "a token without gradient"
        );
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let (model, _) = text_model("clip/text");
    let message = |result: difference_inversion::Result<Encoded>| result.unwrap_err().to_string();
    let foreign = model.embed_tokens(&[vec![60]]).unwrap_err().to_string();
    assert!(foreign.contains("token 60"), "{foreign}");
    let uneven = model.embed_tokens(&[vec![1], vec![1, 2]]).unwrap_err();
    assert!(
        uneven.to_string().contains("one and the same length"),
        "{uneven}"
    );
    let embeds = |n: usize, d: usize| Tensor::<3>::zeros([1, n, d], &Device::flex());
    assert!(message(model.forward_embeds(embeds(17, 24), &[0])).contains("[1, 17, 24]"));
    assert!(message(model.forward_embeds(embeds(4, 23), &[0])).contains("[1, 4, 23]"));
    assert!(message(model.forward_embeds(embeds(4, 24), &[4])).contains("below 4"));
    assert!(
        model
            .project(Tensor::zeros([1, 24], &Device::flex()))
            .is_err()
    );
}

#[test]
fn two_copies_of_a_tower_share_their_weights_and_compute_the_same() {
    let folder = golden("clip/text_projected");
    let (first, expected) = text_model("clip/text_projected");
    let (mut copy, _) = text_model("clip/text_projected");
    let shared = copy.share(&first);
    // The projection into the joint space is not shared.
    let projection = 4 * first.config().hidden_size * first.projection_dim().unwrap();
    let weights = open(&folder.join("model.safetensors"));
    assert_eq!(shared + projection as u64, weights.bytes_in_memory());
    assert_eq!(shared_bytes(&weights, &weights).unwrap(), shared);
    let pictures = open(&golden("clip/vision_projected/model.safetensors"));
    assert_eq!(shared_bytes(&pictures, &weights).unwrap(), 0);
    let output = encode(&copy);
    assert_matches(
        "shared last",
        output.last_hidden_state,
        read(&expected, "last"),
    );

    // A tensor that differs in one number is not shared, and stays unchanged.
    let altered = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder.join("config.json"),
        altered.path().join("config.json"),
    )
    .unwrap();
    let name = "text_model.encoder.layers.1.mlp.fc1.weight";
    let arrays = Arrays::read(&folder.join("model.safetensors")).unwrap();
    let array = arrays.array(name).unwrap();
    let Values::F32(mut values) = array.values().clone() else {
        panic!("{name} holds no floating-point numbers");
    };
    values[7] += 1.0;
    let (size, array) = (values.len(), Array::floats(array.shape(), values));
    let arrays = arrays.with(name, array);
    arrays
        .write(&altered.path().join("model.safetensors"))
        .unwrap();
    let open = || ClipTextModel::open(altered.path(), &Device::flex(), FloatDType::F32).unwrap();
    let (alone, mut sharing) = (encode(&open()).pooled, open());
    assert_eq!(sharing.share(&first), shared - 4 * size as u64);
    let difference = super::common::relative_error(encode(&sharing).pooled, alone.clone());
    assert_eq!(difference, 0.0);
    assert!(super::common::relative_error(encode(&first).pooled, alone) > 1e-3);
}
