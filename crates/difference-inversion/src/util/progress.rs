//! Progress reports to the caller, and the caller's way to stop the work.

use std::fmt;
use std::ops::ControlFlow;

use image::RgbImage;
use serde::{Deserialize, Serialize};

/// The kinds of long work, in the order in which an analogy goes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Stage {
    /// Downloading a model's files from the Hub; its steps are bytes.
    Download,
    /// Reading pictures.
    Read,
    /// Writing captions for pictures.
    Caption,
    /// Searching for an optimised prompt.
    OptimisePrompt,
    /// Leading the difference tokens by the CLIP loss alone.
    LearnClip,
    /// Learning the difference tokens.
    Learn,
    /// Inverting a picture to noise.
    Invert,
    /// Denoising.
    Generate,
}

impl Stage {
    /// The unit of its steps.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Download => "bytes",
            Self::Read => "pictures",
            _ => "steps",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Download => "download",
            Self::Read => "reading",
            Self::Caption => "captions",
            Self::OptimisePrompt => "optimised prompts",
            Self::LearnClip => "CLIP steps",
            Self::Learn => "learning",
            Self::Invert => "inversion",
            Self::Generate => "generation",
        })
    }
}

/// The loss of one optimisation step and the terms it is made of, averaged over the batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LossTerms {
    /// λ_mse (after + λ_before before) + λ_clip clip.
    pub total: f32,
    /// The loss of [P_A, +D̃] explaining A′; 0 if λ_mse is 0.
    pub after: f32,
    /// The loss of [P_A′, −D̃] explaining A; 0 if the consistency loss is off
    /// or has no weight.
    pub before: f32,
    /// 1 − cos of the angle between the delta and what the text encoder reads: D̃'s change to the prompts, or D̃
    /// itself, see [`ClipLoss`](crate::method::loss::ClipLoss); 0 if the CLIP loss is off.
    pub clip: f32,
}

/// One message from the library to the observer. As JSON, it is an object whose `type` is `step`, `waiting` or
/// `notice`, with the fields of each; a preview has no JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Progress {
    /// `done` of `total` steps of a stage are finished; the first message of a stage has `done` 0.
    Step {
        /// The stage.
        stage: Stage,
        /// Steps finished so far.
        done: usize,
        /// Steps in total.
        total: usize,
        /// The loss of the step just finished, if the stage has one.
        loss: Option<LossTerms>,
    },
    /// A stage waits for something else, such as a server, and can be stopped meanwhile.
    Waiting {
        /// The stage.
        stage: Stage,
    },
    /// What the picture that is being drawn will look like.
    #[serde(skip)]
    Preview {
        /// The denoiser's present guess of the clean picture: by the autoencoder of previews at most 256 pixels a
        /// side, otherwise in approximate colours, a pixel for every latent.
        picture: RgbImage,
    },
    /// A note for the user.
    Notice {
        /// One lower-case sentence without a full stop.
        message: String,
    },
}

/// The observer, called after every step. [`ControlFlow::Break`] asks to stop, which ends the work
/// with [`Error::Stopped`](crate::Error::Stopped) (learning writes a checkpoint first).
pub type Observer<'a> = &'a mut dyn FnMut(&Progress) -> ControlFlow<()>;

/// Reports a step.
///
/// # Errors
/// [`Error::Stopped`](crate::Error::Stopped) when the observer asks to stop.
pub fn step(observer: Observer<'_>, stage: Stage, done: usize, total: usize) -> crate::Result<()> {
    match observer(&Progress::Step {
        stage,
        done,
        total,
        loss: None,
    }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(crate::Error::Stopped {
            stage,
            done,
            total,
            checkpoint: None,
        }),
    }
}

/// Asks whether to stop.
///
/// # Errors
/// As [`step`].
#[cfg(feature = "hub")]
pub(crate) fn ask(observer: Observer<'_>, stage: Stage) -> crate::Result<()> {
    match observer(&Progress::Waiting { stage }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(crate::Error::Stopped {
            stage,
            done: 0,
            total: 0,
            checkpoint: None,
        }),
    }
}

/// Passes a notice on; a request to stop takes effect at the next step.
pub(crate) fn notice(observer: Observer<'_>, message: impl Into<String>) {
    let message = message.into();
    let _ = observer(&Progress::Notice { message });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_tagged_objects_as_json() {
        let step = |stage, loss| Progress::Step {
            stage,
            done: 3,
            total: 9,
            loss,
        };
        let loss = LossTerms {
            total: 1.5,
            after: 0.25,
            before: 0.125,
            clip: 0.5,
        };
        let notice = Progress::Notice {
            message: "equal captions".to_owned(),
        };
        for (progress, expected) in [
            (
                step(Stage::Learn, Some(loss)),
                json!({
                    "type": "step", "stage": "learn", "done": 3, "total": 9,
                    "loss": { "total": 1.5, "after": 0.25, "before": 0.125, "clip": 0.5 },
                }),
            ),
            (
                step(Stage::OptimisePrompt, None),
                json!({
                    "type": "step", "stage": "optimise-prompt", "done": 3, "total": 9, "loss": null,
                }),
            ),
            (
                notice,
                json!({ "type": "notice", "message": "equal captions" }),
            ),
        ] {
            assert_eq!(serde_json::to_value(&progress).unwrap(), expected);
            let read: Progress = serde_json::from_value(expected).unwrap();
            assert_eq!(read, progress);
        }
    }
}
