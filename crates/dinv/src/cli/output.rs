//! Output folders and files: checked before the long work, written whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use tempfile::TempDir;

use super::terminal::Failure;

/// A folder for results that appear together at the end.
///
/// Files are first written to a hidden folder inside it ([`Staging::path`]) and then renamed, so
/// that a failure leaves nothing half-written.
#[derive(Debug)]
pub(crate) struct OutputFolder {
    folder: PathBuf,
    names: Vec<String>,
    /// The folders that were made for this one, outermost first.
    created: Vec<PathBuf>,
}

impl OutputFolder {
    /// Makes the folder if need be, and checks that it can be written and that none of the files
    /// `names` is there yet, unless they may be overwritten, nor is one of the `inputs`.
    pub(crate) fn prepare(
        folder: &Path,
        names: impl IntoIterator<Item = impl Into<String>>,
        overwrite: bool,
        inputs: &[&Path],
    ) -> anyhow::Result<Self> {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        if !folder.exists() && is_named_like_a_picture(folder) {
            let message = format!(
                "{}: expected the name of a folder, found that of a picture",
                folder.display()
            );
            let failure = Failure::usage(message);
            return Err(failure
                .hint("results are written to a folder, such as `-o results`")
                .into());
        }
        refuse_inputs(names.iter().map(|name| folder.join(name)), inputs)?;
        if !overwrite {
            for name in &names {
                refuse_existing(&folder.join(name))?;
            }
        }
        let missing: Vec<PathBuf> = folder
            .ancestors()
            .take_while(|ancestor| !ancestor.as_os_str().is_empty() && !ancestor.exists())
            .map(Path::to_owned)
            .collect();
        let created = missing.into_iter().rev().collect();
        let output = Self {
            folder: folder.to_owned(),
            names,
            created,
        };
        fs::create_dir_all(folder).map_err(|source| cannot_write(folder, &source))?;
        check_writable(folder)?;
        Ok(output)
    }

    /// The path one of the files will have in the end.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts writing.
    pub(crate) fn stage(&self) -> anyhow::Result<Staging<'_>> {
        let folder = hidden()
            .tempdir_in(&self.folder)
            .map_err(|source| cannot_write(&self.folder, &source))?;
        Ok(Staging {
            output: self,
            folder,
        })
    }
}

impl Drop for OutputFolder {
    /// Takes back the folders that were made and stayed empty.
    fn drop(&mut self) {
        for folder in self.created.iter().rev() {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }
}

/// The files of an [`OutputFolder`] while they are written.
#[derive(Debug)]
pub(crate) struct Staging<'a> {
    output: &'a OutputFolder,
    folder: TempDir,
}

impl Staging<'_> {
    /// Where to write the file called `name`.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Moves every file to its place; returns their paths in the order of their names.
    pub(crate) fn publish(self) -> anyhow::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for name in &self.output.names {
            let path = self.output.path(name);
            fs::rename(self.path(name), &path).map_err(Error::io(&path))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

/// [`check_file`] for a picture, which is written as PNG.
pub(crate) fn check_picture(path: &Path, overwrite: bool, inputs: &[&Path]) -> anyhow::Result<()> {
    let extension = path.extension().unwrap_or_default();
    if !extension.is_empty() && !extension.eq_ignore_ascii_case("png") {
        let message = format!("{}: pictures are written as PNG", path.display());
        let name = path.with_extension("png");
        let failure = Failure::usage(message);
        return Err(failure.hint(format!("call it {}", name.display())).into());
    }
    check_file(path, overwrite, inputs)
}

/// Checks that a single output file can be written: its folder exists and takes files, it is none of the
/// `inputs`, and nothing is there yet unless it may be overwritten.
pub(crate) fn check_file(path: &Path, overwrite: bool, inputs: &[&Path]) -> anyhow::Result<()> {
    if path.is_dir() {
        let message = format!(
            "{}: expected the name of a file, found a folder",
            path.display()
        );
        return Err(Failure::usage(message).into());
    }
    refuse_inputs([path.to_owned()], inputs)?;
    if !overwrite {
        refuse_existing(path)?;
    }
    check_writable(parent(path))
}

/// The folder a file lies in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn is_named_like_a_picture(path: &Path) -> bool {
    let endings = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];
    let extension = path.extension().unwrap_or_default();
    (endings.iter()).any(|ending| extension.eq_ignore_ascii_case(ending))
}

/// Nothing that a result is made from is replaced by it.
fn refuse_inputs(
    outputs: impl IntoIterator<Item = PathBuf>,
    inputs: &[&Path],
) -> anyhow::Result<()> {
    let inputs: Vec<PathBuf> = (inputs.iter())
        .filter_map(|input| fs::canonicalize(input).ok())
        .collect();
    for output in outputs {
        if fs::canonicalize(&output).is_ok_and(|output| inputs.contains(&output)) {
            let message = format!(
                "{}: this is one of the inputs, which the result would replace",
                output.display()
            );
            return Err(Failure::new(message)
                .hint("write elsewhere with `-o`")
                .into());
        }
    }
    Ok(())
}

fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        let failure = Failure::new(format!("{} exists already", path.display()));
        return Err(failure
            .hint("write elsewhere with `-o`, or add `--overwrite`")
            .into());
    }
    Ok(())
}

/// Finds out by writing a byte: permissions do not reveal read-only or full disks.
fn check_writable(folder: &Path) -> anyhow::Result<()> {
    let probe = || -> std::io::Result<()> {
        let mut file = hidden().tempfile_in(folder)?;
        std::io::Write::write_all(&mut file, b"?")
    };
    probe().map_err(|source| cannot_write(folder, &source))
}

fn cannot_write(folder: &Path, source: &std::io::Error) -> anyhow::Error {
    let message = format!("cannot write to {}: {}", folder.display(), reason(source));
    Failure::new(message)
        .hint("choose another place with `-o`")
        .into()
}

/// The operating system's reason, without the path of a temporary file that means nothing to the
/// user.
fn reason(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.source()) {
        Some(inner) => inner.to_string(),
        None => error.to_string(),
    }
}

fn hidden() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dinv-");
    builder
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

    #[test]
    fn files_appear_together_and_nothing_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("deep/er");
        let output = OutputFolder::prepare(&folder, ["a", "b"], false, &[]).unwrap();
        let staging = output.stage().unwrap();
        fs::write(staging.path("a"), "1").unwrap();
        fs::write(staging.path("b"), "2").unwrap();
        assert!(
            entries(&folder)
                .iter()
                .all(|name| name.starts_with(".dinv-"))
        );
        assert_eq!(
            staging.publish().unwrap(),
            [folder.join("a"), folder.join("b")]
        );
        drop(output);
        assert_eq!(entries(&folder), ["a", "b"]);
    }

    #[test]
    fn an_unfinished_output_leaves_no_trace() {
        let root = tempfile::tempdir().unwrap();
        let output = OutputFolder::prepare(&root.path().join("x/y"), ["a"], false, &[]).unwrap();
        let staging = output.stage().unwrap();
        fs::write(staging.path("a"), "half").unwrap();
        drop(staging);
        drop(output);
        assert!(entries(root.path()).is_empty());
    }

    #[test]
    fn what_exists_is_kept_unless_told() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("a"), "old").unwrap();
        let error = OutputFolder::prepare(root.path(), ["a"], false, &[]).unwrap_err();
        assert!(error.to_string().ends_with("a exists already"), "{error}");
        assert!(OutputFolder::prepare(root.path(), ["a"], true, &[]).is_ok());
        let error = check_file(&root.path().join("a"), false, &[]).unwrap_err();
        assert!(error.to_string().ends_with("a exists already"), "{error}");
        assert!(check_file(&root.path().join("a"), true, &[]).is_ok());
        let error = check_file(root.path(), true, &[]).unwrap_err();
        assert!(error.to_string().ends_with("found a folder"), "{error}");
    }

    #[test]
    fn no_input_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let [input, other] = ["a.png", "b.png"].map(|name| root.path().join(name));
        fs::write(&input, "the only copy").unwrap();
        let roundabout = root.path().join("x/../a.png");
        fs::create_dir(root.path().join("x")).unwrap();
        for overwrite in [false, true] {
            let folder = OutputFolder::prepare(root.path(), ["a.png"], overwrite, &[&roundabout]);
            let file = check_file(&input, overwrite, &[&other, &roundabout]);
            for error in [folder.unwrap_err(), file.unwrap_err()] {
                assert!(error.to_string().contains("one of the inputs"), "{error}");
            }
        }
        assert!(check_file(&other, false, &[&input]).is_ok());
    }

    #[test]
    fn a_folder_is_not_named_like_a_picture_nor_a_picture_like_another_format() {
        let root = tempfile::tempdir().unwrap();
        let [folder, jpeg] = ["out.png", "out.JPG"].map(|name| root.path().join(name));
        let error = OutputFolder::prepare(&folder, ["a"], false, &[]).unwrap_err();
        assert!(
            error.to_string().contains("the name of a folder"),
            "{error}"
        );
        let error = check_picture(&jpeg, false, &[]).unwrap_err();
        assert!(error.to_string().contains("written as PNG"), "{error}");
        assert!(check_picture(&folder, false, &[]).is_ok());
        fs::create_dir(&folder).unwrap();
        assert!(OutputFolder::prepare(&folder, ["a"], false, &[]).is_ok());
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        for folder in [&file.join("out"), &file] {
            let error = OutputFolder::prepare(folder, ["a"], false, &[]).unwrap_err();
            let expected = format!("cannot write to {}", folder.display());
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        assert_eq!(entries(root.path()), ["file"]);
    }
}
