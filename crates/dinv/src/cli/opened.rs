//! The models that the last command opened, kept for the next one in the same process.

use std::cell::RefCell;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use difference_inversion::diffusion::frozen::{ModelPaths, Models};

/// What opened models depend on.
#[derive(Debug, PartialEq)]
pub(crate) struct Source {
    paths: ModelPaths,
    /// The settings of the device: its name, the number format, and whether memory is saved.
    settings: [String; 3],
    files: Vec<Stamp>,
}

/// A file, and what changes with its contents.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    /// When its contents changed.
    modified: Option<SystemTime>,
    /// Which file it is, and when anything about it changed: tools that copy a file may set the other time.
    identity: [i64; 4],
}

/// How deep a model's folder is looked into.
const DEPTH: usize = 4;

thread_local! {
    static KEPT: RefCell<Option<(Source, Rc<Models>)>> = const { RefCell::new(None) };
}

impl Source {
    /// The source of the models at `paths`, as their files are now.
    pub(crate) fn new(paths: &ModelPaths, settings: [&str; 3]) -> Self {
        let options = &paths.options;
        let loras = options.loras.iter().map(|file| file.path.clone());
        let embeddings = options.embeddings.iter().map(|file| file.path.clone());
        let networks = options
            .unet
            .iter()
            .chain(&options.vae)
            .chain(&options.preview_vae);
        let others = options.text_encoders.iter().chain(&options.tokenizer);
        let given = networks.chain(others).chain([&paths.model]).cloned();
        let beside = paths.captioner_folder().into_iter();
        let beside = beside.chain(paths.clip_folders());
        let mut files = Vec::new();
        let paths_of_all = given.chain(beside).chain(loras).chain(embeddings);
        for path in paths_of_all {
            let path = std::path::absolute(&path).unwrap_or(path);
            stamp(&path, DEPTH, &mut files);
        }
        files.sort();
        files.dedup();
        Self {
            paths: paths.clone(),
            settings: settings.map(str::to_owned),
            files,
        }
    }

    /// The models of this source: those of the last command, or else the ones that `open` opens, for which the last
    /// command's are closed first.
    pub(crate) fn open<E>(self, open: impl FnOnce() -> Result<Models, E>) -> Result<Rc<Models>, E> {
        let kept = KEPT.take().filter(|(source, _)| *source == self);
        let models = match kept {
            Some((_, models)) => models,
            None => Rc::new(open()?),
        };
        KEPT.set(Some((self, Rc::clone(&models))));
        Ok(models)
    }
}

/// Adds the files at `path`, which may be a folder. What cannot be read is left to who opens it.
fn stamp(path: &Path, depth: usize, files: &mut Vec<Stamp>) {
    let Ok(found) = std::fs::metadata(path) else {
        return;
    };
    if found.is_dir() {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let Some(depth) = depth.checked_sub(1) else {
            return;
        };
        let is_hidden = |path: &Path| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with('.')
        };
        let paths = entries.map(|entry| entry.path());
        let paths = paths.filter(|path| !is_hidden(path));
        return paths.for_each(|path| stamp(&path, depth, files));
    }
    files.push(Stamp {
        path: path.to_owned(),
        bytes: found.len(),
        modified: found.modified().ok(),
        identity: identity(&found),
    });
}

/// The device, the number and the time of the last change of a file.
#[cfg(unix)]
fn identity(file: &Metadata) -> [i64; 4] {
    use std::os::unix::fs::MetadataExt;
    let [device, number] = [file.dev(), file.ino()].map(u64::cast_signed);
    [device, number, file.ctime(), file.ctime_nsec()]
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> [i64; 4] {
    [0; 4]
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use burn::tensor::{Device, FloatDType};

    use super::*;

    /// A folder that holds itself twice is left after a few levels.
    #[cfg(unix)]
    #[test]
    fn a_folder_that_holds_itself_ends() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            std::os::unix::fs::symlink(folder.path(), folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let mut files = Vec::new();
        stamp(folder.path(), DEPTH, &mut files);
        assert_eq!(files.len(), (1 << DEPTH) - 1);
    }

    /// Models are opened again when a file, a path or the device's settings change, and only then.
    #[test]
    fn models_are_kept_as_long_as_nothing_changes() {
        let folder = tempfile::tempdir().unwrap();
        let golden = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/learning"
        ));
        let paths = ModelPaths {
            model: folder.path().to_owned(),
            ..ModelPaths::default()
        };
        let config = folder.path().join("unet");
        std::fs::create_dir(&config).unwrap();
        let config = config.join("config.json");
        std::fs::write(&config, "{}").unwrap();
        let mut opened = 0;
        let mut open = |paths: &ModelPaths, settings| {
            let models = Source::new(paths, settings).open(|| {
                opened += 1;
                let real = ModelPaths {
                    model: golden.to_owned(),
                    ..ModelPaths::default()
                };
                Ok::<_, Infallible>(Models::open(&real, &Device::flex(), FloatDType::F32).unwrap())
            });
            models.unwrap();
            opened
        };
        let cpu = ["cpu", "f32", "normal"];
        assert_eq!(open(&paths, cpu), 1);
        assert_eq!(open(&paths, cpu), 1);
        assert_eq!(open(&paths, ["cpu", "f32", "low"]), 2);
        assert_eq!(open(&paths, cpu), 3);
        std::fs::write(&config, "{ }").unwrap();
        assert_eq!(open(&paths, cpu), 4);
        // As `cp -p` leaves it: other contents, the same size and time.
        let time = std::fs::metadata(&config).unwrap().modified().unwrap();
        std::fs::write(&config, "{\t}").unwrap();
        let file = std::fs::File::options().append(true).open(&config).unwrap();
        file.set_modified(time).unwrap();
        if cfg!(unix) {
            assert_eq!(open(&paths, cpu), 5);
        }
        let before = open(&paths, cpu);
        let mut other = paths.clone();
        other.options.clip_skip = 1;
        assert_eq!(open(&other, cpu), before + 1);
        assert_eq!(open(&other, cpu), before + 1);
    }
}
