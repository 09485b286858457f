use std::sync::Mutex;

use burn::tensor::{Device, TensorData};
use difference_inversion::diffusion::pipeline::Conditions;
use difference_inversion::models::denoiser::How;
use difference_inversion::util::tensors::host;

use super::*;
use crate::tiny;

fn control(scale: f64) -> GridControl {
    GridControl {
        cloned: 0..LAYERS,
        masked: 0..LAYERS,
        scale,
    }
}

#[test]
fn scores_between_a_prime_and_b_prime_are_those_between_a_and_b() {
    // 2 heads, a feature map of 4 × 6; score = 1000 head + 24 query + key.
    let (size, positions) = ([4, 6], 24usize);
    let score = |head: usize, query: usize, key: usize| (1000 * head + 24 * query + key) as f32;
    let all = (0..2).flat_map(|head| {
        (0..positions).flat_map(move |query| (0..positions).map(move |key| score(head, query, key)))
    });
    let all: Vec<f32> = all.collect();
    let scores = Tensor::<1>::from_floats(all.as_slice(), &Device::flex());
    let cloned = host(control(1.3).clone_scores(scores.reshape([1, 2, 24, 24]), size));
    // Row, column and cell by hand.
    let cell = |position: usize| {
        let (y, x) = (position.div_euclid(6), position % 6);
        (y >= 2, x >= 3, (y % 2) * 3 + x % 3)
    };
    let position = |down: bool, right: bool, place: usize| {
        let (y, x) = (place.div_euclid(3), place % 3);
        (y + if down { 2 } else { 0 }) * 6 + x + if right { 3 } else { 0 }
    };
    let (mut changed, mut index) = (0, 0);
    for head in 0..2 {
        for query in 0..positions {
            for key in 0..positions {
                let expected = match (cell(query), cell(key)) {
                    ((false, true, q), (true, true, k)) => {
                        1.3 * score(head, position(false, false, q), position(true, false, k))
                    }
                    ((true, true, q), (false, true, k)) => {
                        1.3 * score(head, position(true, false, q), position(false, false, k))
                    }
                    _ => score(head, query, key),
                };
                changed += usize::from(expected != score(head, query, key));
                let found = cloned[index];
                assert!(
                    (found - expected).abs() < 1e-3,
                    "{head} {query} {key}: {found} {expected}"
                );
                index += 1;
            }
        }
    }
    assert_eq!(changed, 2 * 2 * 6 * 6);
}

#[test]
fn four_positions_worked_by_hand() {
    // A, A′, B and B′ of one position each; scores ln 2 from A to B and back, else 0.
    let ln_2 = 2f32.ln();
    let mut scores = [0.0; 16];
    (scores[2], scores[8]) = (ln_2, ln_2);
    let scores = Tensor::<1>::from_floats(scores, &Device::flex()).reshape([1, 1, 4, 4]);
    let place = |kind| AttentionPlace {
        kind,
        layer: 0,
        size: [2, 2],
    };
    let weights = |scale, kind| host(control(scale).weights(&place(kind), scores.clone()));
    let found = weights(2.0, AttentionKind::ToItself);
    let expected = [
        [1. / 5., 1. / 5., 2. / 5., 1. / 5.],
        [1. / 7., 1. / 7., 1. / 7., 4. / 7.], // e^(2 ln 2)
        [2. / 5., 1. / 5., 1. / 5., 1. / 5.],
        [1. / 7., 4. / 7., 1. / 7., 1. / 7.],
    ];
    for (found, expected) in found.iter().zip(expected.as_flattened()) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    let found = weights(2.0, AttentionKind::ToPrompt);
    assert_eq!(found[..12], [0.0; 12]);
    assert!(
        found[12..]
            .iter()
            .all(|weight| (weight - 0.25).abs() < 1e-6)
    );
}

#[test]
fn layers_are_scaled_to_the_depth() {
    let layers = |blocks| {
        let control = GridControl::new(&AnalogistConfig::default(), blocks);
        assert_eq!(control.cloned, control.masked);
        control.cloned
    };
    assert_eq!(layers(16), 3..11);
    assert_eq!(layers(7), 1..5);
    assert_eq!(layers(4), 1..3);
}

/// Records whether it was called, and attends as usual.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<AttentionPlace>>);

impl AttentionControl for Notes {
    fn changes(&self, place: &AttentionPlace) -> bool {
        self.0.lock().unwrap().push(*place);
        true
    }

    fn weights(&self, _place: &AttentionPlace, scores: Tensor<4>) -> Tensor<4> {
        activation::softmax(scores, 3)
    }
}

/// A U-Net's input, and its output under a control.
fn predict(pipeline: &Pipeline, control: Option<&dyn AttentionControl>) -> Vec<f32> {
    let device = pipeline.device();
    let wave = |count: usize| {
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
        Tensor::<1>::from_floats(values.as_slice(), device)
    };
    let [_, c, h, w] = pipeline.latent_shape();
    let shown = wave(5 * h * w).reshape([1, 5, h, w]);
    let conditions = Conditions {
        image: Some(shown),
        ..pipeline.encode_negative_prompt("a red house").unwrap()
    };
    let latents = wave(c * h * w).reshape([1, c, h, w]);
    let how = How {
        control,
        ..How::default()
    };
    host(pipeline.predict_as(latents, &[500.0], &conditions, how))
}

#[test]
fn a_control_passes_every_attention_and_changes_only_what_it_wants() {
    let models = tiny::models(Some("inpaint"));
    let pipeline = models.pipeline();
    let blocks = pipeline.denoiser().attention_layers();
    assert_eq!(blocks, 4); // one down, one in the middle, two up
    let (plain, notes) = (predict(pipeline, None), Notes::default());
    let noted = predict(pipeline, Some(&notes));
    let farthest = |other: &[f32]| {
        let differences = plain.iter().zip(other).map(|(x, y)| (x - y).abs());
        differences.fold(0.0, f32::max)
    };
    assert!(farthest(&noted) < 1e-5, "{}", farthest(&noted));
    let places = notes.0.into_inner().unwrap();
    let (wide, small) = ([8, 8], [4, 4]);
    for (number, (place, size)) in places.iter().zip([wide, wide, small, small]).enumerate() {
        let kind = [AttentionKind::ToItself, AttentionKind::ToPrompt][number % 2];
        let layer = number.div_euclid(2);
        assert_eq!(*place, AttentionPlace { kind, layer, size });
    }
    assert_eq!(places.len(), 2 * blocks);
    let nowhere = GridControl {
        cloned: 0..0,
        masked: blocks..LAYERS,
        scale: 1.3,
    };
    assert_eq!(farthest(&predict(pipeline, Some(&nowhere))), 0.0);
    for layer in 0..blocks {
        let cloned = GridControl {
            cloned: layer..layer + 1,
            masked: 0..0,
            scale: 1.3,
        };
        let masked = GridControl {
            cloned: 0..0,
            masked: layer..layer + 1,
            scale: 1.3,
        };
        for control in [cloned, masked] {
            let changed = farthest(&predict(pipeline, Some(&control)));
            assert!(changed > 1e-4, "{control:?}: {changed}");
        }
    }
}

#[test]
fn the_prompt_is_what_is_new() {
    for (before, after, expected) in [
        ("a red house on grass", "A blue house, on grass.", "blue"),
        (
            "a house",
            "a house at night, in the snow, far away now",
            "at night, in the snow",
        ),
        ("a red house", "a red house", "a red house"),
        ("", "one two three four five six", "one two three four five"),
    ] {
        assert_eq!(new_words(before, after, 5), expected);
    }
}

#[test]
fn the_cell_of_b_prime_is_the_last_quarter() {
    let numbers = (0..32_u8).map(f32::from).collect();
    let data = TensorData::new::<f32, _>(numbers, [1, 2, 4, 4]);
    let cell = cell_of_b_prime(Tensor::from_data(data, &Device::flex()));
    assert_eq!(cell.dims(), [1, 2, 2, 2]);
    assert_eq!(host(cell), [10.0, 11.0, 14.0, 15.0, 26.0, 27.0, 30.0, 31.0]);
}

#[test]
fn the_grid_holds_a_and_a_prime_above_b_twice() {
    let plain = |value: u8| RgbImage::from_pixel(16, 16, Rgb([value; 3]));
    let analogy = Analogy {
        a: plain(10),
        a_prime: plain(20),
        b: plain(30),
        ..tiny::analogy()
    };
    let (grid, mask) = (grid(&analogy, [32, 32]), mask([32, 32]));
    for (x, y, value, masked) in [
        (0, 15, 10, 0),
        (16, 0, 20, 0),
        (15, 16, 30, 0),
        (16, 16, 30, 255),
    ] {
        assert_eq!(grid.get_pixel(x, y).0, [value; 3]);
        assert_eq!(mask.get_pixel(x, y).0, [masked; 3]);
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let message = |values| {
        let made = analogist(&tiny::eval_models(), &tiny::settings(&values));
        made.err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    assert!(
        message(serde_json::json!({"strength": 0})).contains("`strength`: expected more than 0")
    );
    assert!(
        message(serde_json::json!({"clone_layers": [5, 17]})).contains("`clone_layers`: expected")
    );
    assert!(
        message(serde_json::json!({"resolution": 24})).contains("`resolution`: expected multiples")
    );
    assert_eq!(message(serde_json::json!({"resolution": 64})), "");
}
