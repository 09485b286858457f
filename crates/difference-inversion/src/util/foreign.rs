//! Recognises files of other kinds, by their first bytes.

use std::path::Path;

use crate::{Error, Result};

/// Why pickled files are not read, and what to do about it.
pub(crate) const REFUSAL: &str = "a pickled file is not read, because reading one can run any code; \
    convert it to safetensors, in Python for instance by \
    `safetensors.torch.save_file(torch.load(\"FILE\", weights_only=True), \"FILE.safetensors\")`, \
    of a `.ckpt` its [\"state_dict\"]";

/// The number of bytes that identify a file.
pub(crate) const BEGINNING: usize = 256;

/// How PNG, JPEG, WebP, GIF and TIFF files begin.
const PICTURES: [&[u8]; 6] = [
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"RIFF",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
];

/// What to do about a Git LFS pointer, if the text is one.
pub(crate) fn lfs_pointer(text: &str) -> Option<String> {
    let pointer = text.strip_prefix("version https://git-lfs")?;
    let size = (pointer.lines()).find_map(|line| line.strip_prefix("size "));
    let of = size.map_or(String::new(), |size| format!(" of {size} bytes"));
    Some(format!(
        "a Git LFS pointer to a file{of} that was not downloaded; run `git lfs pull` in its folder"
    ))
}

/// Refuses what is neither a file nor a folder: opening a pipe waits for its other end, and it cannot be read twice.
///
/// # Errors
/// [`Error::InvalidFile`] for such a thing, [`Error::Io`] if there is nothing.
pub(crate) fn refuse_pipe(path: &Path) -> Result<()> {
    let kind = std::fs::metadata(path).map_err(Error::io(path))?;
    match kind.is_file() || kind.is_dir() {
        true => Ok(()),
        false => {
            let reason = "expected a file, found a pipe or a device";
            Err(Error::invalid_file(path, reason))
        }
    }
}

/// Names files that are commonly mistaken for safetensors, by their first bytes, with what to do about them.
pub(crate) fn what_else(beginning: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(beginning);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let lower = text.to_lowercase();
    let starts_with = |start: &[u8]| beginning.starts_with(start);
    let instead = if let Some(pointer) = lfs_pointer(text) {
        pointer
    } else if ["<!doctype", "<html", "<head", "<?xml", "<!--"]
        .iter()
        .any(|tag| lower.starts_with(tag))
    {
        "a web page saved in place of the file: the link led to a page about it, or the download needs an \
         account; download it again (on the Hub, with `/resolve/` instead of `/blob/`)"
            .to_owned()
    } else if text.starts_with(['{', '[']) {
        "JSON; give a `.safetensors` file, or the folder that holds model_index.json".to_owned()
    } else if starts_with(b"PK\x03\x04") || starts_with(b"\x80\x02") || starts_with(b"\x80\x04") {
        format!("pickled, whatever its name: {REFUSAL}")
    } else if starts_with(b"GGUF") {
        "a GGUF file, which holds the weights of a network".to_owned()
    } else if starts_with(b"\x1f\x8b") || starts_with(b"7z\xbc\xaf") || starts_with(b"Rar!") {
        "an archive; unpack it first".to_owned()
    } else if starts_with(b"\x89HDF") {
        "an HDF5 file, as Keras saves; take the model in safetensors".to_owned()
    } else if text.starts_with("../") && text.contains("blobs/") {
        "a broken link into the Hub's cache: the folder was copied without the files that its links point to; \
         download it again"
            .to_owned()
    } else if PICTURES.iter().any(|start| starts_with(start)) {
        "a picture".to_owned()
    } else if beginning.is_empty() {
        "an empty file; download it again".to_owned()
    } else {
        return None;
    };
    Some(format!("not a safetensors file, but {instead}"))
}
