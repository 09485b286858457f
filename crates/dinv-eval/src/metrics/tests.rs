//! Every metric against numbers worked by hand.

use image::{Rgb, RgbImage};

use super::*;

#[test]
fn directions_are_angles_between_changes() {
    let right: [&[f32]; 2] = [&[1.0, 1.0], &[2.0, 1.0]];
    let up: [&[f32]; 2] = [&[0.0, 5.0], &[0.0, 6.0]];
    assert_eq!(direction(right, up), 0.0);
    assert_eq!(direction(right, [&[7.0, 2.0], &[9.0, 2.0]]), 1.0);
    assert_eq!(direction(right, [right[1], right[0]]), -1.0);
    let diagonal = direction(right, [&[0.0, 0.0], &[1.0, 1.0]]);
    assert!((diagonal - 0.5_f64.sqrt()).abs() < 1e-12);
    // B′ = B has no direction.
    assert_eq!(direction(right, [up[0], up[0]]), 0.0);
    assert_eq!([-1.0, 0.2, 1.0].map(rescaled), [0.0, 0.6, 1.0]);
}

#[test]
fn a_stage_of_lpips_compares_unit_vectors_at_every_position() {
    // (.6 − .8)² + (.8 − .6)² = .08 at the first position, 1 + 1 at the second.
    let (x, y) = ([3.0, 4.0, 1.0, 0.0], [4.0, 3.0, 0.0, 1.0]);
    assert!((stage_distance(&x, &y, 2, None) - 1.04).abs() < 1e-7);
    assert!((stage_distance(&x, &y, 2, Some(&[1.0, 0.0])) - 0.52).abs() < 1e-7);
    let brighter: Vec<f32> = x.iter().map(|value| 5.0 * value).collect();
    assert!(stage_distance(&x, &brighter, 2, None) < 1e-12);
}

fn picture(width: u32, height: u32, value: impl Fn(u32, u32) -> u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([u8::try_from(value(x, y) % 256).unwrap(); 3])
    })
}

#[test]
fn mse_is_of_pixels_from_0_to_1() {
    let (black, grey) = (picture(8, 8, |_, _| 0), picture(8, 8, |_, _| 51));
    assert!((mse(&black, &grey) - 0.04).abs() < 1e-12);
    let mut red = black.clone();
    red.pixels_mut().for_each(|pixel| pixel.0[0] = 255);
    assert!((mse(&black, &red) - 1.0 / 3.0).abs() < 1e-12);
}

#[test]
fn ssim_is_that_of_the_formula() {
    let grey = |value| picture(16, 12, move |_, _| value);
    assert!((ssim(&grey(90), &grey(90)).unwrap() - 1.0).abs() < 1e-12);
    // Without contrast it is (2 μx μy + C₁) / (μx² + μy² + C₁).
    let expected = (2.0 * 100.0 * 150.0 + 6.5025) / (10_000.0 + 22_500.0 + 6.5025);
    assert!((ssim(&grey(100), &grey(150)).unwrap() - expected).abs() < 1e-9);
    // 13 × 12 pixels; expected values from the formula applied window by window in Python.
    let x = picture(13, 12, |x, y| 17 * y + 5 * x);
    let y = picture(13, 12, |x, y| 5 * y + 17 * x);
    assert!((ssim(&x, &y).unwrap() - 0.556_911_483_316_642).abs() < 1e-9);
    assert!((mse(&x, &y) - 0.063_801_890_791_510).abs() < 1e-12);
    assert_eq!(
        ssim(&picture(10, 30, |x, _| x), &picture(10, 30, |x, _| x)),
        None
    );
}

fn attributes(values: &[(&str, &str)]) -> SceneAttributes {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    values.iter().map(owned).collect()
}

#[test]
fn right_is_an_edit_that_is_shown_and_nothing_else_changed() {
    let right = |edit: f64, kept: f64| {
        let mut scores = Scores::from([("edit".to_owned(), edit), ("kept".to_owned(), kept)]);
        derive(&mut scores);
        scores["right"]
    };
    assert_eq!(
        [right(1.0, 1.0), right(0.5, 1.0), right(1.0, 0.9)],
        [1.0, 0.0, 0.0]
    );
    let mut scores = Scores::from([("edit".to_owned(), 1.0)]);
    derive(&mut scores);
    assert_eq!(scores.get("right"), None);
}

#[test]
fn attributes_are_changed_or_kept() {
    let b = attributes(&[
        ("sky", "day"),
        ("colour", "red"),
        ("place", "left"),
        ("mood", "sad"),
    ]);
    let b_prime = attributes(&[
        ("sky", "night"),
        ("colour", "blue"),
        ("place", "left"),
        ("mood", "sad"),
    ]);
    let shown = |sky, colour, place| {
        let shown = attributes(&[("sky", sky), ("colour", colour), ("place", place)]);
        [
            edit_shown(&b, &b_prime, &shown),
            others_kept(&b, &b_prime, &shown),
        ]
    };
    assert_eq!(shown("night", "blue", "left"), [Some(1.0), Some(1.0)]);
    assert_eq!(shown("night", "red", "left"), [Some(0.5), Some(1.0)]);
    assert_eq!(shown("day", "red", "right"), [Some(0.0), Some(0.0)]);
    assert_eq!(edit_shown(&b, &b, &b), None);
    assert_eq!(
        others_kept(&b, &b_prime, &attributes(&[("sky", "day")])),
        None
    );
}
