//! The checkpoint of an interrupted run, and resuming from it.

use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::method::learn::Records;

use super::flags::TimeFlag;
use super::terminal::Failure;

/// Whether a run resumes from its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resume {
    Never,
    /// It has to be there.
    Must,
    /// The same command is started again and again.
    IfThere,
}

impl Resume {
    /// As the flags say.
    pub(crate) fn of(resume: bool, time: TimeFlag) -> Self {
        match (resume, time.is_limited()) {
            (_, true) => Self::IfThere,
            (true, false) => Self::Must,
            (false, false) => Self::Never,
        }
    }
}

/// Name of the checkpoint in an output folder.
pub(crate) const NAME: &str = "checkpoint.safetensors";

/// The checkpoint of an output file: `x.checkpoint.safetensors` for `x.safetensors`, and
/// `lr0.01.checkpoint` for `lr0.01`. It is different for every output.
pub(crate) fn beside(output: &Path) -> PathBuf {
    match output.extension() {
        Some(extension) if extension == "safetensors" => output.with_extension(NAME),
        _ => {
            let mut name = output.file_name().unwrap_or_default().to_owned();
            name.push(".checkpoint");
            output.with_file_name(name)
        }
    }
}

/// The checkpoints of a learning run, and whether it resumes from one. An existing checkpoint is neither
/// ignored nor silently overwritten. One of other pictures or settings is refused when it is read.
pub(crate) fn records(
    checkpoint: &Path,
    resume: Resume,
    overwrite: bool,
) -> Result<Records, Failure> {
    let exists = checkpoint.exists();
    let resume = match resume {
        Resume::Never => false,
        Resume::Must => true,
        Resume::IfThere => exists,
    };
    if resume && !exists {
        let message = format!(
            "{}: there is no checkpoint to resume from",
            checkpoint.display()
        );
        return Err(
            Failure::usage(message).hint("leave `--resume` out to start from the beginning")
        );
    }
    if exists && !resume && !overwrite {
        let message = format!(
            "{}: an interrupted run left a checkpoint",
            checkpoint.display()
        );
        return Err(Failure::usage(message)
            .hint("resume from it with `--resume`, or start again with `--overwrite`"));
    }
    Ok(Records {
        checkpoint: Some(checkpoint.to_owned()),
        resume: resume.then(|| checkpoint.to_owned()),
        ..Records::default()
    })
}

/// The error of a stopped run; it names the checkpoint also if the run stopped after learning.
pub(crate) fn named(error: Error, path: &Path) -> Error {
    match error {
        Error::Stopped {
            stage,
            done,
            total,
            checkpoint: None,
        } if path.exists() => Error::Stopped {
            stage,
            done,
            total,
            checkpoint: Some(path.to_owned()),
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_checkpoint_is_only_used_or_replaced_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = beside(&folder.path().join("x.safetensors"));
        assert!(path.ends_with("x.checkpoint.safetensors"));
        let refused = |resume| records(&path, resume, false).unwrap_err().to_string();
        assert!(refused(Resume::Must).ends_with("there is no checkpoint to resume from"));
        for resume in [Resume::Never, Resume::IfThere] {
            assert_eq!(records(&path, resume, false).unwrap().resume, None);
        }
        fs::write(&path, "").unwrap();
        assert!(refused(Resume::Never).ends_with("an interrupted run left a checkpoint"));
        assert_eq!(records(&path, Resume::Never, true).unwrap().resume, None);
        for resume in [Resume::Must, Resume::IfThere] {
            let found = records(&path, resume, false).unwrap().resume;
            assert_eq!(found, Some(path.clone()));
        }
    }

    #[test]
    fn no_two_outputs_share_a_checkpoint() {
        let outputs = [
            "lr0.01",
            "lr0.001",
            "lr0",
            "lr0.safetensors",
            "lr0.01.safetensors",
            "lr0.SAFETENSORS",
        ];
        let checkpoints = outputs.map(|output| beside(&Path::new("sweep").join(output)));
        let distinct: std::collections::BTreeSet<_> = checkpoints.iter().collect();
        assert_eq!(distinct.len(), outputs.len());
        assert_eq!(checkpoints[0], Path::new("sweep/lr0.01.checkpoint"));
        assert_eq!(
            checkpoints[4],
            Path::new("sweep/lr0.01.checkpoint.safetensors")
        );
    }
}
