//! The metrics of a B′, each a pure function of features, pixels or attributes.

mod pixels;
mod similarity;

pub use self::pixels::{mse, ssim};
pub use self::similarity::{direction, rescaled, stage_distance};
use super::{SceneAttributes, Scores};

/// The share of the changed attributes for which B′ shows the value of the true B′; `None` if none
/// changes.
///
/// `shown` are the attributes that a judge reads from B′; others do not count.
pub fn edit_shown(
    b: &SceneAttributes,
    b_prime: &SceneAttributes,
    shown: &SceneAttributes,
) -> Option<f64> {
    share(b, b_prime, shown, |before, after| before != after)
}

/// The share of all other attributes that B′ shows as B does; `None` if there are none.
pub fn others_kept(
    b: &SceneAttributes,
    b_prime: &SceneAttributes,
    shown: &SceneAttributes,
) -> Option<f64> {
    share(b, b_prime, shown, |before, after| before == after)
}

/// Adds derived scores of an analogy: `right`, 1 if every attribute is that of the true B′ (`edit` and
/// `kept` are 1), else 0.
pub fn derive(scores: &mut Scores) {
    let shares = ["edit", "kept"].map(|name| scores.get(name).copied());
    if let [Some(edit), Some(kept)] = shares {
        let right = edit == 1.0 && kept == 1.0;
        scores.insert("right".to_owned(), f64::from(u8::from(right)));
    }
}

fn share(
    b: &SceneAttributes,
    b_prime: &SceneAttributes,
    shown: &SceneAttributes,
    counts: impl Fn(&str, &str) -> bool,
) -> Option<f64> {
    let (mut right, mut total) = (0.0, 0.0);
    for (name, after) in b_prime {
        let (Some(before), Some(found)) = (b.get(name), shown.get(name)) else {
            continue;
        };
        if counts(before, after) {
            total += 1.0;
            right += f64::from(u8::from(found == after));
        }
    }
    (total > 0.0).then(|| right / total)
}

#[cfg(test)]
mod tests;
