//! Whether an edit is visible.

use image::{RgbImage, imageops};

/// Side of the blocks in which pictures are compared, in pixels. Blocks average out the autoencoder's losses.
const BLOCK: u32 = 4;
/// The smallest visible difference of a block's channel, of 255.
const VISIBLE: u8 = 24;
/// The share of changed blocks below which an edit is invisible. In the demo world, an applied difference changes a
/// tenth or more, and one without effect changes none.
const LITTLE: f64 = 0.003;

/// Beyond this strength, other things than the difference begin to change (docs/concept/strength.md).
const STRONGEST: f64 = 1.5;

/// A note about a strength that rarely gives the intended result.
pub(crate) fn of_strength(strength: f64) -> Option<String> {
    let note = if strength > STRONGEST {
        "beyond about 1.5, other things change as well"
    } else if strength < 0.0 {
        "a negative strength moves away from the difference; `--reverse` undoes it"
    } else {
        return None;
    };
    Some(format!("strength {strength}: {note}"))
}

/// Whether B′ differs visibly from B, which has the same size.
pub(crate) fn shows(b: &RgbImage, b_prime: &RgbImage) -> bool {
    let blocks = |picture: &RgbImage| {
        let [width, height] = [picture.width(), picture.height()].map(|side| side.div_ceil(BLOCK));
        imageops::resize(picture, width, height, imageops::FilterType::Triangle)
    };
    let (b, b_prime) = (blocks(b), blocks(b_prime));
    let differ = |(one, other): (&image::Rgb<u8>, &image::Rgb<u8>)| {
        (one.0.iter().zip(other.0)).any(|(one, other)| one.abs_diff(other) > VISIBLE)
    };
    let different = b
        .pixels()
        .zip(b_prime.pixels())
        .filter(|&pair| differ(pair))
        .count();
    #[expect(clippy::cast_precision_loss, reason = "no picture has 2^52 blocks")]
    let share = different as f64 / b.pixels().len().max(1) as f64;
    share > LITTLE
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn unusual_strengths_are_noted() {
        for usual in [0.0, 0.5, 1.0, 1.5] {
            assert_eq!(of_strength(usual), None);
        }
        assert!(of_strength(2.0).unwrap().contains("other things change"));
        assert!(of_strength(-1.0).unwrap().contains("`--reverse`"));
    }

    fn scene() -> RgbImage {
        RgbImage::from_fn(128, 128, |x, y| Rgb([x as u8, y as u8, 90]))
    }

    #[test]
    fn noise_does_not_show_and_a_moon_does() {
        let b = scene();
        let noisy = RgbImage::from_fn(128, 128, |x, y| {
            let Rgb(channels) = *b.get_pixel(x, y);
            let sign = (x * 7 + y * 13) % 3;
            Rgb(channels.map(|value| value.saturating_add(20 * sign as u8)))
        });
        assert!(!shows(&b, &noisy));
        let mut moon = b.clone();
        for (x, y) in (20..36).flat_map(|x| (20..36).map(move |y| (x, y))) {
            moon.put_pixel(x, y, Rgb([250, 245, 220]));
        }
        assert!(shows(&b, &moon));
        assert!(!shows(&b, &b));
    }
}
