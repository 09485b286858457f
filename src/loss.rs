//! The two losses of the method, as pure functions of the difference tokens.

use burn::tensor::{DType, Tensor, TensorData};

use crate::joint_space::JointSpace;
use crate::learn::{ClipReading, Draws, LearnConfig, Pair};
use crate::models::clip_text::PrefixCache;
use crate::pipeline::Pipeline;
use crate::prompt::FullPrompt;
use crate::tokens::signed;
use crate::{Error, Result};

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

/// The CLIP loss in one joint space: read by the text encoder, the difference tokens must point
/// from A to A′.
///
/// [`ClipReading::Alone`] is the paper's: `L_CLIP = 1 − cos(E_T([D̃]), delta)`, averaged over the
/// pairs. [`ClipReading::Prompts`], ours, compares like with like, a difference of features with a
/// difference of features: it reads what the tokens change in the prompts that they are made for, and is
/// the mean over the pairs, and over both terms where taking the difference away has to explain A, of
/// `1 − cos(E_T([P_A, +D̃]) − E_T([P_A]), delta)` and `1 − cos(E_T([P_A′, −D̃]) − E_T([P_A′]), −delta)`,
/// features of unit norm.
#[derive(Debug)]
pub struct ClipLoss<'a> {
    joint: &'a JointSpace,
    /// The unit-norm deltas of the pairs, [pairs, e].
    deltas: Tensor<2>,
    /// The prompts that are read, none if the tokens are read alone.
    prompts: Vec<ReadPrompt>,
}

/// A prompt as the CLIP loss sees it.
#[derive(Debug)]
struct ReadPrompt {
    /// Its start and words.
    beginning: PrefixCache,
    /// Its features without difference tokens, [1, e] of unit norm.
    features: Tensor<2>,
    /// Where they have to point, [1, e].
    delta: Tensor<2>,
    /// +1 where the difference is added, −1 where it is taken away.
    sign: f64,
}

impl<'a> ClipLoss<'a> {
    /// The loss in `joint`, where the pairs' deltas have the number `number`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if a pair has no such delta, and as
    /// [`JointSpace::read`].
    pub fn new(
        joint: &'a JointSpace,
        number: usize,
        pairs: &[Pair],
        config: &LearnConfig,
    ) -> Result<Self> {
        let device = joint.device();
        let mut rows = Vec::with_capacity(pairs.len());
        let mut prompts = Vec::new();
        for pair in pairs {
            let Some(delta) = pair.deltas.get(number) else {
                return Err(Error::invalid_input(
                    "a pair needs a delta for each joint space",
                ));
            };
            let data = TensorData::new(delta.clone(), [1, delta.len()]);
            let delta = Tensor::<2>::from_data(data, (device, DType::F32));
            rows.push(delta.clone());
            if config.clip_reading == ClipReading::Alone {
                continue;
            }
            let sides = [(&pair.prompt_a, 1.0), (&pair.prompt_a_prime, -1.0)];
            for (words, sign) in sides.into_iter().take(1 + usize::from(config.consistency)) {
                let beginning = joint.read(words.prompt(), config.num_tokens)?;
                prompts.push(ReadPrompt {
                    features: unit(joint.text_encoder().features(&beginning, None)?),
                    beginning,
                    delta: delta.clone() * sign,
                    sign,
                });
            }
        }
        Ok(Self {
            joint,
            deltas: Tensor::cat(rows, 0),
            prompts,
        })
    }

    /// The loss `[1]` of difference tokens, one [n, d] per text encoder of the pipeline.
    ///
    /// # Errors
    /// As [`JointSpace::difference_features`].
    pub fn of(&self, difference: &[Tensor<2>]) -> Result<Tensor<1>> {
        let Some(tokens) = difference.get(self.joint.encoder()) else {
            return Err(Error::invalid_input(
                "there are no difference tokens for the text encoder of a joint space",
            ));
        };
        let cosines = if self.prompts.is_empty() {
            let features = self.joint.difference_features(tokens)?.cast(DType::F32); // [1, e]
            cosine(features, self.deltas.clone())
        } else {
            let cosines = self.prompts.iter().map(|prompt| {
                let tokens = signed(tokens, prompt.sign);
                let encoder = self.joint.text_encoder();
                let features = unit(encoder.features(&prompt.beginning, Some(&tokens))?);
                let change = features - prompt.features.clone();
                Ok(cosine(change, prompt.delta.clone()))
            });
            Tensor::cat(cosines.collect::<Result<_>>()?, 0)
        };
        Ok(cosines.mean().neg().add_scalar(1.0))
    }
}

/// Rows of unit norm.
pub(crate) fn unit(rows: Tensor<2>) -> Tensor<2> {
    let rows = rows.cast(DType::F32);
    let squares = rows.clone().powi_scalar(2).sum_dim(1);
    rows / squares.add_scalar(EPSILON).sqrt()
}

/// Cosines of the rows of `x` and `y`, one of which may be a single row.
pub(crate) fn cosine(x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    let norm = |x: Tensor<2>| x.powi_scalar(2).sum_dim(1).add_scalar(EPSILON).sqrt();
    let norms = norm(x.clone()) * norm(y.clone());
    ((x * y).sum_dim(1) / norms).squeeze_dim(1)
}
