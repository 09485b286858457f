//! The losses of the method, as pure functions of the difference tokens.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::diffusion::joint_space::JointSpace;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::text_encoder::{Beginnings, TextEncoder};
use crate::diffusion::words::{FullPrompt, Prompt};
use crate::method::learn::{ClipReading, Draws, LearnConfig, Pair};
use crate::util::progress::LossTerms;
use crate::util::tensors::{cosine, host, unit};
use crate::{Error, Result};

/// The two terms of the token consistency loss, each `[1]`.
#[derive(Debug, Clone)]
pub struct Consistency {
    /// `L_after = ‖target − prediction(noisy z_A′, t, c([P_A, +D̃]))‖²`
    pub after: Tensor<1>,
    /// `L_before = ‖target − prediction(noisy z_A, t, c([P_A′, −D̃]))‖²`
    pub before: Option<Tensor<1>>,
}

/// The loss `[1]` of a step as a number.
///
/// # Errors
/// [`Error::Diverged`] if it is not finite.
pub fn finite(loss: &Tensor<1>, step: usize) -> Result<f64> {
    let value = f64::from(host(loss.clone().inner())[0]);
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::Diverged {
            step,
            checkpoint: None,
        }),
    }
}

/// The loss of one batch and its terms, each `[1]`.
#[derive(Debug, Clone)]
pub struct Objective {
    /// The sum to minimise.
    pub total: Tensor<1>,
    /// L_after, if used.
    pub after: Option<Tensor<1>>,
    /// L_before, if used.
    pub before: Option<Tensor<1>>,
    /// The mean of L_CLIP over the joint spaces, if used.
    pub clip: Option<Tensor<1>>,
}

impl Objective {
    /// The values, fetched from the device at once.
    pub fn terms(&self) -> LossTerms {
        let zero = self.total.zeros_like();
        let [after, before, clip] = [&self.after, &self.before, &self.clip]
            .map(|term| term.as_ref().unwrap_or(&zero).clone());
        let terms = Tensor::cat(vec![self.total.clone(), after, before, clip], 0);
        match host(terms.inner())[..] {
            [total, after, before, clip] => LossTerms {
                total,
                after,
                before,
                clip,
            },
            _ => LossTerms {
                total: f32::NAN,
                ..LossTerms::default()
            },
        }
    }
}

/// The loss to minimise: `λ_mse (L_after + λ_before L_before) + λ_clip L_CLIP`. A term of weight 0 is not computed.
///
/// # Shapes
/// As for [`token_consistency`]; `clip` has the CLIP loss of each joint space, and L_CLIP is their mean.
///
/// # Errors
/// As [`token_consistency`] and [`ClipLoss::of`].
pub fn objective(
    pipeline: &Pipeline,
    clip: &[ClipLoss<'_>],
    pairs: &[Pair],
    draws: &Draws,
    difference: &[Tensor<2>],
    config: &LearnConfig,
) -> Result<Objective> {
    let (mut terms, mut after, mut before) = (Vec::new(), None, None);
    if config.lambda_mse > 0.0 {
        let of_pairs =
            token_consistency(pipeline, pairs, draws, difference, config.explains_before())?;
        terms.push(of_pairs.after.clone() * config.lambda_mse);
        if let Some(before) = &of_pairs.before {
            terms.push(before.clone() * (config.lambda_mse * config.lambda_before));
        }
        (after, before) = (Some(of_pairs.after), of_pairs.before);
    }
    let mut clip_loss = None;
    if config.lambda_clip > 0.0 {
        let loss = self::clip(clip, difference)?;
        terms.push(loss.clone() * config.lambda_clip);
        clip_loss = Some(loss);
    }
    let total = (terms.into_iter().reduce(|sum, term| sum + term))
        .ok_or_else(|| Error::invalid_input("nothing is in the loss: all weights are 0"))?;
    Ok(Objective {
        total,
        after,
        before,
        clip: clip_loss,
    })
}

/// L_CLIP `[1]`, the mean over the joint spaces.
///
/// # Errors
/// As [`ClipLoss::of`].
pub fn clip(losses: &[ClipLoss<'_>], difference: &[Tensor<2>]) -> Result<Tensor<1>> {
    let terms = losses.iter().map(|loss| loss.of(difference));
    Ok(Tensor::cat(terms.collect::<Result<_>>()?, 0).mean())
}

/// Token consistency (the paper's loss of the same name): adding the difference to A's prompt must
/// explain A′, and subtracting it from the prompt of A′ must explain A, with the same timestep and noise
/// for both. The target is what the model predicts, noise or velocity; ‖·‖² is the mean
/// over all elements. Both terms pass through the denoiser as one batch.
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
    let noising = pipeline.noising();
    let noisy = noising.add_noise(latents.clone(), noise.clone(), &timesteps);
    let target = noising.target(latents, noise, &timesteps);
    let prediction = pipeline.predict(noisy, &timesteps, &conditions);
    let squares = (prediction.cast(DType::F32) - target.cast(DType::F32)).powi_scalar(2);
    let after = squares.clone().slice([0..batch]).mean();
    let before = with_before.then(|| squares.slice([batch..2 * batch]).mean());
    Ok(Consistency { after, before })
}

/// The CLIP loss of one text encoder: as it reads them, the difference tokens must point from A to A′.
///
/// It is the mean of `1 − cos(E_T([P, ±D̃]) − E_T([P]), ±delta)`, with unit-norm [features](TextEncoder::features), over
/// the prompts read. [`ClipReading::Prompts`], ours, compares a difference of features with a difference of
/// features: it reads `[P_A, +D̃]` and, unless [`LearnConfig::consistency`] is off,
/// `[P_A′, −D̃]` of every pair, and in each step [thinned copies](Self::with_thinned) of both.
/// [`ClipReading::Alone`] is the paper's `1 − cos(E_T([D̃]), delta)`: P is empty, and its own features are not
/// subtracted.
///
/// Where no text encoder was trained with pictures, the delta is that of the prompts (ours):
/// [`of_captions`](Self::of_captions).
#[derive(Debug)]
pub struct ClipLoss<'a> {
    reader: Reader<'a>,
    /// The prompts that are read in every step.
    readings: Arc<[Reading]>,
    /// These and, in a step, their thinned copies, read at once.
    batch: Batch,
}

/// The text encoder that reads.
#[derive(Debug, Clone, Copy)]
struct Reader<'a> {
    encoder: &'a TextEncoder,
    /// Its number among the pipeline's, which is that of its difference tokens.
    number: usize,
}

impl Reader<'_> {
    fn read(&self, prompts: &[&Prompt], num_tokens: usize) -> Result<Beginnings> {
        (self.encoder).read_several(prompts, self.number, num_tokens)
    }

    /// The unit-norm features of the prompts, [b, e], followed by `difference`, [b, n, d].
    fn features(&self, read: &Beginnings, difference: Option<&Tensor<3>>) -> Result<Tensor<2>> {
        let features = self.encoder.features(read, difference)?;
        Ok(unit(features.cast(DType::F32)))
    }
}

/// A prompt that the CLIP loss reads.
#[derive(Debug, Clone)]
struct Reading {
    prompt: Prompt,
    /// The target direction.
    delta: Vec<f32>,
    /// +1 if the difference is added, −1 if it is subtracted.
    sign: f32,
}

/// Prompts without difference tokens, to be read at once.
#[derive(Debug, Clone)]
struct Batch {
    /// Their starts and words.
    beginnings: Beginnings,
    /// The features to subtract: those without difference tokens, [b, e] of unit norm, or none.
    without: Option<Tensor<2>>,
    /// The target directions, [b, e].
    targets: Tensor<2>,
    /// Whether the difference is added or subtracted, [b, 1, 1].
    signs: Tensor<3>,
}

impl Batch {
    fn new(reader: Reader<'_>, readings: &[Reading], config: &LearnConfig) -> Result<Self> {
        let prompts: Vec<&Prompt> = readings.iter().map(|reading| &reading.prompt).collect();
        let beginnings = reader.read(&prompts, config.num_tokens)?;
        let without = match config.clip_reading {
            ClipReading::Alone => None,
            ClipReading::Prompts => Some(reader.features(&beginnings, None)?),
        };
        let device = reader.encoder.token_table().device();
        let (count, options) = (readings.len(), (&device, DType::F32));
        let signs: Vec<f32> = readings.iter().map(|reading| reading.sign).collect();
        let targets = (readings.iter())
            .flat_map(|reading| reading.delta.iter().map(|value| value * reading.sign));
        let targets: Vec<f32> = targets.collect();
        let width = targets.len().checked_div(count).unwrap_or(0);
        Ok(Self {
            beginnings,
            without,
            targets: Tensor::from_data(TensorData::new(targets, [count, width]), options),
            signs: Tensor::from_data(TensorData::new(signs, [count, 1, 1]), options),
        })
    }

    fn cat(parts: [&Self; 2]) -> Self {
        let without: Option<Vec<_>> = parts.iter().map(|part| part.without.clone()).collect();
        Self {
            beginnings: Beginnings::cat(&parts.map(|part| &part.beginnings)),
            without: without.map(|rows| Tensor::cat(rows, 0)),
            targets: Tensor::cat(parts.map(|part| part.targets.clone()).to_vec(), 0),
            signs: Tensor::cat(parts.map(|part| part.signs.clone()).to_vec(), 0),
        }
    }
}

impl<'a> ClipLoss<'a> {
    /// The loss in `joint`, the pairs' deltas of which have the number `number`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if a pair has no such delta, and as
    /// [`TextEncoder::read_several`].
    pub fn new(
        joint: &'a JointSpace,
        number: usize,
        pairs: &[Pair],
        config: &LearnConfig,
    ) -> Result<Self> {
        let deltas = pairs.iter().map(|pair| {
            let delta = pair.deltas.get(number).cloned();
            delta.ok_or_else(|| Error::invalid_input("a pair needs a delta for each joint space"))
        });
        let deltas: Vec<Vec<f32>> = deltas.collect::<Result<_>>()?;
        let reader = Reader {
            encoder: joint.text_encoder(),
            number: joint.encoder(),
        };
        Self::read_by(reader, pairs.iter().zip(deltas), config)
    }

    /// The loss of text encoder `number`, which has no joint space: what the tokens change must point from the prompt
    /// of A to that of A′. Pairs with equal prompts say nothing; `None` if there are no others.
    ///
    /// # Errors
    /// As [`TextEncoder::read_several`].
    pub fn of_captions(
        encoder: &'a TextEncoder,
        number: usize,
        pairs: &[Pair],
        config: &LearnConfig,
    ) -> Result<Option<Self>> {
        let reader = Reader { encoder, number };
        let telling: Vec<&Pair> = pairs.iter().filter(|pair| pair.prompts_differ()).collect();
        if telling.is_empty() {
            return Ok(None);
        }
        let deltas = telling.iter().map(|pair| {
            let prompts = [pair.prompt_a.prompt(), pair.prompt_a_prime.prompt()];
            let states = reader.features(&reader.read(&prompts, config.num_tokens)?, None)?;
            let change = states.clone().narrow(0, 1, 1) - states.narrow(0, 0, 1);
            Ok(host(unit(change)))
        });
        let deltas: Vec<Vec<f32>> = deltas.collect::<Result<_>>()?;
        Self::read_by(reader, telling.iter().copied().zip(deltas), config).map(Some)
    }

    fn read_by<'p>(
        reader: Reader<'a>,
        pairs: impl Iterator<Item = (&'p Pair, Vec<f32>)>,
        config: &LearnConfig,
    ) -> Result<Self> {
        let mut readings = Vec::new();
        for (pair, delta) in pairs {
            let reading = |prompt: &Prompt, sign| Reading {
                prompt: prompt.clone(),
                delta: delta.clone(),
                sign,
            };
            match config.clip_reading {
                ClipReading::Alone => readings.push(reading(&Prompt::default(), 1.0)),
                ClipReading::Prompts => {
                    readings.push(reading(pair.prompt_a.prompt(), 1.0));
                    if config.consistency {
                        readings.push(reading(pair.prompt_a_prime.prompt(), -1.0));
                    }
                }
            }
        }
        let batch = Batch::new(reader, &readings, config)?;
        Ok(Self {
            reader,
            readings: readings.into(),
            batch,
        })
    }

    /// The same loss, which also reads [`LearnConfig::clip_thinned`] copies of each prompt, each word of which is
    /// left out with probability ½. Tokens that only fit the prompts of A and A′ say less after another prompt.
    ///
    /// # Errors
    /// As [`TextEncoder::read_several`].
    pub fn with_thinned(&self, config: &LearnConfig, rng: &mut ChaCha8Rng) -> Result<Self> {
        let mut thinned = Vec::new();
        if config.clip_reading == ClipReading::Prompts {
            for reading in &*self.readings {
                for _ in 0..config.clip_thinned {
                    thinned.push(Reading {
                        prompt: reading.prompt.filtered(|| rng.random()),
                        ..reading.clone()
                    });
                }
            }
        }
        let batch = match thinned.is_empty() {
            true => self.batch.clone(),
            false => Batch::cat([&self.batch, &Batch::new(self.reader, &thinned, config)?]),
        };
        Ok(Self {
            reader: self.reader,
            readings: self.readings.clone(),
            batch,
        })
    }

    /// The loss `[1]` of difference tokens, one [n, d] per text encoder of the pipeline.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there are none for the text encoder that reads, or of another width.
    pub fn of(&self, difference: &[Tensor<2>]) -> Result<Tensor<1>> {
        let Some(tokens) = difference.get(self.reader.number) else {
            return Err(Error::invalid_input(
                "there are no difference tokens for a text encoder that the CLIP loss reads",
            ));
        };
        let batch = &self.batch;
        let tokens = tokens.clone().unsqueeze::<3>() * batch.signs.clone(); // [b, n, d]
        let features = (self.reader).features(&batch.beginnings, Some(&tokens))?; // [b, e]
        let changes = match &batch.without {
            Some(without) => features - without.clone(),
            None => features,
        };
        let cosines = cosine(changes, batch.targets.clone());
        Ok(cosines.mean().neg().add_scalar(1.0))
    }
}
