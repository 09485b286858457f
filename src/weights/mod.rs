//! Reading model weights and their configuration from disk.

mod arrays;
mod config;
mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use safetensors::Dtype;

pub use self::arrays::{Array, Arrays, Values};
pub use self::config::{OtherFields, PerBlock, check_fixed_fields, parse_config, read_config};
use self::file::TensorFile;
use crate::{Error, Result};

/// File stems under which diffusers and transformers save the weights of one model, in the order
/// in which they are looked for.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// The tensors of one model, addressed by their dotted keys and read on demand.
///
/// A `Weights` is a view under a key prefix ([`scope`](Self::scope)); views of the same model are
/// cheap and share the record of which tensors were read, so that
/// [`check_all_used`](Self::check_all_used) can tell whether the model made use of all of them.
#[derive(Debug, Clone)]
pub struct Weights {
    store: Arc<Store>,
    prefix: String,
}

#[derive(Debug)]
struct Store {
    /// The file or folder given by the user.
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Index into `files` of every tensor.
    index: BTreeMap<String, usize>,
    used: Mutex<BTreeSet<String>>,
    device: Device,
    dtype: FloatDType,
}

impl Weights {
    /// Opens a safetensors file, or the folder of a model saved by diffusers or transformers:
    /// `diffusion_pytorch_model` or `model`, `.safetensors` or `.fp16.safetensors`, in one file or
    /// in shards listed by `….safetensors.index.json`. Tensors are converted to `dtype` on
    /// `device` when they are asked for.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::InvalidFile`] if the folder holds no
    /// safetensors, or a file is truncated or not a safetensors file.
    pub fn open(path: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        let paths = if path.is_dir() {
            find_files(path)?
        } else {
            vec![path.to_owned()]
        };
        let files = paths
            .iter()
            .map(|path| TensorFile::open(path))
            .collect::<Result<_>>()?;
        Self::new(path, files, device, dtype)
    }

    /// Takes the bytes of one safetensors file; `name` stands for its path in errors.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if the bytes are truncated or not a safetensors file.
    pub fn from_bytes(
        bytes: Vec<u8>,
        name: impl AsRef<Path>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self> {
        let file = TensorFile::from_bytes(bytes, name.as_ref())?;
        Self::new(name.as_ref(), vec![file], device, dtype)
    }

    fn new(
        path: &Path,
        files: Vec<TensorFile>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self> {
        let mut index = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                if index.contains_key(&name) {
                    let reason = format!("tensor `{name}` is also in another file of this model");
                    return Err(Error::invalid_file(file.path(), reason));
                }
                index.insert(name, number);
            }
        }
        let used = Mutex::new(BTreeSet::new());
        let store = Store {
            path: path.to_owned(),
            files,
            index,
            used,
            device: device.clone(),
            dtype,
        };
        Ok(Self {
            store: Arc::new(store),
            prefix: String::new(),
        })
    }

    /// The view of the tensors whose keys start with this view's prefix, `name` and a dot.
    #[must_use]
    pub fn scope(&self, name: impl Display) -> Self {
        Self {
            store: Arc::clone(&self.store),
            prefix: format!("{}{name}.", self.prefix),
        }
    }

    /// Whether the tensor `name` exists in this view.
    pub fn contains(&self, name: &str) -> bool {
        self.store.index.contains_key(&self.key(name))
    }

    /// Whether any tensor exists in this view.
    pub fn is_empty(&self) -> bool {
        !self.keys().any(|_| true)
    }

    /// The shape of tensor `name`, if it exists.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let key = self.key(name);
        let file = &self.store.files[*self.store.index.get(&key)?];
        file.info(&key).map(|(_, shape)| shape.to_vec())
    }

    /// The full keys of this view's tensors, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.store
            .index
            .keys()
            .map(String::as_str)
            .filter(|key| key.starts_with(&self.prefix))
    }

    /// The key-value pairs of the files' `__metadata__`.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let pairs = self.store.files.iter().flat_map(TensorFile::metadata);
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.store.path
    }

    /// The path that errors about the model's configuration name: `config.json` beside the
    /// weights.
    pub fn config_path(&self) -> PathBuf {
        let path = self.path();
        if path.is_dir() {
            path.join("config.json")
        } else {
            path.with_file_name("config.json")
        }
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.store.files.iter().map(TensorFile::path)
    }

    /// The device tensors are put on.
    pub fn device(&self) -> &Device {
        &self.store.device
    }

    /// The element type tensors are converted to.
    pub fn dtype(&self) -> FloatDType {
        self.store.dtype
    }

    /// Reads tensor `name`, which must have this `shape` and hold floating-point numbers.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, of another shape, or not of floating-point numbers;
    /// [`Error::Io`] if it cannot be read.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let key = self.key(name);
        let wrong = |path: &Path, found: String| Error::Tensor {
            path: path.to_owned(),
            name: key.clone(),
            expected: format!("shape {shape:?}"),
            found,
        };
        let Some(&number) = self.store.index.get(&key) else {
            return Err(wrong(self.path(), "no such tensor".to_owned()));
        };
        let file = &self.store.files[number];
        let Some((dtype, found)) = file.info(&key) else {
            return Err(wrong(file.path(), "no such tensor".to_owned()));
        };
        if found != shape {
            return Err(wrong(file.path(), format!("shape {found:?}")));
        }
        let Some(dtype) = float_dtype(dtype) else {
            return Err(wrong(
                file.path(),
                format!("elements of type {dtype:?}, not floating-point"),
            ));
        };
        let data = TensorData::from_bytes_vec(file.bytes(&key)?, shape, dtype);
        let data = data.convert_dtype(self.store.dtype.into());
        self.store
            .used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key);
        Ok(Tensor::from_data(
            data,
            (&self.store.device, self.store.dtype.into()),
        ))
    }

    /// Checks that every tensor of this view has been read, except those whose key ends with one of
    /// `ignored` (buffers such as `position_ids`): what a model does not use is a sign that its
    /// configuration is wrong.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`] naming them.
    pub fn check_all_used(&self, ignored: &[&str]) -> Result<()> {
        let used = self
            .store
            .used
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> = self
            .keys()
            .filter(|key| !used.contains(*key) && !ignored.iter().any(|end| key.ends_with(end)))
            .map(str::to_owned)
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::UnusedTensors {
            path: self.path().to_owned(),
            names,
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// Finds the safetensors files of the model in `folder`.
fn find_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for stem in STEMS {
        for variant in ["", ".fp16"] {
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.is_file() {
                return Ok(vec![single]);
            }
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.is_file() {
                return find_shards(&index);
            }
        }
    }
    let expected = STEMS.map(|stem| format!("{stem}.safetensors")).join(" or ");
    let pickled = ["diffusion_pytorch_model.bin", "pytorch_model.bin"];
    let note = match pickled.iter().find(|name| folder.join(name).is_file()) {
        Some(name) => format!("; {name} is not read: save the model again as safetensors"),
        None => String::new(),
    };
    Err(Error::invalid_file(
        folder,
        format!("no model weights: expected {expected}{note}"),
    ))
}

/// The shards that an index file names.
fn find_shards(index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = read_config(index)?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    names
        .into_iter()
        .map(|name| {
            let shard = index.with_file_name(name);
            if Path::new(name).file_name() != Some(name.as_ref()) || !shard.is_file() {
                let reason = format!("names a shard `{name}` that is not in the folder");
                return Err(Error::invalid_file(index, reason));
            }
            Ok(shard)
        })
        .collect()
}

fn float_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F64 => Some(DType::F64),
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
