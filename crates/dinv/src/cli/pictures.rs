//! The pictures of a command: named one by one or by their folder, and read before the work.

use std::fs;
use std::path::{Path, PathBuf};

use difference_inversion::Error;
use difference_inversion::image::{RgbImage, load_image};
use difference_inversion::util::progress::Stage;

use super::output::is_named_like_a_picture;
use super::terminal::Failure;
use super::watch::{self, Watcher};

/// A readable picture.
#[derive(Debug)]
pub(crate) struct Picture<'a> {
    pub(crate) path: &'a Path,
    /// Width and height in pixels.
    pub(crate) size: (u32, u32),
    /// The contents of a pipe, which can be read only once.
    kept: Option<RgbImage>,
}

impl Picture<'_> {
    /// Reads the file.
    pub(crate) fn read(&self) -> Result<RgbImage, Error> {
        match &self.kept {
            Some(picture) => Ok(picture.clone()),
            None => load_image(self.path),
        }
    }
}

/// The named files, with each folder replaced by the pictures in it, sorted by name.
pub(crate) fn in_folders(named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = fs::read_dir(path).map_err(Error::io(path))?;
        let mut found = Vec::new();
        for entry in entries {
            let file = entry.map_err(Error::io(path))?.path();
            let hidden = file
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !hidden && is_named_like_a_picture(&file) && !file.is_dir() {
                found.push(file);
            }
        }
        if found.is_empty() {
            let message = format!("{}: there is no picture in this folder", path.display());
            let hint =
                "in a folder, files count as pictures by their extension, such as .png or .jpg";
            return Err(Failure::input(message).hint(hint).into());
        }
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

/// Reads every picture once, so that all errors are reported before the work. Only pictures that are not files stay
/// in memory: hundreds of photographs would not fit.
pub(crate) fn check<'a>(
    paths: impl ExactSizeIterator<Item = &'a Path>,
    watcher: &mut Watcher,
) -> anyhow::Result<Vec<Picture<'a>>> {
    let total = paths.len();
    let (mut pictures, mut wrong) = (Vec::with_capacity(total), Vec::new());
    for (done, path) in paths.enumerate() {
        if watch::stopping() {
            return Err(Error::Stopped {
                stage: Stage::Read,
                done,
                total,
                checkpoint: None,
            }
            .into());
        }
        watcher.count("pictures", done, total);
        match load_image(path) {
            Ok(picture) => pictures.push(Picture {
                path,
                size: picture.dimensions(),
                kept: (!path.is_file()).then_some(picture),
            }),
            Err(error) => wrong.push(error),
        }
    }
    watcher.count("pictures", total, total);
    Error::of_pictures(total, wrong)?;
    Ok(pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stands_for_its_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["b.JPG", "a.png", ".hidden.png", "notes.txt", "c.heic"] {
            fs::write(path(name), "").unwrap();
        }
        fs::create_dir(path("d.png")).unwrap();
        let named = [PathBuf::from("first.png"), folder.path().to_owned()];
        let expected = [
            named[0].clone(),
            path("a.png"),
            path("b.JPG"),
            path("c.heic"),
        ];
        assert_eq!(in_folders(&named).unwrap(), expected);
        let refused = in_folders(&[path("d.png")]).unwrap_err().to_string();
        assert!(
            refused.ends_with("there is no picture in this folder"),
            "{refused}"
        );
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["a.png", "b.png", "c.png"].map(|name| folder.path().join(name));
        RgbImage::new(8, 9).save(&paths[1]).unwrap();
        fs::write(&paths[2], "no picture").unwrap();
        let mut watcher = Watcher::new(true);
        let mut check = |paths: &[PathBuf]| -> anyhow::Result<Vec<(u32, u32)>> {
            let pictures = check(paths.iter().map(PathBuf::as_path), &mut watcher)?;
            Ok(pictures.iter().map(|picture| picture.size).collect())
        };
        let refused = check(&paths).unwrap_err().to_string();
        assert!(
            refused.starts_with("2 of 3 pictures cannot be read:\n  "),
            "{refused}"
        );
        assert!(refused.contains("a.png: No such file"), "{refused}");
        assert!(refused.contains("c.png: not a picture"), "{refused}");
        assert_eq!(check(&paths[1..2]).unwrap(), [(8, 9)]);
    }
}
