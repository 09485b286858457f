//! Small safetensors files that the program itself writes: arrays held in memory as a whole, written
//! atomically.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::util::files::{self, Existing};
use crate::util::foreign::{BEGINNING, refuse_pipe, what_else};
use crate::{Error, Result};

/// The numbers of an [`Array`].
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floating-point numbers (f16, bf16 and f64 are converted when read).
    F32(Vec<f32>),
    /// Integers (every signed or unsigned type is converted when read).
    I64(Vec<i64>),
}

/// A shape and its numbers in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    shape: Vec<usize>,
    values: Values,
}

impl Array {
    /// Floating-point numbers of a shape.
    pub fn floats(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self {
            shape: shape.into(),
            values: Values::F32(values),
        }
    }

    /// Integers of a shape.
    pub fn integers(shape: impl Into<Vec<usize>>, values: Vec<i64>) -> Self {
        Self {
            shape: shape.into(),
            values: Values::I64(values),
        }
    }

    /// The numbers of a tensor of any floating-point type.
    pub fn from_tensor<const D: usize>(tensor: Tensor<D>) -> Self {
        let shape = tensor.dims();
        Self::floats(shape, tensor.into_data().iter::<f32>().collect())
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The numbers.
    pub fn values(&self) -> &Values {
        &self.values
    }

    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F32(_) => Dtype::F32,
            Values::I64(_) => Dtype::I64,
        }
    }

    /// The numbers as little-endian bytes.
    fn data(&self) -> Vec<u8> {
        match &self.values {
            Values::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::I64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// A safetensors file as a whole: named arrays and text metadata.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Arrays {
    /// The file it was read from; named in errors.
    pub path: PathBuf,
    /// The arrays by name.
    pub arrays: BTreeMap<String, Array>,
    /// The file's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Arrays {
    /// Adds an array.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, array: Array) -> Self {
        self.arrays.insert(name.into(), array);
        self
    }

    /// Adds a line of metadata.
    #[must_use]
    pub fn with_metadata(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// Reads a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::InvalidFile`] if it is not safetensors,
    /// truncated, or has a number type that is not supported.
    pub fn read(path: &Path) -> Result<Self> {
        refuse_pipe(path)?;
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let invalid = |reason: String| Error::invalid_file(path, reason);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| {
            let found = what_else(bytes.get(..BEGINNING).unwrap_or(&bytes));
            invalid(found.unwrap_or_else(|| format!("not a usable safetensors file: {error}")))
        })?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| invalid(format!("not a usable safetensors file: {error}")))?;
        let mut arrays = BTreeMap::new();
        for (name, view) in file.iter() {
            let values = decode(view.dtype(), view.data()).ok_or_else(|| {
                invalid(format!(
                    "tensor `{name}`: numbers of type {:?} are not supported",
                    view.dtype()
                ))
            })?;
            let shape = view.shape().to_vec();
            arrays.insert(name.to_owned(), Array { shape, values });
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self {
            path: path.to_owned(),
            arrays,
            metadata: metadata.into_iter().collect(),
        })
    }

    /// Writes the file atomically: it is either complete or unchanged. The same contents give the same
    /// bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.write_over(path, Existing::Replace)
    }

    /// As [`write`](Self::write), with the treatment of an existing file.
    ///
    /// # Errors
    /// As [`files::write`].
    pub fn write_over(&self, path: &Path, existing: Existing) -> Result<()> {
        let bytes = self
            .to_bytes()
            .map_err(|error| Error::invalid_file(path, error.to_string()))?;
        files::write(path, &bytes, existing)
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// If the header cannot be written as JSON.
    // The header is assembled here, because `safetensors::serialize` takes the metadata as a hash map and writes it in a
    // different order every time.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut sorted: Vec<(&String, &Array)> = self.arrays.iter().collect();
        sorted.sort_by_key(|(_, array)| Reverse(array.dtype())); // wide numbers first: all aligned
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!(self.metadata));
        let mut data = Vec::new();
        for (name, array) in sorted {
            let start = data.len();
            data.extend_from_slice(&array.data());
            let info = json!({
                "dtype": array.dtype(), "shape": array.shape, "data_offsets": [start, data.len()],
            });
            header.insert(name.clone(), info);
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let length = (header.len() as u64).to_le_bytes();
        Ok([length.as_slice(), &header, &data].concat())
    }

    /// The array `name`.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is none.
    pub fn array(&self, name: &str) -> Result<&Array> {
        self.arrays
            .get(name)
            .ok_or_else(|| self.wrong(name, "an array", "no such tensor"))
    }

    /// The array `name` as a tensor with `D` dimensions on `device`.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if there is none, or it has another number of dimensions or no
    /// floating-point numbers.
    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D>> {
        let array = self.array(name)?;
        let expected = format!("floating-point numbers in {D} dimensions");
        let shape: [usize; D] = array
            .shape()
            .try_into()
            .map_err(|_| self.wrong(name, &expected, &format!("shape {:?}", array.shape())))?;
        let Values::F32(values) = array.values() else {
            return Err(self.wrong(name, &expected, "integers"));
        };
        let data = TensorData::new(values.clone(), shape);
        Ok(Tensor::from_data(data, (device, DType::F32)))
    }

    /// An [`Error::InvalidFile`] about array `name` of this file.
    pub fn wrong(&self, name: &str, expected: &str, found: &str) -> Error {
        let reason = format!("tensor `{name}`: expected {expected}, found {found}");
        Error::invalid_file(&self.path, reason)
    }
}

/// Little-endian bytes as numbers; `None` for unsupported types.
fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Values> {
    macro_rules! read {
        ($type:ty, $convert:expr) => {
            bytes
                .as_chunks::<{ size_of::<$type>() }>()
                .0
                .iter()
                .map(|chunk| $convert(<$type>::from_le_bytes(*chunk)))
                .collect()
        };
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "f64 is read at the program's own precision"
    )]
    let narrow = |value: f64| value as f32;
    Some(match dtype {
        Dtype::F32 => Values::F32(read!(f32, f32::from)),
        Dtype::F16 => Values::F32(read!(f16, f16::to_f32)),
        Dtype::BF16 => Values::F32(read!(bf16, bf16::to_f32)),
        Dtype::F64 => Values::F32(read!(f64, narrow)),
        Dtype::I64 => Values::I64(read!(i64, i64::from)),
        Dtype::I32 => Values::I64(read!(i32, i64::from)),
        Dtype::I16 => Values::I64(read!(i16, i64::from)),
        Dtype::U8 => Values::I64(read!(u8, i64::from)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_and_metadata_survive_a_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arrays.safetensors");
        let arrays = Arrays::default()
            .with("noise", Array::floats([1, 2], vec![0.5, -1.25]))
            .with("timesteps", Array::integers([3], vec![999, 0, -1]))
            .with_metadata("step", "7");
        arrays.write(&path).unwrap();
        let read = Arrays::read(&path).unwrap();
        assert_eq!(read.arrays, arrays.arrays);
        assert_eq!(read.metadata, arrays.metadata);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_same_contents_give_the_same_bytes() {
        let keys = ["format", "base", "settings", "step", "version"];
        let arrays = || {
            let arrays = Arrays::default().with("x", Array::floats([1], vec![1.]));
            keys.iter()
                .fold(arrays, |arrays, key| arrays.with_metadata(key, *key))
        };
        let bytes = arrays().to_bytes().unwrap();
        assert!((0..20).all(|_| arrays().to_bytes().unwrap() == bytes));
        let other = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(other.names(), ["x"]);
    }

    #[test]
    fn truncated_files_and_missing_arrays_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arrays.safetensors");
        let arrays = Arrays::default().with("x", Array::floats([2], vec![1., 2.]));
        arrays.write(&path).unwrap();
        let message = Arrays::read(&path)
            .unwrap()
            .tensor::<1>("y", &Device::flex())
            .unwrap_err()
            .to_string();
        assert!(message.contains("tensor `y`"), "{message}");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(Arrays::read(&path).is_err());
    }
}
