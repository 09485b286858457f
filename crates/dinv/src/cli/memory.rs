//! Whether there is enough memory to learn.

use std::fmt;
use std::path::Path;

use burn::tensor::FloatDType;
use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::method::delta::DeltaMode;
use difference_inversion::method::learn::LearnConfig;
use difference_inversion::models::denoiser::Memory;
use serde::Serialize;
use sysinfo::{Pid, ProcessesToUpdate, System};

use super::flags::{ModelSettings, Q8};
use super::terminal::{Failure, size};

/// The approximate memory of one way to learn.
#[derive(Debug, Serialize)]
pub(crate) struct Way {
    pub(crate) dtype: &'static str,
    pub(crate) memory: &'static str,
    /// In MiB.
    pub(crate) peak: u64,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            dtype,
            memory,
            peak,
        } = self;
        write!(f, "about {peak} MiB with --dtype {dtype} --memory {memory}")
    }
}

/// The memory of learning on the CPU from one pair with given captions, in every way; empty if the
/// files do not state enough.
pub(crate) fn ways(paths: &ModelPaths) -> Vec<Way> {
    ways_by(|learning| learning.peak(paths).ok())
}

/// The same of a model that is known by name and is not there.
pub(crate) fn ways_of_known(name: &str, resolution: Option<[u32; 2]>) -> Vec<Way> {
    ways_by(|learning| learning.peak_of_known(name, resolution))
}

fn ways_by(peak: impl Fn(&LearningMemory) -> Option<u64>) -> Vec<Way> {
    let dtypes = [
        ("f32", FloatDType::F32),
        ("f16", FloatDType::F16),
        (Q8, FloatDType::F16),
    ];
    let memories = [("normal", Memory::Normal), ("low", Memory::Low)];
    let ways = (dtypes.into_iter()).flat_map(|dtype| memories.map(|memory| (dtype, memory)));
    let way = |((dtype, as_dtype), (memory, as_memory))| {
        let learning = LearningMemory {
            dtype: as_dtype,
            q8: dtype == Q8,
            memory: as_memory,
            rows: 2,
            side: None,
            captions: false,
        };
        Some(Way {
            dtype,
            memory,
            peak: peak(&learning)? >> 20,
        })
    };
    ways.filter_map(way).collect()
}

/// The part of the memory that should be left to other programs.
#[cfg(feature = "serve")]
const LEFT: f64 = 0.1;

/// The bytes of memory that programs can still use, and those of a process that is about to give up its own.
pub(crate) fn available_with(process: Option<u32>) -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    let process = process.map(Pid::from_u32);
    if let Some(process) = process {
        system.refresh_processes(ProcessesToUpdate::Some(&[process]), false);
    }
    let own = process.and_then(|process| Some(system.process(process)?.memory()));
    let available = system.available_memory() + own.unwrap_or(0);
    available.min(system.total_memory())
}

/// Whether other programs have little memory left.
#[cfg(feature = "serve")]
pub(crate) fn is_scarce() -> bool {
    let mut system = System::new();
    system.refresh_memory();
    (system.available_memory() as f64) < LEFT * system.total_memory() as f64
}

impl ModelSettings {
    /// Whether to save time or memory.
    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        match self.memory.as_deref() {
            None | Some("normal") => Ok(Memory::Normal),
            Some("low") => Ok(Memory::Low),
            Some(other) => {
                let message = format!("memory: expected normal or low, found `{other}`");
                Err(Failure::input(message).into())
            }
        }
    }

    /// Refuses to learn from the pictures' CLIP loss alone with a model that has none.
    pub(crate) fn check_loss(&self, model: &Path, config: &LearnConfig) -> anyhow::Result<()> {
        if config.lambda_mse > 0.0 || config.delta != DeltaMode::Image {
            return Ok(());
        }
        if Family::of(&self.files_before_download(model)?)?.has_joint_space() {
            return Ok(());
        }
        let message = "no text encoder of the model was trained with pictures, so none can follow the delta `image`, \
                       and nothing else is in the loss";
        let hint = "leave out `--delta image`, or learn with `--lambda-mse` above 0";
        Err(Failure::usage(message).hint(hint).into())
    }

    /// Refuses learning that does not fit into the available memory, given the number of pairs and whether the
    /// captioner is needed. Nothing is refused on a GPU, or if the files do not state enough.
    pub(crate) fn check_memory(
        &self,
        paths: &ModelPaths,
        config: &LearnConfig,
        pairs: usize,
        captions: bool,
    ) -> anyhow::Result<()> {
        let peak = |dtype, q8, memory| {
            let learning = LearningMemory {
                dtype,
                q8,
                memory,
                rows: config.rows(pairs),
                side: config.learn_resolution,
                captions,
            };
            learning.peak(paths).ok()
        };
        let (dtype, q8, memory) = (self.dtype()?, self.is_q8(), self.memory()?);
        // What this process holds are the models of an earlier command, which are used again or closed.
        let available = available_with(Some(std::process::id()));
        let needed = match peak(dtype, q8, memory) {
            Some(needed) if self.device_name() == "cpu" && needed > available => needed,
            _ => return Ok(()),
        };
        let ways = [
            ("--memory low", dtype, q8, Memory::Low),
            ("--dtype f16", FloatDType::F16, false, memory),
            (
                "--memory low --dtype f16",
                FloatDType::F16,
                false,
                Memory::Low,
            ),
            ("--dtype q8", FloatDType::F16, true, memory),
            (
                "--memory low --dtype q8",
                FloatDType::F16,
                true,
                Memory::Low,
            ),
        ];
        let fits = (ways.into_iter()).find_map(|(flags, dtype, q8, memory)| {
            let needed = peak(dtype, q8, memory).filter(|&needed| needed <= available)?;
            Some(format!("`{flags}` needs about {}; ", size(needed)))
        });
        let message = format!(
            "learning needs about {} of memory, and {} are available",
            size(needed),
            size(available)
        );
        let fits = fits.unwrap_or_default();
        let hint = format!("{fits}`--no-memory-check` tries it regardless");
        Err(Failure::temporary(message).hint(hint).into())
    }
}
