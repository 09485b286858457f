//! The two losses of the method, as pure functions of the difference tokens.

use burn::tensor::{DType, Tensor};

use crate::Result;
use crate::joint_space::JointSpace;
use crate::learn::{Draws, Pair};
use crate::pipeline::Pipeline;
use crate::prompt::FullPrompt;

/// Keeps the cosine of vectors near zero finite.
const EPSILON: f64 = 1e-8;

/// The two terms of the token consistency loss, each `[1]`.
#[derive(Debug, Clone)]
pub struct Consistency {
    /// `L_after = ‖target − prediction(noisy z_A′, t, c([P_A, +D̃]))‖²`
    pub after: Tensor<1>,
    /// `L_before = ‖target − prediction(noisy z_A, t, c([P_A′, −D̃]))‖²`
    pub before: Option<Tensor<1>>,
}

/// Token consistency (the paper's loss of the same name): adding the difference to A's prompt must
/// explain A′, and taking it from the prompt of A′ must explain A, with the same timestep and noise
/// for both. The target is the noise or, for models that predict it, the velocity; ‖·‖² is the mean
/// over all elements. Both terms go through the U-Net as one batch.
///
/// # Shapes
/// `draws`: a batch of `pairs.len()` · samples, all samples of the first pair first.
/// `difference`: one [n, d] per text encoder.
///
/// # Errors
/// As [`Pipeline::encode_prompts`].
pub fn token_consistency(
    pipeline: &Pipeline,
    pairs: &[Pair],
    draws: &Draws,
    difference: &[Tensor<2>],
    with_before: bool,
) -> Result<Consistency> {
    let batch = draws.timesteps.len();
    let samples = batch.checked_div(pairs.len()).unwrap_or(0);
    let mut latents: Vec<Tensor<4>> = pairs.iter().map(|p| p.latents_a_prime.clone()).collect();
    let mut prompts: Vec<FullPrompt<'_>> = (pairs.iter())
        .map(|pair| FullPrompt::with_difference(&pair.prompt_a, difference, 1.0))
        .collect();
    let mut timesteps = draws.timesteps.clone();
    let mut noise = draws.noise.clone();
    if with_before {
        latents.extend(pairs.iter().map(|pair| pair.latents_a.clone()));
        prompts.extend(
            pairs
                .iter()
                .map(|pair| FullPrompt::with_difference(&pair.prompt_a_prime, difference, -1.0)),
        );
        timesteps.extend_from_within(..);
        noise = Tensor::cat(vec![noise.clone(), noise], 0); // [2 batch, c, h, w]
    }
    let conditions = pipeline.encode_prompts(&prompts)?.repeat_each(samples);
    let latents: Vec<_> = latents
        .into_iter()
        .map(|z| z.repeat_dim(0, samples))
        .collect();
    let latents = Tensor::cat(latents, 0); // [(1 or 2) batch, c, h, w]
    let noisy = pipeline
        .schedule()
        .add_noise(latents.clone(), noise.clone(), &timesteps);
    let target = pipeline.schedule().target(latents, noise, &timesteps);
    let timesteps: Vec<f64> = timesteps.iter().map(|&t| t as f64).collect();
    let prediction = pipeline.predict(noisy, &timesteps, &conditions);
    let squares = (prediction.cast(DType::F32) - target.cast(DType::F32)).powi_scalar(2);
    let after = squares.clone().slice([0..batch]).mean();
    let before = with_before.then(|| squares.slice([batch..2 * batch]).mean());
    Ok(Consistency { after, before })
}

/// `L_CLIP = 1 − cos(E_T([D̃]), delta)` (the paper's CLIP loss), averaged over the deltas: the
/// difference tokens, read alone by the text encoder, must point from A to A′.
///
/// # Shapes
/// `difference`: [n, d]; `deltas`: [pairs, e] of unit norm; result `[1]`.
///
/// # Errors
/// As [`JointSpace::difference_features`].
pub fn clip(joint: &JointSpace, difference: &Tensor<2>, deltas: &Tensor<2>) -> Result<Tensor<1>> {
    let features = joint.difference_features(difference)?.cast(DType::F32); // [1, e]
    Ok((cosine(features, deltas.clone()).mean().neg()).add_scalar(1.0))
}

/// Cosines of the rows of `x` and `y`, one of which may be a single row.
pub(crate) fn cosine(x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    let norm = |x: Tensor<2>| x.powi_scalar(2).sum_dim(1).add_scalar(EPSILON).sqrt();
    let norms = norm(x.clone()) * norm(y.clone());
    ((x * y).sum_dim(1) / norms).squeeze_dim(1)
}
