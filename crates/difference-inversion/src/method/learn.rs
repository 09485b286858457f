//! The optimisation loop: difference tokens D̃ from pairs (A, A′).

mod adamw;
mod checkpoint;
mod config;
mod draws;
mod identity;
mod records;
mod scaling;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor};

pub use self::adamw::{AdamW, Moments};
pub use self::checkpoint::losses as losses_of_checkpoint;
use self::checkpoint::{Best, State};
pub use self::config::{
    ClipReading, Initialisation, LearnConfig, RELATIVE_LEARNING_RATE, Schedule,
};
use self::draws::{Drawn, Source, augmented};
use self::identity::Identity;
pub use self::records::{Draws, Records, Replay, Trace};
pub use self::scaling::LossScale;
use crate::diffusion::joint_space::JointSpace;
use crate::diffusion::pipeline::Pipeline;
use crate::diffusion::words::Words;
use crate::method::difference::DifferenceTokens;
use crate::method::loss::{self, ClipLoss, Objective};
use crate::util::files::Existing;
use crate::util::progress::{self, LossTerms, Observer, Progress, Stage};
use crate::util::random::{Purpose, normal, rng};
use crate::util::tensors::host;
use crate::{Error, Result};

/// One pair (A, A′), with everything that does not depend on D̃ computed.
#[derive(Debug, Clone)]
pub struct Pair {
    /// z_A [1, channels, h, w], scaled.
    pub latents_a: Tensor<4>,
    /// z_A′, the same.
    pub latents_a_prime: Tensor<4>,
    /// P_A.
    pub prompt_a: Words,
    /// P_A′.
    pub prompt_a_prime: Words,
    /// The unit-norm delta in each joint space, `[e]`.
    pub deltas: Vec<Vec<f32>>,
}

impl Pair {
    /// Whether the prompts of A and A′ say different things.
    pub fn prompts_differ(&self) -> bool {
        !(self.prompt_a.prompt()).has_words_of(self.prompt_a_prime.prompt())
    }
}

/// The result of the optimisation.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The best tokens on the fixed set, or the last if none are selected.
    pub tokens: DifferenceTokens,
    /// The number of steps after which they were reached.
    pub best_step: usize,
    /// The loss of every step, including those before a resume.
    pub history: Vec<LossTerms>,
}

/// Learns D̃ by minimising `λ_mse (L_after + λ_before L_before) + λ_clip L_CLIP` with AdamW. L_CLIP is
/// the mean over `joints`, the joint spaces of some or all of the pipeline's text encoders; for a family that has
/// none, over the [states of its encoders](ClipLoss::of_captions).
///
/// # Errors
/// [`Error::Setting`] for invalid settings, [`Error::Stopped`] after a checkpoint if the
/// observer asks to stop, [`Error::Missing`] if there is no pair, or no joint space for the CLIP
/// loss, [`Error::InvalidInput`] for pairs without a delta for each joint space or a pipeline that
/// draws from more than words, [`Error::Diverged`] if the loss is not finite, and any error in the files
/// of `records`.
pub fn difference(
    pipeline: &Pipeline,
    joints: &[JointSpace],
    pairs: &[Pair],
    config: &LearnConfig,
    records: &Records,
    observer: Observer<'_>,
) -> Result<Outcome> {
    let run = Run::new(pipeline, joints, pairs, config, records)?;
    let mut state = run.first_state(&mut *observer)?;
    // A trace is written at the end, and does not replace one that appears until then.
    let existing = match &records.trace {
        Some(path) if path.exists() => Existing::Replace,
        _ => Existing::Keep,
    };
    let mut trace = match &records.trace {
        Some(path) if records.resume.is_some() => {
            Some(Trace::going_on(path, state.step, &state.tokens)?)
        }
        Some(_) => Some(Trace::new(state.step)),
        None => None,
    };
    let watched = run.steps(&mut state, trace.as_mut(), observer);
    // Also for a run that has diverged.
    if let (Some(trace), Some(path)) = (&trace, &records.trace) {
        trace.write(path, existing)?;
    }
    if watched?.is_break() {
        return Err(Error::Stopped {
            stage: Stage::Learn,
            done: state.step,
            total: config.steps,
            checkpoint: records.checkpoint.clone(),
        });
    }
    run.outcome(state)
}

/// Everything about a run that its steps do not change.
struct Run<'a> {
    pipeline: &'a Pipeline,
    pairs: &'a [Pair],
    config: &'a LearnConfig,
    records: &'a Records,
    /// The identity that its checkpoints are marked with.
    identity: Identity<'a>,
    /// The CLIP loss in each joint space.
    clip: Vec<ClipLoss<'a>>,
    source: Source,
    /// The fixed set on which tokens are judged.
    selection: Vec<Draws>,
    /// How the tokens of each text encoder are moved.
    movers: Vec<Mover>,
}

impl<'a> Run<'a> {
    fn new(
        pipeline: &'a Pipeline,
        joints: &'a [JointSpace],
        pairs: &'a [Pair],
        config: &'a LearnConfig,
        records: &'a Records,
    ) -> Result<Self> {
        config.validate()?;
        let Some(first) = pairs.first() else {
            return Err(Error::Missing {
                what: "a pair of pictures".to_owned(),
                reason: "a difference is learned from at least one pair (A, A′)".to_owned(),
            });
        };
        if pairs.iter().any(|pair| pair.deltas.len() != joints.len()) {
            let reason = "a pair needs a delta for each joint space";
            return Err(Error::invalid_input(reason));
        }
        pipeline.check_words_alone()?;
        pipeline.check_num_tokens(config.num_tokens)?;
        let [_, channels, h, w] = first.latents_a.dims();
        let device = first.latents_a.device();
        let drawn = Drawn {
            seed: config.seed,
            pairs: pairs.len(),
            samples: config.samples_per_step,
            latent_shape: [channels, h, w],
            noising: pipeline.noising().clone(),
            device: device.clone(),
        };
        let selection = match config.select_every {
            0 => Vec::new(),
            _ => drawn.selection_set(config.select_samples),
        };
        let source = match &records.replay {
            None => Source::Drawn(drawn),
            Some(path) => {
                let shape = drawn.noise_shape();
                let replay = Replay::read(path, config.steps, shape, pipeline.noising())?;
                Source::Replayed(replay, device.clone())
            }
        };
        let clip = clip_losses(pipeline, joints, pairs, config)?;
        let movers = (pipeline.learned_encoders().iter())
            .map(|encoder| Mover::new(&Vocabulary::of(&encoder.own_table()), config))
            .collect();
        Ok(Self {
            pipeline,
            pairs,
            config,
            records,
            identity: Identity::new(pipeline, pairs, config, records.replay.as_deref())?,
            clip,
            source,
            selection,
            movers,
        })
    }

    /// The state at the start of the run: its checkpoint's, or D̃ as initialised by the settings and then led by
    /// the CLIP loss.
    fn first_state(&self, observer: Observer<'_>) -> Result<State> {
        let device = self.pipeline.device();
        let loss_scale = LossScale::new(self.pipeline.dtype());
        if let Some(path) = &self.records.resume {
            let state = State::load(path, &self.identity, loss_scale, device)?;
            if state.step > self.config.steps {
                return Err(Error::Setting {
                    name: "steps",
                    expected: format!("at least {}, where the checkpoint is", state.step),
                    found: self.config.steps.to_string(),
                });
            }
            return Ok(state);
        }
        let n = self.config.num_tokens;
        let tokens = match &self.config.initialisation {
            start @ (Initialisation::Zero | Initialisation::Random) => {
                let mut rng = rng(self.config.seed, Purpose::Initialise, 0);
                let is_random = *start == Initialisation::Random;
                (self.pipeline.learned_encoders().iter())
                    .map(|encoder| {
                        let table = encoder.own_table().cast(DType::F32);
                        let shape = [n, table.dims()[1]];
                        if !is_random && !encoder.reads_directions() {
                            return Tensor::zeros(shape, (device, DType::F32));
                        }
                        let deviation = f64::from(host(table.var(0).mean().sqrt())[0]);
                        normal(&mut rng, shape, device) * deviation
                    })
                    .collect()
            }
            Initialisation::Word(word) => (self.pipeline.learned_encoders().iter())
                .map(|encoder| {
                    let ids = encoder.tokenizer().encode(word)?;
                    if ids.is_empty() {
                        return Err(Error::Setting {
                            name: "initialisation",
                            expected: "a word".to_owned(),
                            found: format!("`{word}`"),
                        });
                    }
                    let ids: Vec<u32> = ids.iter().copied().cycle().take(n).collect();
                    Ok(encoder.embed_tokens(&ids)?.cast(DType::F32))
                })
                .collect::<Result<_>>()?,
        };
        let mut state = State::new(tokens, loss_scale);
        self.lead_by_clip(&mut state, observer)?;
        Ok(state)
    }

    /// The number of steps down the CLIP loss alone.
    fn led(&self) -> usize {
        match self.config.lambda_clip > 0.0 {
            true => self.config.clip_first,
            false => 0,
        }
    }

    /// Makes `clip_first` steps down the CLIP loss alone, which needs no denoiser. The optimiser's moments stay
    /// for the steps that follow.
    fn lead_by_clip(&self, state: &mut State, observer: Observer<'_>) -> Result<()> {
        let steps = self.led();
        for step in 0..steps {
            progress::step(&mut *observer, Stage::LearnClip, step, steps)?;
            let clip = self.clip_at(step)?;
            self.descend(state, step, |tokens| {
                Ok(loss::clip(&clip, tokens)? * self.config.lambda_clip)
            })?;
        }
        if steps > 0 {
            progress::step(observer, Stage::LearnClip, steps, steps)?;
            self.checkpoint(state)?;
        }
        Ok(())
    }

    /// The CLIP loss of update `update` in each joint space, counted from the first step down the CLIP loss alone.
    fn clip_at(&self, update: usize) -> Result<Vec<ClipLoss<'a>>> {
        let mut rng = rng(self.config.seed, Purpose::Thin, update);
        (self.clip.iter())
            .map(|loss| loss.with_thinned(self.config, &mut rng))
            .collect()
    }

    /// Runs the remaining steps, until the observer asks to stop, and writes checkpoints.
    fn steps(
        &self,
        state: &mut State,
        mut trace: Option<&mut Trace>,
        observer: Observer<'_>,
    ) -> Result<ControlFlow<()>> {
        let config = self.config;
        let mut watched = self.report(state, observer);
        while watched.is_continue() && state.step < config.steps && !self.is_settled(state) {
            let (draws, terms) = self.step(state)?;
            if let Some(trace) = &mut trace {
                trace.push(&draws, terms, &state.tokens);
            }
            if self.is_judged_at(state.step) {
                self.judge(state)?;
            }
            if state.step.is_multiple_of(config.checkpoint_every.max(1)) {
                self.checkpoint(state)?;
            }
            watched = self.report(state, observer);
        }
        self.checkpoint(state)?;
        Ok(watched)
    }

    /// The loss of a batch. Words are constants: only `tokens` are tracked, if anything is.
    fn objective(
        &self,
        clip: &[ClipLoss<'_>],
        pairs: &[Pair],
        draws: &Draws,
        tokens: &[Tensor<2>],
    ) -> Result<Objective> {
        loss::objective(self.pipeline, clip, pairs, draws, tokens, self.config)
    }

    /// One step of learning: draws timesteps and noise and makes one step down the loss.
    fn step(&self, state: &mut State) -> Result<(Draws, LossTerms)> {
        let draws = self.source.draws(state.step);
        let pairs = augmented(self.pipeline, self.pairs, self.config, state.step)?;
        let mut terms = LossTerms::default();
        let update = self.led() + state.step;
        let clip = self.clip_at(update)?;
        self.descend(state, update, |tokens| {
            let objective = self.objective(&clip, &pairs, &draws, tokens)?;
            terms = objective.terms();
            Ok(objective.total)
        })?;
        state.step += 1;
        state.history.push(terms);
        Ok((draws, terms))
    }

    /// Computes a loss `[1]` and its gradient by D̃, and makes one step of AdamW, its `update`-th from 0. A loss or
    /// update that is not finite leaves the state unchanged.
    fn descend(
        &self,
        state: &mut State,
        update: usize,
        mut loss: impl FnMut(&[Tensor<2>]) -> Result<Tensor<1>>,
    ) -> Result<()> {
        let (mut tokens, mut moments, mut loss_scale) = (
            state.tokens.clone(),
            state.moments.clone(),
            state.loss_scale,
        );
        let gradients = loss_scale.gradients(&state.tokens, |tokens| {
            let loss = loss(tokens)?;
            self.check_finite(host(loss.clone().inner())[0], state)?;
            Ok(loss)
        })?;
        let step = update.saturating_sub(self.led());
        let share = (self.config.learning_rate_schedule).share(step, self.config.steps);
        for (number, gradient) in gradients.into_iter().enumerate() {
            let (parameter, moments) = (tokens[number].clone(), &mut moments[number]);
            let mover = &self.movers[number];
            tokens[number] = mover.step(parameter, gradient, moments, (update, share));
            // A second moment that overflows would freeze the tokens.
            let overflows = moments.second.clone().sum() * 0.0;
            let sum = tokens[number].clone().sum() + overflows;
            self.check_finite(host(sum)[0], state)?;
        }
        (state.tokens, state.moments, state.loss_scale) = (tokens, moments, loss_scale);
        Ok(())
    }

    fn check_finite(&self, number: f32, state: &State) -> Result<()> {
        if number.is_finite() {
            return Ok(());
        }
        Err(Error::Diverged {
            step: state.step,
            checkpoint: self.records.checkpoint.clone().filter(|path| path.exists()),
        })
    }

    /// Whether tokens are judged after `step` steps.
    fn is_judged_at(&self, step: usize) -> bool {
        let every = self.config.select_every;
        every > 0 && (step.is_multiple_of(every) || step == self.config.steps)
    }

    /// Judges the tokens on the fixed set and keeps them if they are the best so far.
    fn judge(&self, state: &mut State) -> Result<()> {
        let (mut sum, mut count) = (0.0, 0.0);
        for draws in &self.selection {
            let weight = draws.timesteps.len() as f32;
            let objective = self.objective(&self.clip, self.pairs, draws, &state.tokens)?;
            sum += objective.terms().total * weight;
            count += weight;
        }
        let loss = sum / count;
        match &mut state.best {
            Some(best) if loss.is_nan() || loss >= best.loss => best.waiting += 1,
            best => {
                *best = Some(Best {
                    tokens: state.tokens.clone(),
                    step: state.step,
                    loss,
                    waiting: 0,
                });
            }
        }
        Ok(())
    }

    /// Whether the tokens have not improved for as long as the settings allow.
    fn is_settled(&self, state: &State) -> bool {
        match (&state.best, self.config.patience) {
            (Some(best), Some(patience)) => best.waiting >= patience,
            _ => false,
        }
    }

    fn report(&self, state: &State, observer: Observer<'_>) -> ControlFlow<()> {
        observer(&Progress::Step {
            stage: Stage::Learn,
            done: state.step,
            total: self.config.steps,
            loss: state.history.last().copied(),
        })
    }

    fn checkpoint(&self, state: &State) -> Result<()> {
        match &self.records.checkpoint {
            Some(path) => state.save(path, &self.identity),
            None => Ok(()),
        }
    }

    fn outcome(&self, state: State) -> Result<Outcome> {
        let (tokens, best_step) = match state.best {
            Some(best) => (best.tokens, best.step),
            None => (state.tokens, state.step),
        };
        let is_zero = |tokens: &Tensor<2>| host(tokens.clone()).iter().all(|value| *value == 0.0);
        if tokens.iter().all(is_zero) {
            return Err(Error::NoDifference {
                reason: "the tokens have stayed zero, as nothing in the loss moves them; see `lambda_mse` and \
                         `lambda_clip`"
                    .to_owned(),
            });
        }
        Ok(Outcome {
            tokens: DifferenceTokens::new(tokens, self.identity.base.clone())?,
            best_step,
            history: state.history,
        })
    }
}

/// The CLIP loss in each joint space; in the states of each text encoder for a family that has none.
fn clip_losses<'a>(
    pipeline: &'a Pipeline,
    joints: &'a [JointSpace],
    pairs: &[Pair],
    config: &LearnConfig,
) -> Result<Vec<ClipLoss<'a>>> {
    if config.lambda_clip == 0.0 {
        return Ok(Vec::new());
    }
    let losses: Vec<_> = match pipeline.family().has_joint_space() {
        true => (joints.iter().enumerate())
            .map(|(number, joint)| ClipLoss::new(joint, number, pairs, config))
            .collect::<Result<_>>()?,
        false => (pipeline.learned_encoders().iter().enumerate())
            .filter_map(|(number, encoder)| {
                ClipLoss::of_captions(encoder, number, pairs, config).transpose()
            })
            .collect::<Result<_>>()?,
    };
    if losses.is_empty() {
        return Err(Error::Missing {
            what: "a joint space".to_owned(),
            reason: "the CLIP loss needs one, or prompts of A and A′ that differ; a weight of 0 leaves it out"
                .to_owned(),
        });
    }
    Ok(losses)
}

/// Tokens with the norm of each row limited to `bound`.
fn bounded(tokens: Tensor<2>, bound: Option<f64>) -> Tensor<2> {
    let Some(bound) = bound else { return tokens };
    let most = tokens.clone().abs().max_dim(1).clamp_min(f32::MIN_POSITIVE); // no square overflows
    let norms = (tokens.clone() / most.clone())
        .powi_scalar(2)
        .sum_dim(1)
        .sqrt()
        * most; // [n, 1]
    let scale = norms.clamp_min(bound).recip() * bound;
    tokens * scale
}

/// How large the token embeddings of a text encoder are.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Vocabulary {
    /// The root mean square of their coordinates.
    root_mean_square: f64,
    /// The median of their norms.
    median_norm: f64,
}

impl Vocabulary {
    /// Of a table [vocabulary, d], a part at a time: some have a billion numbers.
    fn of(table: &Tensor<2>) -> Self {
        const ROWS: usize = 4096;
        let [rows, width] = table.dims();
        let mut norms = Vec::with_capacity(rows);
        for start in (0..rows).step_by(ROWS) {
            let part = table.clone().slice([start..rows.min(start + ROWS)]);
            norms.extend(host(part.cast(DType::F32).powi_scalar(2).sum_dim(1).sqrt()));
        }
        let squares: f64 = norms.iter().map(|norm| f64::from(*norm).powi(2)).sum();
        norms.sort_by(f32::total_cmp);
        Self {
            root_mean_square: (squares / (rows * width).max(1) as f64).sqrt(),
            median_norm: norms.get(norms.len() >> 1).copied().map_or(0.0, f64::from),
        }
    }
}

/// How the tokens of a text encoder are moved.
#[derive(Debug)]
struct Mover {
    optimiser: AdamW,
    /// The bound on the norm of each token.
    bound: Option<f64>,
}

impl Mover {
    fn new(vocabulary: &Vocabulary, config: &LearnConfig) -> Self {
        let usual = RELATIVE_LEARNING_RATE * vocabulary.root_mean_square;
        let learning_rate = config.learning_rate.unwrap_or(usual);
        Self {
            optimiser: AdamW::new(learning_rate, config.weight_decay),
            bound: config.max_norm.map(|norms| norms * vocabulary.median_norm),
        }
    }

    /// One update with a share of the learning rate; updates count from 0.
    fn step(
        &self,
        tokens: Tensor<2>,
        gradient: Tensor<2>,
        moments: &mut Moments<2>,
        (update, share): (usize, f64),
    ) -> Tensor<2> {
        let optimiser = AdamW {
            learning_rate: self.optimiser.learning_rate * share,
            ..self.optimiser
        };
        let moved = optimiser.step(tokens, gradient, moments, update);
        bounded(moved, self.bound)
    }
}

/// The name of text encoder `number`'s array: `name` for the first, then `name.1`.
fn per_encoder(name: &str, number: usize) -> String {
    match number {
        0 => name.to_owned(),
        _ => format!("{name}.{number}"),
    }
}
