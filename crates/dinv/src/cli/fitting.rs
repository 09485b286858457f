//! Notes about pictures that are cropped to the size that a model draws.

use std::path::Path;

/// A picture's file, and its width and height in pixels.
pub(crate) type Measured<'a> = (&'a Path, (u32, u32));

/// The largest cropped share of a picture without a note.
const LITTLE: f64 = 0.05;
/// Proposed sides are multiples of this, which all models support.
const STEP: f64 = 64.0;

/// Notes about pairs (A, A′), in this order and perhaps followed by B, that lose more than a little when cropped to
/// `[height, width]`, or whose A and A′ are cropped differently.
pub(crate) fn of_pairs(pictures: &[Measured<'_>], resolution: [u32; 2]) -> Vec<String> {
    let different = pictures
        .as_chunks::<2>()
        .0
        .iter()
        .filter(|[a, a_prime]| common(aspect(a.1), aspect(a_prime.1)) < 1.0 - LITTLE);
    let notice = |[a, a_prime]: &[Measured<'_>; 2]| {
        format!(
            "{} and {} differ in aspect ratio and are cropped differently, which is learned as part of the \
             difference",
            told(a),
            told(a_prime)
        )
    };
    let mut notices: Vec<String> = different.map(notice).collect();
    notices.extend(of_pictures(pictures, resolution));
    notices
}

/// A note about pictures that lose more than a little when cropped to `[height, width]`.
pub(crate) fn of_pictures(pictures: &[Measured<'_>], [height, width]: [u32; 2]) -> Option<String> {
    let drawn = aspect((width, height));
    let kept = |picture: &Measured<'_>| common(aspect(picture.1), drawn);
    let cut: Vec<_> = pictures
        .iter()
        .filter(|&picture| kept(picture) < 1.0 - LITTLE)
        .collect();
    let first = cut.first()?;
    let which = match cut.len() {
        1 => told(first),
        count => format!("each of {count} pictures, such as {},", told(first)),
    };
    let mut notice = format!(
        "{which} is cropped to its central {:.0} %: the model draws {width}×{height} pixels",
        100.0 * kept(first)
    );
    let better = alike(first.1, f64::from(width) * f64::from(height));
    if common(aspect(first.1), aspect(better)) > kept(first) + LITTLE {
        notice += &format!("; `--resolution {}x{}` keeps more", better.0, better.1);
    }
    Some(notice)
}

/// A notice about a mask whose aspect ratio differs from that of its picture.
pub(crate) fn of_mask(picture: Measured<'_>, mask: Measured<'_>) -> Option<String> {
    let same = common(aspect(picture.1), aspect(mask.1)) >= 1.0 - LITTLE;
    (!same).then(|| {
        format!(
            "{} differs in aspect ratio from {} and is cropped differently",
            told(&mask),
            told(&picture)
        )
    })
}

fn told((path, (width, height)): &Measured<'_>) -> String {
    format!("{} ({width}×{height})", path.display())
}

fn aspect((width, height): (u32, u32)) -> f64 {
    f64::from(width) / f64::from(height)
}

/// The share of a picture that remains when it is cropped to another aspect ratio.
fn common(one: f64, other: f64) -> f64 {
    (one / other).min(other / one)
}

/// A size of about `area` pixels with about the aspect ratio of a picture.
fn alike(size: (u32, u32), area: f64) -> (u32, u32) {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive number"
    )]
    let side = |square: f64| ((square.sqrt() / STEP).round().max(1.0) * STEP) as u32;
    (side(area * aspect(size)), side(area / aspect(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQUARE: [u32; 2] = [512, 512];

    #[test]
    fn what_is_cut_away_is_told() {
        let street = (Path::new("street.jpg"), (3000, 2000));
        let notice = of_pictures(&[street], SQUARE).unwrap();
        assert_eq!(
            notice,
            "street.jpg (3000×2000) is cropped to its central 67 %: the model draws 512×512 pixels; \
             `--resolution 640x448` keeps more"
        );
        let nearly = (Path::new("nearly.jpg"), (1000, 980));
        assert_eq!(of_pictures(&[nearly, nearly], SQUARE), None);
        assert_eq!(of_pictures(&[street], [448, 640]), None);
        let notice = of_pictures(&[nearly, street, street], SQUARE).unwrap();
        assert!(
            notice.contains("each of 2 pictures, such as street.jpg"),
            "{notice}"
        );
        // No size of about 128 pixels is closer.
        let notice = of_pictures(&[street], [128, 128]).unwrap();
        assert!(!notice.contains("--resolution"), "{notice}");
    }

    #[test]
    fn a_mask_of_other_proportions_is_told() {
        let [street, mask] = [("street.jpg", (3000, 2000)), ("sky.png", (512, 512))]
            .map(|(name, size)| (Path::new(name), size));
        let notice = of_mask(street, mask).unwrap();
        assert!(
            notice.starts_with("sky.png (512×512) differs in aspect ratio"),
            "{notice}"
        );
        assert_eq!(of_mask(street, (mask.0, (1500, 1000))), None);
    }

    #[test]
    fn pairs_of_other_proportions_are_told() {
        let [camera, editor] = [("a.jpg", (3000, 2000)), ("a2.png", (2000, 1500))]
            .map(|(name, size)| (Path::new(name), size));
        let notices = of_pairs(&[camera, editor, camera], [448, 640]);
        assert!(notices[0].starts_with("a.jpg (3000×2000) and a2.png (2000×1500)"));
        assert_eq!(notices.len(), 2); // the other: a part of a2.png is cut off
        assert!(of_pairs(&[camera, camera, camera], [448, 640]).is_empty());
    }
}
