//! One file of tensors, safetensors or GGUF: its header, and reading one tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use dinv_kernels::packed::Packing;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::util::foreign::{BEGINNING, refuse_pipe, what_else};
use crate::weights::gguf;
use crate::weights::scales::scaled;
use crate::{Error, Result};

/// The size of a safetensors header's length, a little-endian u64.
const PREFIX_LEN: u64 = 8;

/// The location of the bytes of a [`TensorFile`].
#[derive(Debug)]
enum Source {
    File(Mutex<File>),
    Memory(Vec<u8>),
}

/// A tensor as a file stores it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored {
    /// The type that it is read as: f32 if it is packed.
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// The place of its bytes in the file, and their number.
    pub(super) start: u64,
    pub(super) length: u64,
    /// The packing of its numbers, if they have fewer bits than a float.
    pub(super) packing: Option<Packing>,
}

/// The header of a file.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, Stored>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// An opened file of tensors, of which only the header has been read.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    source: Source,
    header: Header,
}

impl TensorFile {
    /// Opens `path` and reads its header, which must match the size of the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        refuse_pipe(path)?;
        let mut file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if metadata.is_dir() {
            return Err(Error::invalid_file(
                path,
                "expected a safetensors file, found a folder",
            ));
        }
        let header = read_header(&mut file, metadata.len(), path)?;
        Self::new(path, Source::File(Mutex::new(file)), header)
    }

    /// Takes the bytes of a file; `name` stands for its path in errors.
    pub(crate) fn from_bytes(bytes: Vec<u8>, name: &Path) -> Result<Self> {
        let header = read_header(&mut bytes.as_slice(), bytes.len() as u64, name)?;
        Self::new(name, Source::Memory(bytes), header)
    }

    fn new(path: &Path, source: Source, header: Header) -> Result<Self> {
        let mut file = Self {
            path: path.to_owned(),
            source,
            header,
        };
        if let Some(tensors) = scaled(&file)? {
            file.header.tensors = tensors;
        }
        Ok(file)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, in the order of their bytes.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<(&String, u64)> = (self.header.tensors.iter())
            .map(|(name, stored)| (name, stored.start))
            .collect();
        names.sort_by_key(|(_, start)| *start);
        names.into_iter().map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        (self.header.metadata.iter()).map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The tensors, by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.header.tensors
    }

    /// The element type and shape of tensor `name`. Packed numbers are read as f32.
    pub(crate) fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        let stored = self.header.tensors.get(name)?;
        Some((stored.dtype, &stored.shape))
    }

    /// The size of tensor `name` in the file, in bytes.
    pub(crate) fn size(&self, name: &str) -> u64 {
        (self.header.tensors.get(name)).map_or(0, |stored| stored.length)
    }

    /// How the numbers of tensor `name` are packed, if they are.
    pub(super) fn packing(&self, name: &str) -> Option<Packing> {
        self.header.tensors.get(name)?.packing
    }

    /// The little-endian bytes of some rows of tensor `name`: the parts from `start` to `end` of `of` equal parts. `of` must
    /// divide the number of rows.
    pub(crate) fn bytes(&self, name: &str, part: [usize; 3]) -> Result<Vec<u8>> {
        let stored = self.stored_bytes(name, part)?;
        Ok(match self.packing(name) {
            Some(packing) => {
                let widened = packing.widened(&stored).into_iter();
                widened.flat_map(f32::to_le_bytes).collect()
            }
            None => stored,
        })
    }

    /// The same as they are stored.
    pub(super) fn stored_bytes(&self, name: &str, [start, end, of]: [usize; 3]) -> Result<Vec<u8>> {
        let Some(stored) = self.header.tensors.get(name) else {
            return Err(Error::invalid_file(
                &self.path,
                format!("no tensor `{name}`"),
            ));
        };
        let part = stored.length / of as u64;
        let length = usize::try_from(part * (end - start) as u64).map_err(|_| {
            Error::invalid_file(&self.path, format!("tensor `{name}` is too large"))
        })?;
        let start = stored.start + part * start as u64;
        let bytes = match &self.source {
            Source::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                read_exact_at(&mut *file, start, length)
            }
            Source::Memory(bytes) => read_exact_at(&mut std::io::Cursor::new(bytes), start, length),
        };
        bytes.map_err(Error::io(&self.path))
    }

    /// The value of tensor `name`, if it is a single number.
    pub(super) fn scalar(&self, name: &str) -> Result<Option<f32>> {
        let Some((dtype, shape)) = self.info(name) else {
            return Ok(None);
        };
        if shape.iter().any(|&size| size != 1) {
            return Ok(None);
        }
        Ok(scalar(dtype, &self.bytes(name, [0, 1, 1])?))
    }
}

/// A scalar of a file, as f32.
fn scalar(dtype: Dtype, bytes: &[u8]) -> Option<f32> {
    Some(match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        _ => return None,
    })
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
fn read_header(file: &mut impl Read, file_len: u64, path: &Path) -> Result<Header> {
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let mut beginning = Vec::new();
    (&mut *file)
        .take(BEGINNING as u64)
        .read_to_end(&mut beginning)
        .map_err(Error::io(path))?;
    if let Some(rest) = beginning.strip_prefix(&gguf::MAGIC) {
        return gguf::read_header(BufReader::new(rest.chain(file)), file_len, path);
    }
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
    let stored = |name: String| {
        let info = header.info(&name)?;
        let (start, end) = info.data_offsets;
        let packing = match info.dtype {
            Dtype::F8_E4M3 => Some(Packing::F8E4M3(1.0)),
            Dtype::F8_E5M2 => Some(Packing::F8E5M2(1.0)),
            _ => None,
        };
        let stored = Stored {
            dtype: if packing.is_some() {
                Dtype::F32
            } else {
                info.dtype
            },
            shape: info.shape.clone(),
            start: data_start + start as u64,
            length: (end - start) as u64,
            packing,
        };
        Some((name, stored))
    };
    Ok(Header {
        tensors: header
            .offset_keys()
            .into_iter()
            .filter_map(stored)
            .collect(),
        metadata: (header.metadata().iter().flatten())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    })
}
