//! The state of a learning run, and its checkpoints.

use std::path::Path;

use burn::tensor::{Device, Tensor};

use crate::method::learn::adamw::Moments;
use crate::method::learn::identity::Identity;
use crate::method::learn::per_encoder;
use crate::method::learn::scaling::LossScale;
use crate::util::arrays::{Array, Arrays, Values};
use crate::util::progress::LossTerms;
use crate::{Error, Result};

/// Version of the checkpoint format, in the metadata of every checkpoint.
const FORMAT_VERSION: &str = "3";

/// Everything an optimisation step depends on, except the inputs that are given again on resuming.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// Completed steps.
    pub(super) step: usize,
    /// D̃, one [n, d] per text encoder.
    pub(super) tokens: Vec<Tensor<2>>,
    /// AdamW's moments of each encoder's tokens.
    pub(super) moments: Vec<Moments<2>>,
    /// The loss scale of the next step.
    pub(super) loss_scale: LossScale,
    /// The best tokens so far.
    pub(super) best: Option<Best>,
    /// The loss of every completed step.
    pub(super) history: Vec<LossTerms>,
}

/// The tokens with the lowest loss on the fixed set.
#[derive(Debug, Clone)]
pub(super) struct Best {
    pub(super) tokens: Vec<Tensor<2>>,
    /// The number of steps after which they were reached.
    pub(super) step: usize,
    /// Their loss on the fixed set.
    pub(super) loss: f32,
    /// Evaluations since then.
    pub(super) waiting: usize,
}

impl State {
    /// The state before the first step.
    pub(super) fn new(tokens: Vec<Tensor<2>>, loss_scale: LossScale) -> Self {
        Self {
            step: 0,
            moments: tokens.iter().map(Moments::zeros_like).collect(),
            loss_scale,
            tokens,
            best: None,
            history: Vec::new(),
        }
    }

    /// Writes a checkpoint atomically.
    pub(super) fn save(&self, path: &Path, identity: &Identity<'_>) -> Result<()> {
        let history = (self.history.iter())
            .flat_map(|terms| [terms.total, terms.after, terms.before, terms.clip])
            .collect();
        let [scale_exponent, scale_steps] = self.loss_scale.moment();
        let mut arrays = (identity.mark(Arrays::default()))
            .with_metadata("format", "difference-checkpoint")
            .with_metadata("format_version", FORMAT_VERSION)
            .with_metadata("step", self.step.to_string())
            .with_metadata("loss_scale_exponent", scale_exponent.to_string())
            .with_metadata("loss_scale_steps", scale_steps.to_string())
            .with("history", Array::floats([self.history.len(), 4], history));
        let mut add = |name: &str, number: usize, tensor: &Tensor<2>| {
            let array = Array::from_tensor(tensor.clone());
            arrays.arrays.insert(per_encoder(name, number), array);
        };
        for (number, (tokens, moments)) in self.tokens.iter().zip(&self.moments).enumerate() {
            add("tokens", number, tokens);
            add("first_moment", number, &moments.first);
            add("second_moment", number, &moments.second);
        }
        if let Some(best) = &self.best {
            for (number, tokens) in best.tokens.iter().enumerate() {
                add("best", number, tokens);
            }
            arrays = arrays
                .with_metadata("best_step", best.step.to_string())
                .with_metadata("best_loss", best.loss.to_string())
                .with_metadata("waiting", best.waiting.to_string());
        }
        arrays.write(path)
    }

    /// Reads a checkpoint of the run described by `identity`, which starts with
    /// `loss_scale`.
    pub(super) fn load(
        path: &Path,
        identity: &Identity<'_>,
        loss_scale: LossScale,
        device: &Device,
    ) -> Result<Self> {
        let arrays = Arrays::read(path)?;
        let version = arrays
            .metadata
            .get("format_version")
            .map_or("none", String::as_str);
        if version != FORMAT_VERSION {
            let reason = format!(
                "expected a checkpoint of format version {FORMAT_VERSION}, found {version}; start \
                 again without it"
            );
            return Err(Error::invalid_file(path, reason));
        }
        identity.check(&arrays)?;
        let tensors = |name: &str| -> Result<Vec<Tensor<2>>> {
            (0..identity.base.encoders.len())
                .map(|number| {
                    let name = per_encoder(name, number);
                    let tensor = arrays.tensor::<2>(&name, device)?;
                    let expected = [
                        identity.config.num_tokens,
                        identity.base.encoders[number].hidden_size,
                    ];
                    if tensor.dims() == expected {
                        return Ok(tensor);
                    }
                    let [expected, found] =
                        [expected, tensor.dims()].map(|shape| format!("shape {shape:?}"));
                    Err(arrays.wrong(&name, &expected, &found))
                })
                .collect()
        };
        let moments = (tensors("first_moment")?.into_iter())
            .zip(tensors("second_moment")?)
            .map(|(first, second)| Moments { first, second })
            .collect();
        let best = if arrays.metadata.contains_key("best_step") {
            Some(Best {
                tokens: tensors("best")?,
                step: number(&arrays, "best_step")?,
                loss: number(&arrays, "best_loss")?,
                waiting: number(&arrays, "waiting")?,
            })
        } else {
            None
        };
        let history = history(&arrays)?;
        Ok(Self {
            step: number(&arrays, "step")?,
            tokens: tensors("tokens")?,
            moments,
            loss_scale: loss_scale.at([
                number(&arrays, "loss_scale_exponent")?,
                number(&arrays, "loss_scale_steps")?,
            ]),
            best,
            history,
        })
    }
}

/// The losses of the steps in a checkpoint, in order.
///
/// # Errors
/// [`Error::Io`] and [`Error::InvalidFile`] if the file cannot be read.
pub fn losses(path: &Path) -> Result<Vec<LossTerms>> {
    history(&Arrays::read(path)?)
}

fn history(arrays: &Arrays) -> Result<Vec<LossTerms>> {
    Ok(match arrays.array("history")?.values() {
        Values::F32(values) => values.as_chunks().0.iter().copied().map(terms).collect(),
        Values::I64(_) => Vec::new(),
    })
}

fn terms([total, after, before, clip]: [f32; 4]) -> LossTerms {
    LossTerms {
        total,
        after,
        before,
        clip,
    }
}

/// A number in the metadata.
fn number<T: std::str::FromStr>(arrays: &Arrays, key: &str) -> Result<T> {
    let text = arrays.metadata.get(key).map_or("", String::as_str);
    text.parse().map_err(|_| {
        Error::invalid_file(
            &arrays.path,
            format!("metadata `{key}`: expected a number, found `{text}`"),
        )
    })
}
