//! Replay and trace: the draws and results of each step, for comparing another implementation with this one
//! step by step.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::diffusion::sample::Noising;
use crate::method::learn::per_encoder;
use crate::util::arrays::{Array, Arrays, Values};
use crate::util::files::Existing;
use crate::util::progress::LossTerms;
use crate::util::tensors::host;
use crate::{Error, Result};

/// The metadata key of a trace's first step.
const FIRST_STEP: &str = "first_step";

/// The files of one learning run, all optional.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Records {
    /// The file of checkpoints, each of which atomically replaces the last.
    pub checkpoint: Option<PathBuf>,
    /// Resumes from this checkpoint.
    pub resume: Option<PathBuf>,
    /// Takes timesteps and noise from this safetensors file instead of drawing them; see
    /// [`Replay::read`].
    pub replay: Option<PathBuf>,
    /// Writes timesteps, noise, loss terms and the tokens after each step to this file. It replaces a file that exists
    /// at the start, but not one that appears during the run.
    pub trace: Option<PathBuf>,
}

/// The timesteps and noise of one step.
#[derive(Debug, Clone)]
pub struct Draws {
    /// `[batch]`, times of [`Noising`].
    pub timesteps: Vec<f64>,
    /// [batch, channels, h, w], standard normal.
    pub noise: Tensor<4>,
}

/// Timesteps [steps, batch] and noise [steps, batch, channels, h, w] to use instead of draws.
#[derive(Debug, Clone)]
pub struct Replay {
    timesteps: Vec<Vec<f64>>,
    noise: Vec<f32>,
    shape: [usize; 4],
}

impl Replay {
    /// Reads `timesteps` and `noise` of every step, from step 0 on, from a safetensors file, such as the
    /// trace of a run that was not resumed.
    ///
    /// # Shapes
    /// `noise_shape`: [batch, channels, h, w] of one step of this run.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidFile`] and
    /// [`Error::Tensor`] if the arrays are missing, have other shapes, fewer than `steps` steps, or
    /// timesteps that the schedule does not have, and if the trace is that of a resumed run, which
    /// begins later.
    pub fn read(
        path: &Path,
        steps: usize,
        noise_shape: [usize; 4],
        noising: &Noising,
    ) -> Result<Self> {
        let arrays = Arrays::read(path)?;
        if let Some(first) = arrays
            .metadata
            .get(FIRST_STEP)
            .filter(|first| *first != "0")
        {
            let reason = format!(
                "a replay needs the draws of every step, and this trace begins at step {first}, where \
                 its run was resumed; trace a run from its beginning"
            );
            return Err(Error::invalid_file(path, reason));
        }
        let [batch, channels, h, w] = noise_shape;
        let check = |name: &str, rest: &[usize]| -> Result<&Values> {
            let array = arrays.array(name)?;
            let found = array.shape();
            if found.len() == rest.len() + 1 && found[0] >= steps && found[1..] == *rest {
                return Ok(array.values());
            }
            let expected = format!("shape [at least {steps}, {rest:?}]");
            Err(arrays.wrong(name, &expected, &format!("shape {found:?}")))
        };
        let Values::F32(noise) = check("noise", &[batch, channels, h, w])? else {
            return Err(arrays.wrong("noise", "floating-point numbers", "integers"));
        };
        let timesteps = times(check("timesteps", &[batch])?);
        for &time in &timesteps {
            if let Err(expected) = noising.check_time(time) {
                return Err(arrays.wrong("timesteps", &expected, &time.to_string()));
            }
        }
        Ok(Self {
            timesteps: timesteps.chunks(batch).map(<[f64]>::to_vec).collect(),
            noise: noise.clone(),
            shape: noise_shape,
        })
    }

    /// The record of a step.
    pub(super) fn draws(&self, step: usize, device: &Device) -> Draws {
        let length: usize = self.shape.iter().product();
        let noise = self.noise[step * length..(step + 1) * length].to_vec();
        Draws {
            timesteps: self.timesteps[step].clone(),
            noise: Tensor::from_data(TensorData::new(noise, self.shape), (device, DType::F32)),
        }
    }
}

/// Times as recorded: whole ones as integers.
fn times(values: &Values) -> Vec<f64> {
    match values {
        Values::I64(values) => values.iter().map(|&time| time as f64).collect(),
        Values::F32(values) => values.iter().map(|&time| f64::from(time)).collect(),
    }
}

/// The inverse of [`times`].
fn recorded(shape: [usize; 2], times: &[f64]) -> Array {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "whole, or f32 from the start"
    )]
    match times.iter().all(|time| time.fract() == 0.0) {
        true => Array::integers(shape, times.iter().map(|&time| time as i64).collect()),
        false => Array::floats(shape, times.iter().map(|&time| time as f32).collect()),
    }
}

/// Everything drawn and computed, step by step.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// The number of the first recorded step, counted from 0; not 0 after a resume.
    first_step: usize,
    timesteps: Vec<f64>,
    noise: Vec<f32>,
    noise_shape: [usize; 4],
    terms: Vec<LossTerms>,
    /// The tokens after each step, for each text encoder.
    tokens: Vec<Vec<f32>>,
    token_shapes: Vec<[usize; 2]>,
}

impl Trace {
    /// An empty trace that starts at a step.
    pub(super) fn new(first_step: usize) -> Self {
        Self {
            first_step,
            ..Self::default()
        }
    }

    /// The trace that an interrupted run left at `path`, to continue after step `step` with `tokens`; an
    /// empty one that starts there if there is none.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`] if it cannot be read, belongs to another run, or ends too
    /// early.
    pub(super) fn going_on(path: &Path, step: usize, tokens: &[Tensor<2>]) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::new(step));
        }
        let arrays = Arrays::read(path)?;
        let unfit = || {
            let reason = format!(
                "expected the trace of the interrupted run, up to its step {step}, found another one; \
                 name another file, or remove this one"
            );
            Error::invalid_file(path, reason)
        };
        let first_step = arrays.metadata.get(FIRST_STEP);
        let first_step = first_step.and_then(|first| first.parse().ok());
        let first_step: usize = first_step
            .filter(|&first| first <= step)
            .ok_or_else(unfit)?;
        let steps = step - first_step;
        if steps == 0 {
            return Ok(Self::new(step)); // nothing was recorded, no tokens either
        }
        // Of an array [steps, ...]: the shape after the first axis, and the values of the steps.
        let floats = |name: &str| match arrays
            .array(name)
            .map(|array| (array.shape(), array.values()))
        {
            Ok(([found, rest @ ..], Values::F32(values))) if *found >= steps => {
                let len = steps * rest.iter().product::<usize>();
                Ok((rest.to_vec(), values[..len].to_vec()))
            }
            _ => Err(unfit()),
        };
        let (noise_shape, noise) = floats("noise")?;
        let noise_shape: [usize; 4] = noise_shape.try_into().map_err(|_| unfit())?;
        let timesteps = arrays.array("timesteps").map_err(|_| unfit())?;
        let mut timesteps = times(timesteps.values());
        if timesteps.len() < steps * noise_shape[0] {
            return Err(unfit());
        }
        timesteps.truncate(steps * noise_shape[0]);
        let [loss, after, before, clip] =
            ["loss", "after", "before", "clip"].map(|name| Ok(floats(name)?.1));
        let (loss, after, before, clip): (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>) =
            (loss?, after?, before?, clip?);
        let terms = (0..steps).map(|step| LossTerms {
            total: loss[step],
            after: after[step],
            before: before[step],
            clip: clip[step],
        });
        let terms = terms.collect();
        let mut recorded = Vec::new();
        for (number, tokens) in tokens.iter().enumerate() {
            let (shape, values) = floats(&per_encoder("tokens", number))?;
            let last = host(tokens.clone());
            if shape != tokens.dims() || !values.ends_with(&last) {
                return Err(unfit());
            }
            recorded.push(values);
        }
        Ok(Self {
            first_step,
            timesteps,
            noise,
            noise_shape,
            terms,
            tokens: recorded,
            token_shapes: tokens.iter().map(Tensor::dims).collect(),
        })
    }

    /// Records a step: its draws, its loss, and the tokens after it.
    pub(super) fn push(&mut self, draws: &Draws, terms: LossTerms, tokens: &[Tensor<2>]) {
        self.timesteps.extend(&draws.timesteps);
        self.noise.extend(host(draws.noise.clone()));
        self.noise_shape = draws.noise.dims();
        self.terms.push(terms);
        self.tokens.resize(tokens.len(), Vec::new());
        self.token_shapes = tokens.iter().map(Tensor::dims).collect();
        for (record, tokens) in self.tokens.iter_mut().zip(tokens) {
            record.extend(host(tokens.clone()));
        }
    }

    /// Writes the trace atomically: `timesteps` [steps, batch], `noise` [steps, batch, channels,
    /// h, w], `loss`, `after`, `before` and `clip` `[steps]`, `tokens` [steps, n, d] (`tokens.1`
    /// for a second text encoder). It can be replayed if it begins at step 0.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&self, path: &Path, existing: Existing) -> Result<()> {
        let steps = self.terms.len();
        let [batch, channels, h, w] = self.noise_shape;
        let noise_shape = [steps, batch, channels, h, w];
        let term =
            |of: fn(&LossTerms) -> f32| Array::floats([steps], self.terms.iter().map(of).collect());
        let mut arrays = Arrays::default()
            .with_metadata("format", "difference-trace")
            .with_metadata(FIRST_STEP, self.first_step.to_string())
            .with("timesteps", recorded([steps, batch], &self.timesteps))
            .with("noise", Array::floats(noise_shape, self.noise.clone()))
            .with("loss", term(|terms| terms.total))
            .with("after", term(|terms| terms.after))
            .with("before", term(|terms| terms.before))
            .with("clip", term(|terms| terms.clip));
        for (number, (tokens, [n, d])) in self.tokens.iter().zip(&self.token_shapes).enumerate() {
            let array = Array::floats([steps, *n, *d], tokens.clone());
            arrays = arrays.with(per_encoder("tokens", number), array);
        }
        arrays.write_over(path, existing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::sample::{AlphaSchedule, FlowConfig, FlowSchedule, SchedulerConfig};

    fn noising(num_train_timesteps: usize) -> Noising {
        let config = SchedulerConfig {
            num_train_timesteps,
            ..SchedulerConfig::default()
        };
        Noising::Discrete(AlphaSchedule::new(&config, Path::new("x")).unwrap())
    }

    fn trace(first_step: usize) -> Trace {
        let device = Device::flex();
        let mut trace = Trace::new(first_step);
        for step in 0..3 {
            let draws = Draws {
                timesteps: [step, 10 + step].map(|t| t as f64).to_vec(),
                noise: Tensor::full([2, 1, 1, 2], step as f32, &device),
            };
            let tokens = [Tensor::full([1, 3], 0.5, &device)];
            trace.push(&draws, LossTerms::default(), &tokens);
        }
        trace
    }

    #[test]
    fn a_trace_can_be_replayed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        trace(0).write(&path, Existing::Replace).unwrap();
        let replay = Replay::read(&path, 3, [2, 1, 1, 2], &noising(20)).unwrap();
        let draws = replay.draws(2, &Device::flex());
        assert_eq!(draws.timesteps, [2.0, 12.0]);
        assert_eq!(host(draws.noise), [2.0; 4]);
        assert_eq!(
            Arrays::read(&path).unwrap().arrays["tokens"].shape(),
            [3, 1, 3]
        );
    }

    #[test]
    fn times_between_steps_are_replayed_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        let flow = FlowSchedule::new(&FlowConfig::default(), Path::new("x")).unwrap();
        let noising = Noising::Flow(flow);
        let timesteps = [0.12345, 0.77].map(|place| noising.time_at(place)).to_vec();
        let draws = Draws {
            timesteps: timesteps.clone(),
            noise: Tensor::zeros([2, 1, 1, 2], &Device::flex()),
        };
        let mut trace = Trace::new(0);
        trace.push(&draws, LossTerms::default(), &[]);
        trace.write(&path, Existing::Replace).unwrap();
        let replay = Replay::read(&path, 1, [2, 1, 1, 2], &noising).unwrap();
        assert_eq!(replay.draws(0, &Device::flex()).timesteps, timesteps);
        let discrete = Replay::read(&path, 1, [2, 1, 1, 2], &self::noising(1000));
        assert!(discrete.unwrap_err().to_string().contains("0..1000"));
    }

    #[test]
    fn a_replay_that_does_not_fit_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        trace(0).write(&path, Existing::Replace).unwrap();
        let error = |steps, shape, timesteps| {
            let result = Replay::read(&path, steps, shape, &noising(timesteps));
            result.unwrap_err().to_string()
        };
        assert!(error(4, [2, 1, 1, 2], 20).contains("at least 4"));
        assert!(error(3, [1, 1, 1, 2], 20).contains("tensor `noise`"));
        assert!(error(3, [2, 1, 1, 2], 12).contains("timesteps in 0..12"));
    }
    #[test]
    fn a_trace_goes_on_where_its_run_was_interrupted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        let tokens = |value| [Tensor::full([1, 3], value, &Device::flex())];
        let steps = |trace: &Trace| (trace.first_step, trace.terms.len());
        // None, and one of a run that was stopped before its first step.
        let begun = Trace::going_on(&path, 0, &tokens(0.0)).unwrap();
        assert_eq!(steps(&begun), (0, 0));
        begun.write(&path, Existing::Replace).unwrap();
        let begun = Trace::going_on(&path, 0, &tokens(0.0)).unwrap();
        assert_eq!(steps(&begun), (0, 0));
        // After its last step, or back at a checkpoint.
        trace(2).write(&path, Existing::Replace).unwrap();
        for (step, count) in [(5, 3), (4, 2), (2, 0)] {
            let going_on = Trace::going_on(&path, step, &tokens(0.5)).unwrap();
            assert_eq!(steps(&going_on), (2, count));
            assert_eq!(going_on.noise.len(), 4 * count);
        }
        // Too short, too late, with other tokens, with another number of tokens.
        let other = [Tensor::full([2, 3], 0.5, &Device::flex())];
        for (step, tokens) in [
            (6, tokens(0.5)),
            (1, tokens(0.5)),
            (5, tokens(0.4)),
            (5, other),
        ] {
            let error = Trace::going_on(&path, step, &tokens)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("the trace of the interrupted run"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_trace_of_a_resumed_run_is_not_replayed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.safetensors");
        trace(7).write(&path, Existing::Replace).unwrap();
        let error = Replay::read(&path, 3, [2, 1, 1, 2], &noising(20)).unwrap_err();
        assert!(error.to_string().contains("begins at step 7"), "{error}");
    }
}
