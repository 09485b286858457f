//! One safetensors file: its header, and reading one tensor at a time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::util::foreign::{BEGINNING, what_else};
use crate::{Error, Result};

/// The size of the header's length, a little-endian u64.
const PREFIX_LEN: u64 = 8;

/// The location of the bytes of a [`TensorFile`].
#[derive(Debug)]
enum Source {
    File(Mutex<File>),
    Memory(Vec<u8>),
}

/// An opened safetensors file, of which only the header has been read.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    source: Source,
    data_start: u64,
    header: Metadata,
}

impl TensorFile {
    /// Opens `path` and reads its header, which must match the size of the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if metadata.is_dir() {
            return Err(Error::invalid_file(
                path,
                "expected a safetensors file, found a folder",
            ));
        }
        let (data_start, header) = read_header(&mut file, metadata.len(), path)?;
        Ok(Self {
            path: path.to_owned(),
            source: Source::File(Mutex::new(file)),
            data_start,
            header,
        })
    }

    /// Takes the bytes of a safetensors file; `name` stands for its path in errors.
    pub(crate) fn from_bytes(bytes: Vec<u8>, name: &Path) -> Result<Self> {
        let (data_start, header) = read_header(&mut bytes.as_slice(), bytes.len() as u64, name)?;
        Ok(Self {
            path: name.to_owned(),
            source: Source::Memory(bytes),
            data_start,
            header,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(crate) fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.header
            .metadata()
            .iter()
            .flatten()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The element type and shape of tensor `name`.
    pub(crate) fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.header
            .info(name)
            .map(|info| (info.dtype, info.shape.as_slice()))
    }

    /// The size of tensor `name` in bytes.
    pub(crate) fn size(&self, name: &str) -> u64 {
        let range = self.header.info(name).map(|info| info.data_offsets);
        range.map_or(0, |(start, end)| (end - start) as u64)
    }

    /// The little-endian bytes of tensor `name`: the `part`-th of `parts` equal parts of them,
    /// counted from 0.
    pub(crate) fn bytes(&self, name: &str, [part, parts]: [usize; 2]) -> Result<Vec<u8>> {
        let Some(info) = self.header.info(name) else {
            return Err(Error::invalid_file(
                &self.path,
                format!("no tensor `{name}`"),
            ));
        };
        let (start, end) = info.data_offsets;
        let len = (end - start) / parts;
        let start = self.data_start + (start + part * len) as u64;
        match &self.source {
            Source::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                read_exact_at(&mut *file, start, len).map_err(Error::io(&self.path))
            }
            Source::Memory(bytes) => {
                let mut cursor = std::io::Cursor::new(bytes);
                read_exact_at(&mut cursor, start, len).map_err(Error::io(&self.path))
            }
        }
    }
}

fn read_exact_at(
    file: &mut (impl Read + Seek),
    start: u64,
    len: usize,
) -> std::io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads the header and checks that it describes exactly the rest of the file, so that no later
/// read can be out of bounds and no allocation exceeds the size of the file.
fn read_header(file: &mut impl Read, file_len: u64, path: &Path) -> Result<(u64, Metadata)> {
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let mut beginning = Vec::new();
    (&mut *file)
        .take(BEGINNING as u64)
        .read_to_end(&mut beginning)
        .map_err(Error::io(path))?;
    let found = || what_else(&beginning);
    let Some((prefix, rest)) = beginning.split_first_chunk() else {
        return Err(invalid(found().unwrap_or_else(|| {
            format!("not a safetensors file: only {file_len} bytes long")
        })));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > file_len - PREFIX_LEN {
        return Err(invalid(found().unwrap_or_else(|| {
            format!(
                "not a safetensors file, or truncated: the header claims {header_len} bytes, the \
                 file has {file_len}"
            )
        })));
    }
    let mut json = Vec::new();
    (rest.chain(file))
        .take(header_len)
        .read_to_end(&mut json)
        .map_err(Error::io(path))?;
    let header: Metadata = serde_json::from_slice(&json)
        .map_err(|source| invalid(format!("invalid safetensors header: {source}")))?;
    let data_start = PREFIX_LEN + header_len;
    let (expected, found) = (header.data_len() as u64, file_len - data_start);
    if expected != found {
        let state = if found < expected {
            "truncated"
        } else {
            "followed by other data"
        };
        return Err(invalid(format!(
            "{state}: the header describes {expected} bytes of tensors, the file holds {found}"
        )));
    }
    Ok((data_start, header))
}
