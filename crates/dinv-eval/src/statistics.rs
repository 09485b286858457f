//! Means over kinds of edits, their intervals, and whether two methods differ.
//!
//! Values come in groups, one per kind. Each group is averaged first, then the groups, so that no kind
//! weighs more for being more frequent.

use difference_inversion::util::random::{Purpose, rng};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// Resamples of a bootstrap, and flips of a permutation test.
pub const RESAMPLES: usize = 10_000;

/// A mean over kinds with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean over kinds of each kind's mean.
    pub mean: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
    /// The number of values.
    pub count: usize,
}

/// The mean over the groups of each group's mean; empty groups are ignored.
pub fn mean_of_means(groups: &[Vec<f64>]) -> Option<f64> {
    let means = groups
        .iter()
        .filter(|group| !group.is_empty())
        .map(|group| mean(group));
    let means: Vec<f64> = means.collect();
    (!means.is_empty()).then(|| mean(&means))
}

/// The [mean of means](mean_of_means) with its percentile bootstrap interval (Efron 1979). Every
/// group is resampled from itself, with replacement, [`RESAMPLES`] times; the interval is from the
/// 2.5th to the 97.5th percentile of the resampled means. A group of n values is resampled with n − 1
/// draws, so that their mean varies by s²/n, as the group's does. With n draws it would vary by
/// (n − 1)/n of that, which is too little for the small groups of a suite (Rao and Wu 1988,
/// "Resampling inference with complex survey data"; with n − 1 draws their rescaling vanishes). Groups
/// of a single value, which do not show how their values vary, are pooled into one.
pub fn bootstrap(groups: &[Vec<f64>], seed: u64) -> Option<Estimate> {
    let mean = mean_of_means(groups)?;
    let [low, high] = interval(groups, seed, RESAMPLES);
    Some(Estimate {
        mean,
        low,
        high,
        count: groups.iter().map(Vec::len).sum(),
    })
}

/// The interval from this number of resamples.
fn interval(groups: &[Vec<f64>], seed: u64, resamples: usize) -> [f64; 2] {
    // The sets that are resampled from themselves, with the number of groups in each.
    let mut strata: Vec<(f64, Vec<f64>)> = (groups.iter())
        .filter(|group| group.len() > 1)
        .map(|group| (1.0, group.clone()))
        .collect();
    let singles = groups.iter().filter(|group| group.len() == 1);
    let singles: Vec<f64> = singles.flatten().copied().collect();
    if !singles.is_empty() {
        strata.push((singles.len() as f64, singles));
    }
    let all: f64 = strata.iter().map(|(groups, _)| groups).sum();
    let mut rng = rng(seed, Purpose::Statistics, 0);
    let mut drawn: Vec<f64> = (0..resamples)
        .map(|_| {
            let sums = strata.iter().map(|(groups, values)| {
                let draws = (values.len() - 1).max(1);
                let sum: f64 = (0..draws)
                    .map(|_| values[rng.random_range(0..values.len())])
                    .sum();
                groups * sum / draws as f64
            });
            sums.sum::<f64>() / all
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    [0.025, 0.975].map(|fraction| percentile(&drawn, fraction))
}

/// Tests whether paired differences, in groups, are other than zero: the share of sign flips (each
/// difference kept or negated, [`RESAMPLES`] times at random) whose mean of means is at least as
/// far from zero as the observed one, which counts as one of them (Fisher's randomisation test,
/// two-sided).
pub fn sign_flip_p(differences: &[Vec<f64>], seed: u64) -> Option<f64> {
    /// The largest error from summing in another order.
    const ROUNDING: f64 = 1e-12;
    let found = mean_of_means(differences)?.abs();
    let mut rng = rng(seed, Purpose::Statistics, 1);
    let mut flipped: Vec<Vec<f64>> = differences.to_vec();
    let as_far = (0..RESAMPLES)
        .filter(|_| {
            for (flipped, group) in flipped.iter_mut().zip(differences) {
                for (flipped, value) in flipped.iter_mut().zip(group) {
                    *flipped = if rng.random() { *value } else { -value };
                }
            }
            mean_of_means(&flipped).unwrap_or_default().abs() >= found - ROUNDING
        })
        .count();
    Some((as_far + 1) as f64 / (RESAMPLES + 1) as f64)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The value below which `fraction` of sorted values falls, interpolated between the nearest two.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len() - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the whole part of a place in the list"
    )]
    let below = place as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_counts_the_same() {
        let groups = [vec![1.0, 1.0, 1.0, 1.0], vec![0.0], Vec::new()];
        assert_eq!(mean_of_means(&groups), Some(0.5));
        assert_eq!(mean_of_means(&[Vec::new()]), None);
        assert_eq!(bootstrap(&[], 0), None);
    }

    #[test]
    fn percentiles_are_interpolated() {
        let values = [0.0, 1.0, 2.0, 3.0, 4.0];
        assert_eq!(percentile(&values, 0.5), 2.0);
        assert_eq!(percentile(&values, 0.025), 0.1);
        assert_eq!(percentile(&values, 1.0), 4.0);
        assert_eq!(percentile(&[7.0], 0.975), 7.0);
    }

    #[test]
    fn the_interval_is_that_of_the_normal_approximation() {
        // 100 values, half 0 and half 1: the standard error of the mean is 0.05.
        let group: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let estimate = bootstrap(std::slice::from_ref(&group), 3).unwrap();
        assert_eq!((estimate.mean, estimate.count), (0.5, 100));
        assert!(
            (estimate.low - (0.5 - 1.96 * 0.05)).abs() < 0.011,
            "{estimate:?}"
        );
        assert!(
            (estimate.high - (0.5 + 1.96 * 0.05)).abs() < 0.011,
            "{estimate:?}"
        );
        // Resampling is within kinds: differences between kinds add no uncertainty.
        let apart = [vec![0.0; 50], vec![1.0; 50]];
        let estimate = bootstrap(&apart, 3).unwrap();
        assert_eq!([estimate.low, estimate.mean, estimate.high], [0.5; 3]);
        // Kinds of one analogy each are pooled: the result is that of one kind with all of them.
        let single: Vec<Vec<f64>> = group.iter().map(|value| vec![*value]).collect();
        let estimate = bootstrap(&single, 3).unwrap();
        assert!(
            (estimate.high - (0.5 + 1.96 * 0.05)).abs() < 0.011,
            "{estimate:?}"
        );
        let group = std::slice::from_ref(&group);
        assert_eq!(bootstrap(group, 3), bootstrap(group, 3));
    }

    /// The share of 1000 simulated measurements whose interval contains the true mean, with `size` values
    /// per kind.
    fn coverage(kinds: usize, size: usize) -> f64 {
        let mut rng = rng(5, Purpose::Statistics, 2);
        let held = (0..1000).filter(|_| {
            let groups: Vec<Vec<f64>> = (0..kinds)
                .map(|_| (0..size).map(|_| rng.random()).collect())
                .collect();
            let [low, high] = interval(&groups, 1, 1000);
            (low..=high).contains(&0.5)
        });
        held.count() as f64 / 1000.0
    }

    #[test]
    fn intervals_of_few_values_hold_the_true_mean_as_often_as_they_say() {
        for (kinds, size) in [(28, 2), (28, 1), (9, 3)] {
            let coverage = coverage(kinds, size);
            assert!((0.91..=0.98).contains(&coverage), "{size}: {coverage}");
        }
        // The single draw is either of the two.
        let estimate = bootstrap(&[vec![0.0, 1.0]], 1).unwrap();
        assert_eq!(
            [estimate.low, estimate.mean, estimate.high],
            [0.0, 0.5, 1.0]
        );
    }

    #[test]
    fn flips_of_few_signs_can_be_counted() {
        // 2 of the 8 sign patterns of three equal differences are as far from zero: p = 1/4.
        let p = sign_flip_p(&[vec![0.3, 0.3, 0.3]], 1).unwrap();
        assert!((p - 0.25).abs() < 0.015, "{p}");
        // Ten of one sign: 2 of 1024 patterns.
        let p = sign_flip_p(&[vec![1.0; 6], vec![1.0; 4]], 1).unwrap();
        assert!(p < 0.005, "{p}");
        assert_eq!(sign_flip_p(&[vec![0.0; 5]], 1), Some(1.0));
        assert_eq!(sign_flip_p(&[], 1), None);
    }
}
