//! `dinv doctor`: reports on the device, the memory and the model files.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use clap::Args;
use difference_inversion::Error;
use difference_inversion::diffusion::family::{Family, STABLE_DIFFUSION};
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::model_files::{ModelFiles, SCHEDULER, tokenizer_of};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::models::captioner::CaptionerPlace;
use difference_inversion::util::machine::peak_memory;
use difference_inversion::vector_instructions;
use difference_inversion::weights::Weights;
use serde::Serialize;
use sysinfo::System;

use super::flags::{General, ModelSettings};
use super::terminal::Failure;
use super::{device, fetch, locate, memory, terminal};

/// Check the device, the memory and the model files
#[derive(Debug, Args)]
#[command(after_help = "Example:
  dinv doctor --model ~/stable-diffusion-v1-5")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    general: General,
}

/// Everything `dinv doctor` reports.
#[derive(Debug, Serialize)]
pub(super) struct Findings {
    program: String,
    device: String,
    devices_built_in: Vec<&'static str>,
    threads: usize,
    /// The vector instructions in use.
    simd: Option<&'static str>,
    memory: Memory,
    learning: Vec<memory::Way>,
    model: Option<PathBuf>,
    components: Vec<Component>,
    /// The problems, each with what to do about it.
    problems: Vec<String>,
}

/// Memory in MiB.
#[derive(Debug, Serialize)]
struct Memory {
    total: u64,
    available: u64,
    /// Peak use of this process.
    peak: Option<u64>,
}

/// A part of the model.
#[derive(Debug, Serialize)]
struct Component {
    name: String,
    needed_for: &'static str,
    folder: PathBuf,
    /// Size of its weights in bytes, or its problem.
    state: Result<u64, String>,
}

/// Reports what was found. A missing part is a finding, not a failure, unless it is the whole model.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let models: ModelSettings = args.general.settings(&[&args.model])?.resolve()?;
    let findings = examine(&models);
    if args.general.json {
        terminal::json(&findings)?;
    } else {
        print(&findings)?;
    }
    if findings.model.is_some() {
        return Ok(());
    }
    let message = match findings.learning.is_empty() {
        true => "the model cannot be used as it is",
        false => "the model is not on this disk; the memory is an estimate",
    };
    Err(Failure::new(message).into())
}

pub(super) fn examine(models: &ModelSettings) -> Findings {
    let mut problems = Vec::new();
    if let Err(error) = models.device().and_then(|_| models.dtype()) {
        problems.push(error.to_string());
    }
    let (model, components, learning) = match fetch::on_disk(models) {
        Ok((paths, absent)) => {
            problems.extend(absent.iter().map(|id| {
                let name = locate::called(id);
                format!("{id} is not downloaded; `dinv models pull {name}` downloads it")
            }));
            let learning = match paths.files() {
                Ok(files) if fetch::learns(&files) => memory::ways(&paths),
                _ => Vec::new(),
            };
            (Some(paths.model.clone()), components(&paths), learning)
        }
        Err(error) => {
            let hint = match terminal::hint(&error) {
                Some(hint) => format!("{error}; {hint}"),
                None => format!("{error:#}"),
            };
            // What is wrong with the device keeps the model from being looked for.
            problems.extend(problems.is_empty().then_some(hint));
            let known = models.model.as_deref().and_then(locate::known);
            let resolution = models.file_options().ok();
            let resolution = resolution.and_then(|options| options.resolution);
            let learning = known.map_or_else(Vec::new, |known| {
                memory::ways_of_known(known.name, resolution)
            });
            (None, Vec::new(), learning)
        }
    };
    let simd = vector_instructions();
    if simd.is_none() {
        problems.push(
            "the processor has none of the vector instructions that this program uses (AVX2 and FMA, or \
             NEON); computing on it takes many times as long"
                .to_owned(),
        );
    }
    for component in &components {
        if let Err(reason) = &component.state {
            problems.push(format!(
                "{} ({}): {reason}",
                component.name, component.needed_for
            ));
        }
    }
    Findings {
        program: format!("{} {}", env!("CARGO_BIN_NAME"), env!("CARGO_PKG_VERSION")),
        device: models.device_name().to_owned(),
        devices_built_in: device::built_in().collect(),
        threads: rayon::current_num_threads(),
        simd,
        memory: memory_here(),
        learning,
        model,
        components,
        problems,
    }
}

/// The parts of a model that the program uses.
fn components(paths: &ModelPaths) -> Vec<Component> {
    let single = paths.model.is_file();
    let part = |name: &str| match single {
        true => paths.model.clone(),
        false => paths.model.join(name),
    };
    let files = paths.files().map_err(|error| error.to_string());
    let mut parts = Vec::new();
    let mut add = |name, needed_for, folder: PathBuf, state| {
        parts.push(Component {
            name,
            needed_for,
            folder,
            state,
        });
    };
    let drawing = "every picture";
    let family = files.as_ref().ok().and_then(|files| Family::of(files).ok());
    let family = family.unwrap_or(&STABLE_DIFFUSION);
    let there = files.as_ref().ok();
    let there = there.and_then(|files| family.networks_in(files).ok());
    // A missing network is listed as such.
    let networks = there.unwrap_or_else(|| family.networks().collect());
    for &name in &networks {
        add(
            name.to_owned(),
            drawing,
            part(name),
            network_size(&files, name),
        );
    }
    if let Ok(files) = &files {
        let fit = Pipeline::check_adapters(files).map_err(|error| error.to_string());
        for file in files.loras() {
            let size = || sum_of_sizes(&[file.to_owned()]);
            let state = fit.clone().and_then(|()| size());
            add("lora".to_owned(), drawing, file.to_owned(), state);
        }
    }
    let encoders = family.text_encoders.iter();
    let encoders = encoders.filter(|encoder| networks.contains(&encoder.part));
    for encoder in encoders.take(if single { 1 } else { usize::MAX }) {
        let name = tokenizer_of(encoder.part);
        let vocabulary = files
            .as_ref()
            .ok()
            .and_then(|files| files.vocabulary(encoder.part).ok());
        let folder = vocabulary.map_or_else(|| part(&name), |vocabulary| vocabulary.folder);
        let state = size_of(&folder, encoder.kind.vocabularies());
        add(name, drawing, folder, state);
    }
    if !single {
        let folder = part(SCHEDULER);
        let state = size_of(&folder, &[&["scheduler_config.json"]]);
        add(SCHEDULER.to_owned(), drawing, folder, state);
    }
    if files.is_ok_and(|files| !fetch::learns(&files)) {
        return parts;
    }
    let clip_folders = family.has_joint_space().then(|| paths.clip_folders());
    for folder in clip_folders.into_iter().flatten() {
        let state = weights_size(&folder);
        add("clip".to_owned(), "learning", folder, state);
    }
    let (folder, state) = match paths.captioner_place() {
        CaptionerPlace::Folder(folder) => (folder.clone(), weights_size(&folder)),
        CaptionerPlace::Server(served) => {
            let answers = served.models().and_then(|_| served.clone().with_model());
            let state = answers.map(|_| 0).map_err(|error| in_words(&error));
            (PathBuf::from(served.address().to_string()), state)
        }
    };
    add(
        "captioner".to_owned(),
        "captions; without it, give your own",
        folder,
        state,
    );
    parts
}

/// Size of the weights of one network.
fn network_size(files: &Result<ModelFiles, String>, network: &str) -> Result<u64, String> {
    let files = files.as_ref().map_err(Clone::clone)?;
    let weights = files.weights(network, &Device::flex(), FloatDType::F32);
    let weights = weights.map_err(|error| error.to_string())?;
    let config = files.config_path(network);
    match config.is_file() {
        true => Ok(weights.bytes()),
        false => Err(format!("{} is missing", config.display())),
    }
}

/// An error with what can be done about it.
fn in_words(error: &Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// Size of the weights in a folder.
fn weights_size(folder: &Path) -> Result<u64, String> {
    if !folder.is_dir() {
        return Err(format!("{} is missing", folder.display()));
    }
    if !folder.join("config.json").is_file() {
        return Err(format!("{}/config.json is missing", folder.display()));
    }
    let weights = Weights::open(folder, &Device::flex(), FloatDType::F32);
    Ok(weights.map_err(|error| error.to_string())?.bytes())
}

/// Size of the first complete set of files.
fn size_of(folder: &Path, alternatives: &[&[&str]]) -> Result<u64, String> {
    for names in alternatives {
        let files: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        if files.iter().all(|file| file.is_file()) {
            return sum_of_sizes(&files);
        }
    }
    let wanted: Vec<String> = alternatives
        .iter()
        .map(|names| names.join(" and "))
        .collect();
    Err(format!(
        "{} holds no {}",
        folder.display(),
        wanted.join(", and no ")
    ))
}

fn sum_of_sizes(files: &[PathBuf]) -> Result<u64, String> {
    files
        .iter()
        .map(|file| {
            let metadata = fs::metadata(file);
            metadata
                .map(|data| data.len())
                .map_err(|error| format!("{}: {error}", file.display()))
        })
        .sum()
}

fn memory_here() -> Memory {
    let mut system = System::new();
    system.refresh_memory();
    Memory {
        total: mib(system.total_memory()),
        available: mib(system.available_memory()),
        peak: peak_memory().map(|bytes| bytes.div_ceil(1 << 20)),
    }
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn print(findings: &Findings) -> anyhow::Result<()> {
    let field = |name: &str, value: String| terminal::line(format_args!("{name:<10} {value}"));
    terminal::line(&findings.program)?;
    field(
        "device",
        format!(
            "{} (built in: {})",
            findings.device,
            findings.devices_built_in.join(", ")
        ),
    )?;
    field("threads", findings.threads.to_string())?;
    field("simd", findings.simd.unwrap_or("none").to_owned())?;
    let memory = &findings.memory;
    let peak = memory
        .peak
        .map(|peak| format!(", peak of this check {peak} MiB"));
    field(
        "memory",
        format!(
            "{} MiB, {} MiB available{}",
            memory.total,
            memory.available,
            peak.unwrap_or_default()
        ),
    )?;
    for way in &findings.learning {
        field("learning", way.to_string())?;
    }
    if let Some(model) = &findings.model {
        field("model", model.display().to_string())?;
        for Component {
            name,
            folder,
            state,
            ..
        } in &findings.components
        {
            let state = match state {
                Ok(_) if locate::is_address(&folder.to_string_lossy()) => "answers".into(),
                Ok(bytes) => terminal::size(*bytes),
                Err(_) => "missing".into(),
            };
            let elsewhere = match *folder == model.join(name) {
                true => String::new(),
                false => format!("  {}", folder.display()),
            };
            terminal::line(format_args!("  {name:<15} {state:>9}{elsewhere}"))?;
        }
    }
    for problem in &findings.problems {
        terminal::line(format_args!("missing: {problem}"))?;
    }
    if findings.problems.is_empty() {
        terminal::line("everything is in place")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_weights_is_a_finding() {
        let folder = tempfile::tempdir().unwrap();
        let state = weights_size(&folder.path().join("unet"));
        assert!(state.unwrap_err().ends_with("unet is missing"));
        let state = size_of(
            folder.path(),
            &[&["tokenizer.json"], &["vocab.json", "merges.txt"]],
        );
        assert!(
            state
                .unwrap_err()
                .ends_with("no tokenizer.json, and no vocab.json and merges.txt")
        );
    }
}
