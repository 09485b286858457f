//! Output folders and files: checked before the long work by making them, written completely or not at all.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::util::files::{self, Claim, Existing, Set, folder_of};

use super::terminal::{self, Failure};

/// The file extensions of each kind of file.
const ENDINGS: [(&str, &[&str]); 4] = [
    (
        "a picture",
        &[
            "png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif",
            "jxl", "ppm", "svg",
        ],
    ),
    ("safetensors", &["safetensors"]),
    (
        "another format of weights",
        &[
            "pt", "pth", "bin", "ckpt", "pkl", "npz", "npy", "gguf", "onnx",
        ],
    ),
    (
        "text",
        &[
            "json", "jsonl", "toml", "yaml", "yml", "txt", "md", "csv", "html", "log",
        ],
    ),
];

/// The content of an output file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Picture,
    Tensors,
}

/// Files of one folder that appear together, or one by one.
#[derive(Debug)]
pub(crate) struct Outputs {
    folder: PathBuf,
    names: Vec<String>,
    existing: Existing,
    /// Keeps other runs from writing the same files.
    claims: Vec<Claim>,
    /// The folders that were created for this one, outermost first.
    created: Vec<PathBuf>,
    /// The results of a run that was killed while it moved them; they are in place now.
    finished: Vec<String>,
}

impl Outputs {
    /// Creates the folder if needed. Checks that each of the files `names` can be created in it, does not exist
    /// unless it may be overwritten, and is not one of the `inputs`.
    pub(crate) fn folder(
        folder: &Path,
        names: impl IntoIterator<Item = impl Into<String>>,
        overwrite: bool,
        inputs: &[&Path],
    ) -> anyhow::Result<Self> {
        if !folder.exists()
            && let Some((kind, _)) = kind_of(folder)
        {
            let message = format!(
                "{}: expected the name of a folder, found that of {kind}",
                folder.display()
            );
            let failure = Failure::usage(message);
            return Err(failure
                .hint("results are written to a folder, such as `-o results`")
                .into());
        }
        let names = names.into_iter().map(Into::into).collect();
        Self::prepare(folder, names, overwrite, inputs, true)
    }

    /// Checks that a single file can be created: its folder exists, its extension fits its content, it is not one of
    /// the `inputs`, and it does not exist unless it may be overwritten.
    pub(crate) fn file(
        path: &Path,
        kind: Kind,
        overwrite: bool,
        inputs: &[&Path],
    ) -> anyhow::Result<Self> {
        let ends = path.as_os_str().as_encoded_bytes();
        let is_folder = path.is_dir() || ends.ends_with(b"/") || ends.ends_with(b"/.");
        let name = path.file_name().filter(|_| !is_folder);
        let Some(name) = name else {
            let message = format!(
                "{}: expected the name of a file, found a folder",
                path.display()
            );
            let example = match kind {
                Kind::Picture => "picture.png",
                Kind::Tensors => "difference.safetensors",
            };
            let hint = format!("such as `-o {}`", path.join(example).display());
            return Err(Failure::usage(message).hint(hint).into());
        };
        kind.check(path)?;
        let names = vec![unicode(name)?];
        Self::prepare(folder_of(path), names, overwrite, inputs, false)
    }

    fn prepare(
        folder: &Path,
        names: Vec<String>,
        overwrite: bool,
        inputs: &[&Path],
        make: bool,
    ) -> anyhow::Result<Self> {
        let missing: Vec<PathBuf> = folder
            .ancestors()
            .take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists())
            .map(Path::to_owned)
            .collect();
        let existing = match overwrite {
            true => Existing::Replace,
            false => Existing::Keep,
        };
        let mut output = Self {
            folder: folder.to_owned(),
            names,
            existing,
            claims: Vec::new(),
            created: missing.into_iter().rev().collect(),
            finished: Vec::new(),
        };
        output.refuse_inputs(inputs)?;
        if make {
            fs::create_dir_all(folder).map_err(|source| cannot_write(folder, source))?;
        }
        output.finished = files::sweep(folder);
        if !output.finished.is_empty() {
            terminal::message(format_args!(
                "note: an earlier run was killed while it saved its results; they are complete now: {} in {}",
                output.finished.join(", "),
                folder.display()
            ));
        }
        Ok(output)
    }

    /// Removes the files that exist from this set, and returns their names.
    pub(crate) fn leave_out_existing(&mut self) -> Vec<String> {
        let names = std::mem::take(&mut self.names);
        let (there, left) = (names.into_iter()).partition(|name| self.path(name).exists());
        self.names = left;
        there
    }

    /// Checks that nothing is replaced and that every file can be created.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        for name in &self.names {
            let path = self.path(name);
            match fs::symlink_metadata(&path) {
                Ok(_) if self.existing == Existing::Keep => return Err(exists(&path).into()),
                Ok(_) => check_replaceable(&path)?,
                Err(_) => check_makeable(&path)?,
            }
        }
        Ok(())
    }

    /// Keeps other runs from writing the file called `name`, or one that belongs to it, until the end.
    pub(crate) fn claim(&mut self, name: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        let claim = Claim::on(&path).map_err(|error| match error {
            Error::Io { source, .. } => cannot_write(&self.folder, source),
            error => error.into(),
        })?;
        let Some(claim) = claim else {
            let message = format!("{}: another run is writing it", path.display());
            let hint = "wait until it ends, or write elsewhere with `-o`";
            return Err(Failure::temporary(message).hint(hint).into());
        };
        self.claims.push(claim);
        Ok(())
    }

    /// Releases the last claim.
    pub(crate) fn give_back(&mut self) {
        self.claims.pop();
    }

    /// The final path of one of the files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The final paths of all files.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.names.iter().map(|name| self.path(name)).collect()
    }

    /// Whether a run that was killed while it moved its results had all of these.
    pub(crate) fn is_finished(&self) -> bool {
        !self.names.is_empty() && self.names.iter().all(|name| self.finished.contains(name))
    }

    /// Refuses outputs that would replace one of the inputs.
    pub(crate) fn refuse_inputs<P: AsRef<Path>>(&self, inputs: &[P]) -> anyhow::Result<()> {
        let inputs: Vec<PathBuf> = (inputs.iter())
            .filter_map(|input| fs::canonicalize(input).ok())
            .collect();
        for output in self.paths() {
            if fs::canonicalize(&output).is_ok_and(|output| inputs.contains(&output)) {
                let message = format!(
                    "{}: this is one of the inputs, which the result would replace",
                    output.display()
                );
                return Err(Failure::usage(message)
                    .hint("write elsewhere with `-o`")
                    .into());
            }
        }
        Ok(())
    }

    /// Writes all files with `write`, which is given a function from each name to a temporary path. Then moves them
    /// into place together, and removes the file called `spent` in the same folder. Returns their paths.
    pub(crate) fn publish(
        &self,
        spent: Option<&str>,
        write: impl FnOnce(&dyn Fn(&str) -> PathBuf) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<PathBuf>> {
        self.publish_some(&self.names, spent, write)?;
        Ok(self.paths())
    }

    /// As `publish`, for one file.
    pub(crate) fn publish_one(
        &self,
        name: &str,
        write: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.publish_some(&[name.to_owned()], None, |place| write(&place(name)))
    }

    fn publish_some(
        &self,
        names: &[String],
        spent: Option<&str>,
        write: impl FnOnce(&dyn Fn(&str) -> PathBuf) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let set = Set::new(&self.folder)?;
        write(&|name| set.path(name)).map_err(|error| self.in_place(error, &set))?;
        set.publish(names, self.existing, spent)
            .map_err(|error| match error {
                Error::Io { path, source } if source.kind() == ErrorKind::AlreadyExists => {
                    appeared(&path, spent.is_some()).into()
                }
                error => error.into(),
            })
    }

    /// Replaces the hidden path in an error by the final path.
    fn in_place(&self, error: anyhow::Error, set: &Set) -> anyhow::Error {
        match error.downcast::<Error>() {
            Ok(Error::Io { path, source }) => {
                let hidden = set.path("");
                let path = match path.strip_prefix(&hidden) {
                    Ok(name) => self.folder.join(name),
                    Err(_) => path,
                };
                Error::Io { path, source }.into()
            }
            Ok(error) => error.into(),
            Err(error) => error,
        }
    }
}

impl Drop for Outputs {
    /// Removes created folders that stayed empty.
    fn drop(&mut self) {
        self.claims.clear();
        for folder in self.created.iter().rev() {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }
}

impl Kind {
    /// Refuses names whose extension stands for another kind of file.
    fn check(self, path: &Path) -> Result<(), Failure> {
        let (written, ending) = match self {
            Self::Picture => ("pictures are written as PNG", "png"),
            Self::Tensors => (
                "differences and traces are written as safetensors",
                "safetensors",
            ),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if self == Self::Tensors && is_checkpoint(&name) {
            let message = format!("{}: this name is reserved for checkpoints", path.display());
            return Err(Failure::usage(message).hint("choose another name with `-o`"));
        }
        let extension = path.extension().unwrap_or_default();
        let fits = match (self, kind_of(path)) {
            (_, _) if extension.eq_ignore_ascii_case(ending) => true,
            // As in `lr0.01`, which has no real extension.
            (Self::Tensors, None) => true,
            (Self::Picture, None) => extension.is_empty(),
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let name = match kind_of(path) {
            Some(_) => path.with_extension(ending),
            None => path.with_file_name(format!("{name}.{ending}")),
        };
        let message = format!("{}: {written}", path.display());
        Err(Failure::usage(message).hint(format!("call it {}", name.display())))
    }
}

/// Whether a file is named like a checkpoint.
fn is_checkpoint(name: &str) -> bool {
    name == "checkpoint.safetensors"
        || name.ends_with(".checkpoint.safetensors")
        || name.ends_with(".checkpoint")
}

/// The kind of file that an extension stands for.
fn kind_of(path: &Path) -> Option<&'static (&'static str, &'static [&'static str])> {
    let extension = path.extension()?;
    let mut kinds = ENDINGS.iter();
    kinds.find(|(_, endings)| {
        endings
            .iter()
            .any(|ending| extension.eq_ignore_ascii_case(ending))
    })
}

/// Whether a file is named like a picture.
pub(crate) fn is_named_like_a_picture(path: &Path) -> bool {
    kind_of(path).is_some_and(|(_, endings)| endings.contains(&"png"))
}

/// Refuses outputs of a run if two of them are the same file.
pub(crate) fn refuse_same(outputs: &[(&str, &Path)]) -> Result<(), Failure> {
    let place = |path: &Path| {
        let folder = folder_of(path);
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        fs::canonicalize(path).unwrap_or(folder.join(path.file_name().unwrap_or_default()))
    };
    for (number, (what, path)) in outputs.iter().enumerate() {
        let mut others = outputs[..number].iter();
        if let Some((other, _)) = others.find(|(_, other)| place(other) == place(path)) {
            let message = format!("{}: {what} would replace {other}", path.display());
            return Err(Failure::usage(message).hint("give each a name of its own"));
        }
    }
    Ok(())
}

fn unicode(name: &std::ffi::OsStr) -> Result<String, Failure> {
    let text = name.to_str().map(str::to_owned);
    text.ok_or_else(|| {
        Failure::usage(format!(
            "{}: expected a name in Unicode",
            Path::new(name).display()
        ))
    })
}

fn exists(path: &Path) -> Failure {
    Failure::usage(format!("{} exists already", path.display()))
        .hint("write elsewhere with `-o`, or add `--overwrite`")
}

/// The error for a file that appeared during the run.
fn appeared(path: &Path, has_checkpoint: bool) -> Failure {
    let message = format!(
        "{} exists already: it appeared during this run and was not replaced",
        path.display()
    );
    Failure::new(message).hint(match has_checkpoint {
        true => {
            "move it elsewhere, and run the same command with `--resume`: the checkpoint is kept"
        }
        false => "write elsewhere with `-o`, or add `--overwrite`",
    })
}

/// Checks by creating the file: permissions and names do not reveal read-only or full disks, or names that are
/// too long.
fn check_makeable(path: &Path) -> anyhow::Result<()> {
    let make = || -> std::io::Result<()> {
        let mut file = fs::File::create_new(path)?;
        let written = std::io::Write::write_all(&mut file, b"?");
        drop(file);
        fs::remove_file(path)?;
        written
    };
    make().map_err(|source| match source.kind() {
        ErrorKind::InvalidFilename | ErrorKind::InvalidInput => cannot_write(path, source),
        _ => cannot_write(folder_of(path), source),
    })
}

/// Checks that an existing file is writable and can be replaced.
fn check_replaceable(path: &Path) -> anyhow::Result<()> {
    let metadata = fs::metadata(path).or_else(|_| fs::symlink_metadata(path));
    if metadata.is_ok_and(|metadata| !metadata.is_file() && !metadata.is_symlink()) {
        let message = format!(
            "{}: expected a file to replace, found something else",
            path.display()
        );
        return Err(Failure::usage(message)
            .hint("choose another place with `-o`")
            .into());
    }
    if path.exists() {
        let opened = fs::File::options().write(true).open(path);
        opened.map_err(|source| cannot_write(path, source))?;
    }
    check_makeable(&folder_of(path).join(format!(".dinv-{:06}", std::process::id() % 1_000_000)))
}

fn cannot_write(path: &Path, source: std::io::Error) -> anyhow::Error {
    let message = format!(
        "cannot write to {}: {}",
        path.display(),
        files::plain(source)
    );
    Failure::new(message)
        .hint("choose another place with `-o`")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn folder(path: &Path, names: &[&str], overwrite: bool) -> anyhow::Result<Outputs> {
        let output = Outputs::folder(path, names.iter().copied(), overwrite, &[])?;
        output.check()?;
        Ok(output)
    }

    fn file(path: &Path, kind: Kind, overwrite: bool) -> anyhow::Result<Outputs> {
        let output = Outputs::file(path, kind, overwrite, &[])?;
        output.check()?;
        Ok(output)
    }

    fn message<T>(result: anyhow::Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn files_appear_together_and_nothing_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/er");
        let output = folder(&path, &["a", "b"], false).unwrap();
        let paths = output.publish(None, |place| {
            fs::write(place("a"), "1")?;
            fs::write(place("b"), "2")?;
            assert!(entries(&path).iter().all(|name| name.starts_with(".dinv-")));
            Ok(())
        });
        assert_eq!(paths.unwrap(), [path.join("a"), path.join("b")]);
        drop(output);
        assert_eq!(entries(&path), ["a", "b"]);
    }

    #[test]
    fn an_unfinished_output_leaves_no_trace() {
        let root = tempfile::tempdir().unwrap();
        let mut output = folder(&root.path().join("x/y"), &["a"], false).unwrap();
        output.claim("a").unwrap();
        let failed = output.publish(None, |place| {
            fs::write(place("a"), "half")?;
            Err(Error::io(place("a"))(ErrorKind::StorageFull.into()).into())
        });
        // The message must not show a hidden path.
        let expected = format!("{}: no storage space", root.path().join("x/y/a").display());
        assert_eq!(message(failed), expected);
        drop(output);
        assert!(entries(root.path()).is_empty());
    }

    #[test]
    fn what_exists_is_kept_unless_told() {
        let root = tempfile::tempdir().unwrap();
        let [a, link, sub] = ["a", "link", "sub"].map(|name| root.path().join(name));
        fs::write(&a, "old").unwrap();
        fs::create_dir(&sub).unwrap();
        assert!(message(folder(root.path(), &["a"], false)).ends_with("a exists already"));
        assert!(folder(root.path(), &["a"], true).is_ok());
        assert!(message(folder(root.path(), &["sub"], true)).contains("found something else"));
        assert!(message(file(&a, Kind::Tensors, false)).ends_with("a exists already"));
        assert!(file(&a, Kind::Tensors, true).is_ok());
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", &link).unwrap();
            assert!(message(file(&link, Kind::Tensors, false)).ends_with("link exists already"));
            let null = file(Path::new("/dev/null"), Kind::Tensors, true);
            assert!(message(null).contains("found something else"));
        }
        drop(link);
    }

    #[test]
    fn what_appears_meanwhile_is_kept_unless_told() {
        let root = tempfile::tempdir().unwrap();
        for (overwrite, left) in [(false, "theirs"), (true, "ours")] {
            let output = folder(root.path(), &["a", "b"], overwrite).unwrap();
            fs::write(root.path().join("spent"), "").unwrap();
            fs::write(root.path().join("b"), "theirs").unwrap();
            let published = output.publish(Some("spent"), |place| {
                fs::write(place("a"), "ours")?;
                Ok(fs::write(place("b"), "ours")?)
            });
            assert_eq!(published.is_ok(), overwrite);
            if let Err(error) = published {
                assert!(error.to_string().contains("b exists already"), "{error}");
            }
            assert_eq!(fs::read_to_string(root.path().join("b")).unwrap(), left);
            assert_eq!(root.path().join("a").exists(), overwrite);
            assert_eq!(root.path().join("spent").exists(), !overwrite);
        }
    }

    #[test]
    fn two_runs_do_not_write_the_same() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.safetensors");
        let mut first = file(&path, Kind::Tensors, false).unwrap();
        let mut second = file(&path, Kind::Tensors, false).unwrap();
        first.claim("x.safetensors").unwrap();
        let refused = message(second.claim("x.safetensors"));
        assert!(
            refused.ends_with("x.safetensors: another run is writing it"),
            "{refused}"
        );
        drop(first);
        second.claim("x.safetensors").unwrap();
    }

    #[test]
    fn no_input_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let [input, other] = ["a.png", "b.png"].map(|name| root.path().join(name));
        fs::write(&input, "the only copy").unwrap();
        let roundabout = root.path().join("x/../a.png");
        fs::create_dir(root.path().join("x")).unwrap();
        for overwrite in [false, true] {
            let folder = Outputs::folder(root.path(), ["a.png"], overwrite, &[&roundabout]);
            let file = Outputs::file(&input, Kind::Picture, overwrite, &[&other, &roundabout]);
            for refused in [message(folder), message(file)] {
                assert!(refused.contains("one of the inputs"), "{refused}");
            }
        }
        assert!(Outputs::file(&other, Kind::Picture, false, &[&input]).is_ok());
    }

    #[test]
    fn two_outputs_of_a_run_are_two_files() {
        let root = tempfile::tempdir().unwrap();
        let [one, same, other] = ["x", "./x", "y"].map(|name| root.path().join(name));
        let refused = refuse_same(&[("the difference", &one), ("--trace", &same)]);
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.ends_with("--trace would replace the difference"),
            "{refused}"
        );
        assert!(refuse_same(&[("the difference", &one), ("--trace", &other)]).is_ok());
    }

    #[test]
    fn names_are_those_of_what_is_written() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for name in ["out.png", "out.safetensors", "out.json"] {
            let refused = message(folder(&path(name), &["a"], false));
            assert!(
                refused.contains("expected the name of a folder"),
                "{refused}"
            );
        }
        for (kind, name, hint) in [
            (Kind::Picture, "out.JPG", "call it out.png"),
            (Kind::Picture, "out.v2", "call it out.v2.png"),
            (Kind::Picture, "out.safetensors", "call it out.png"),
            (Kind::Tensors, "night.png", "call it night.safetensors"),
            (Kind::Tensors, "night.pt", "call it night.safetensors"),
            (Kind::Tensors, "night.toml", "call it night.safetensors"),
        ] {
            let refused = kind.check(Path::new(name)).unwrap_err();
            assert!(
                format!("{refused:?}").contains(&format!("Some(\"{hint}\")")),
                "{refused:?}"
            );
        }
        for (kind, name) in [
            (Kind::Picture, "out"),
            (Kind::Picture, "out.png"),
            (Kind::Tensors, "lr0.01"),
            (Kind::Tensors, "night"),
        ] {
            file(&path(name), kind, false).unwrap();
        }
        for name in [
            "checkpoint.safetensors",
            "x.checkpoint.safetensors",
            "x.checkpoint",
        ] {
            let refused = message(file(&path(name), Kind::Tensors, false));
            assert!(refused.contains("reserved for checkpoints"), "{refused}");
        }
        // An existing folder may have any name.
        fs::create_dir(path("out.png")).unwrap();
        assert!(folder(&path("out.png"), &["a"], false).is_ok());
    }

    #[test]
    fn an_output_that_cannot_be_made_is_told_at_once() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().display();
        for name in ["sub/", "sub/.", ".", ""] {
            let path = PathBuf::from(format!("{place}/{name}"));
            for kind in [Kind::Picture, Kind::Tensors] {
                let refused = message(file(&path, kind, true));
                assert!(refused.ends_with("found a folder"), "{refused}");
            }
        }
        let long = root.path().join("x".repeat(300));
        let refused = message(file(&long, Kind::Tensors, false));
        assert!(refused.contains("cannot write to"), "{refused}");
        let absent = message(file(&root.path().join("absent/x"), Kind::Tensors, false));
        assert!(absent.contains("absent: No such file"), "{absent}");
        assert!(entries(root.path()).is_empty());
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [&file.join("out"), &file] {
            let expected = format!("cannot write to {}", path.display());
            let refused = message(folder(path, &["a"], false));
            assert!(refused.starts_with(&expected), "{refused}");
        }
        assert_eq!(entries(root.path()), ["file"]);
    }
}
