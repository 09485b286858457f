//! Reads model weights and their configuration from disk.

pub(crate) mod file;
pub(crate) mod folder;
mod gguf;
pub(crate) mod json;
pub(crate) mod low_rank;
pub(crate) mod placement;
mod scales;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use dinv_kernels::conv::Matrix;
use dinv_kernels::packed::{Packed, Packing};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use self::file::TensorFile;
use self::folder::Found;
pub(crate) use self::folder::{STEMS, shards_come_first, suffixes};
pub use self::json::{
    OtherFields, PerBlock, check_fixed_fields, from_value, parse_config, read_config,
};
use self::low_rank::{LowRank, merged};
use self::placement::{Change, Placement};
use crate::util::digest::hex;
use crate::util::tensors::host;
use crate::{Error, Result};

/// The tensors of one model, addressed by their dotted keys and read on demand.
///
/// A `Weights` is a view under a key prefix ([`scope`](Self::scope)). Views of the same model are
/// cheap and share the record of the tensors read, so that
/// [`check_all_used`](Self::check_all_used) reports whether the model used all of them.
#[derive(Debug, Clone)]
pub struct Weights {
    store: Arc<Store>,
    prefix: String,
}

#[derive(Debug)]
struct Store {
    /// The file or folder given by the user.
    path: PathBuf,
    files: Vec<Arc<TensorFile>>,
    /// The location of every tensor.
    index: BTreeMap<String, Placement>,
    /// Changes added to tensors.
    changes: Changes,
    used: Mutex<BTreeSet<String>>,
    device: Device,
    /// The element type of matrices and kernels.
    dtype: FloatDType,
    /// The element type of everything else, and of computations.
    compute: FloatDType,
    /// Whether matrices of linear layers are held with 8 bits a number.
    q8: bool,
}

/// The low-rank changes of tensors, by their keys.
pub(crate) type Changes = BTreeMap<String, Vec<LowRank>>;

/// The changes of a network, for records and comparisons.
#[derive(Debug, Clone)]
pub(crate) struct Adapters {
    /// SHA-256 of all of them.
    pub(crate) digest: String,
    /// Their names for messages.
    pub(crate) names: Vec<String>,
}

/// Parts of the keys of lookup tables: token and position embeddings.
const TABLES: [&str; 4] = [
    "embedding",
    "embed_tokens",
    "shared.weight",
    "attention_bias",
];

/// Whether a tensor is read as a [`matrix`](Weights::matrix).
fn is_matrix(key: &str, shape: &[usize]) -> bool {
    shape.len() > 1 && !TABLES.iter().any(|part| key.contains(part))
}

/// How a matrix is held in fewer bits than a float has.
enum Held {
    /// As its file has it.
    AsStored(Packing),
    /// Packed when it is read.
    InEightBits,
}

impl Held {
    fn packing(&self) -> Packing {
        match self {
            Self::AsStored(packing) => *packing,
            Self::InEightBits => Packed::Q8,
        }
    }
}

/// The element type of computations on `device` with weights of type `dtype`: f32 on the CPU, which has no
/// fast half-precision arithmetic, and `dtype` elsewhere.
#[must_use]
pub fn compute_dtype(device: &Device, dtype: FloatDType) -> FloatDType {
    if *device == Device::flex() {
        FloatDType::F32
    } else {
        dtype
    }
}

impl Weights {
    /// Opens a safetensors file, or the folder of a model saved by diffusers or transformers:
    /// `diffusion_pytorch_model` or `model`, `.safetensors` or `.fp16.safetensors`, in one file or
    /// in shards listed by `….safetensors.index.json`. If there are both, the one without `fp16`
    /// is used. Tensors are converted to `dtype` on `device` when they are read.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::InvalidFile`] if the folder has no
    /// safetensors, a file is truncated or not a safetensors file, or shards and their index
    /// disagree.
    pub fn open(path: &Path, device: &Device, dtype: FloatDType) -> Result<Self> {
        Self::open_variant(path, None, device, dtype)
    }

    /// As [`open`](Self::open), for weights saved as a variant such as `fp16` if there are any.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_variant(
        path: &Path,
        variant: Option<&str>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self> {
        let found = if path.is_dir() {
            folder::find_files(path, variant)?
        } else {
            folder::refuse_pickled(path)?;
            Found {
                files: vec![path.to_owned()],
                index: None,
            }
        };
        let files = (found.files.iter())
            .map(|path| TensorFile::open(path).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let index = index_of(&files)?;
        if let Some((path, weight_map)) = &found.index {
            check_index(path, weight_map, &files, &index)?;
        }
        Ok(Self::new(path, files, unwrapped(index), device, dtype))
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
        let files = vec![Arc::new(TensorFile::from_bytes(bytes, name.as_ref())?)];
        let index = index_of(&files)?;
        Ok(Self::new(name.as_ref(), files, index, device, dtype))
    }

    /// The tensors of a model that are in `files` as described by `index`.
    pub(crate) fn new(
        path: &Path,
        files: Vec<Arc<TensorFile>>,
        index: BTreeMap<String, Placement>,
        device: &Device,
        dtype: FloatDType,
    ) -> Self {
        let store = Store {
            path: path.to_owned(),
            files,
            index,
            changes: Changes::new(),
            used: Mutex::new(BTreeSet::new()),
            device: device.clone(),
            dtype,
            compute: compute_dtype(device, dtype),
            q8: false,
        };
        Self {
            store: Arc::new(store),
            prefix: String::new(),
        }
    }

    /// The same without the tensors whose keys satisfy `are_strays`.
    pub(crate) fn without(self, are_strays: impl Fn(&str) -> bool) -> Self {
        if !self.keys().any(&are_strays) {
            return self;
        }
        self.with_store(|store| store.index.retain(|key, _| !are_strays(key)))
    }

    /// The same tensors with `changes` added to them, computed in f32 before they are converted.
    pub(crate) fn changed(self, changes: Changes) -> Self {
        if changes.is_empty() {
            return self;
        }
        self.with_store(|store| store.changes = changes)
    }

    /// The same tensors for computations in f32 where they would be in f16, as text encoders need whose hidden
    /// states overflow there. Matrices are still held in f16.
    pub(crate) fn in_wide_range(self) -> Self {
        match self.store.compute {
            FloatDType::F16 => self.with_store(|store| store.compute = FloatDType::F32),
            _ => self,
        }
    }

    /// The same with the matrices of linear layers in blocks of 8 bits, on the CPU, unless the file packs them.
    #[must_use]
    pub fn in_8_bits(self) -> Self {
        self.with_store(|store| store.q8 = true)
    }

    /// The same after a change, none of it read yet.
    fn with_store(self, change: impl FnOnce(&mut Store)) -> Self {
        let mut store = Store {
            path: self.store.path.clone(),
            files: self.store.files.clone(),
            index: self.store.index.clone(),
            changes: self.store.changes.clone(),
            used: Mutex::new(BTreeSet::new()),
            device: self.store.device.clone(),
            dtype: self.store.dtype,
            compute: self.store.compute,
            q8: self.store.q8,
        };
        change(&mut store);
        Self {
            store: Arc::new(store),
            ..self
        }
    }

    /// The changes added to the tensors, if any.
    pub(crate) fn adapters(&self) -> Result<Option<Adapters>> {
        let changes = &self.store.changes;
        if changes.is_empty() {
            return Ok(None);
        }
        let mut hash = Sha256::new();
        let mut names = Vec::new();
        for (key, changes) in changes {
            hash.update(key);
            for change in changes {
                change.hash(&mut hash)?;
                if !names.contains(&change.name) {
                    names.push(change.name.clone());
                }
            }
        }
        Ok(Some(Adapters {
            digest: hex(hash),
            names,
        }))
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
        let place = self.store.index.get(&self.key(name))?;
        let (_, stored) = self.store.files[place.file].info(&place.key)?;
        Some(place.change.shape(stored))
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
        let pairs = self.store.files.iter().flat_map(|file| file.metadata());
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.store.path
    }

    /// The path named by errors about the model's configuration: `config.json` next to the
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
        self.store.files.iter().map(|file| file.path())
    }

    /// The stored size of this view's tensors, in bytes.
    pub fn bytes(&self) -> u64 {
        let tensors = self.store.index.iter();
        let of_view = tensors.filter(|(key, _)| key.starts_with(&self.prefix));
        let places: BTreeSet<(usize, &str)> = of_view
            .map(|(_, place)| (place.file, place.key.as_str()))
            .collect();
        let size = |(file, key): (usize, &str)| self.store.files[file].size(key);
        places.into_iter().map(size).sum()
    }

    /// The device of the tensors.
    pub fn device(&self) -> &Device {
        &self.store.device
    }

    /// The element type of matrices, see [`matrix`](Self::matrix).
    pub fn dtype(&self) -> FloatDType {
        self.store.dtype
    }

    /// The element type of everything else, and of computations.
    pub(crate) fn compute(&self) -> FloatDType {
        self.store.compute
    }

    /// Reads tensor `name`, which must have this `shape` and be of a floating-point type, in the
    /// [type of computations](compute_dtype).
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, of another shape, or not of a floating-point type;
    /// [`Error::Io`] if it cannot be read.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        self.read(name, shape, self.store.compute)
    }

    /// As [`tensor`](Self::tensor), in the requested type: for the large matrices and kernels, which their
    /// layers convert on every use.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn matrix<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        self.read(name, shape, self.store.dtype)
    }

    /// As [`matrix`](Self::matrix), for a linear layer: on the CPU, a matrix that the file packs stays packed unless it
    /// is changed, and others are packed [in 8 bits](Self::in_8_bits) if that is wanted and their rows are whole blocks.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        let (key, file, place, _) = self.found(name, shape)?;
        let packed = match self.packing(&key, place, shape) {
            None => None,
            Some(Held::AsStored(packing)) => {
                let bytes = place.change.stored_bytes(file, &place.key)?;
                Packed::new(packing, bytes, shape)
            }
            Some(Held::InEightBits) => {
                let values = self.read(name, shape, FloatDType::F32)?;
                Packed::q8(&host(values), shape)
            }
        };
        match packed {
            Some(packed) => {
                self.mark_used(key);
                Ok(Matrix::Packed(Arc::new(packed)))
            }
            None => self.matrix(name, shape).map(Matrix::from),
        }
    }

    /// How the matrix at `place` is packed in memory, if it is. `key` is its full one.
    fn packing(&self, key: &str, place: &Placement, [_, columns]: [usize; 2]) -> Option<Held> {
        if self.store.device != Device::flex() {
            return None;
        }
        let stored = self.store.files[place.file].packing(&place.key);
        let is_as_stored =
            place.change != Change::Transpose && !self.store.changes.contains_key(key);
        let held = match stored.filter(|_| is_as_stored) {
            Some(packing) => Held::AsStored(packing),
            None if self.store.q8 => Held::InEightBits,
            None => return None,
        };
        let [numbers, _] = held.packing().block();
        columns.is_multiple_of(numbers).then_some(held)
    }

    /// Where tensor `name` is, with its full key and its type, if it has this shape.
    fn found<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> Result<(String, &TensorFile, &Placement, DType)> {
        let key = self.key(name);
        let wrong = |path: &Path, name: String, found: String| Error::Tensor {
            path: path.to_owned(),
            name,
            expected: format!("shape {shape:?}"),
            found,
        };
        let stored = self.store.index.get(&key).and_then(|place| {
            let file = &self.store.files[place.file];
            Some((file, place, file.info(&place.key)?))
        });
        let Some((file, place, (dtype, stored))) = stored else {
            return Err(wrong(self.path(), key, "no such tensor".to_owned()));
        };
        let name = match place.key == key {
            true => key.clone(),
            false => format!("{key}` from `{}", place.key),
        };
        let found = place.change.shape(stored);
        if found != shape {
            return Err(wrong(file.path(), name, format!("shape {found:?}")));
        }
        let Some(dtype) = float_dtype(dtype) else {
            if let Some(bits) = size_in_bits(dtype) {
                let reason = format!(
                    "its numbers have {bits} bits ({dtype:?}, such as those of `{name}`), which are not read: \
                     take the file in fp16, bf16 or fp32"
                );
                return Err(Error::invalid_file(file.path(), reason));
            }
            let found = format!("elements of type {dtype:?}, not f16, bf16, f32 or f64");
            return Err(wrong(file.path(), name, found));
        };
        Ok((key, file, place, dtype))
    }

    fn read<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        as_dtype: FloatDType,
    ) -> Result<Tensor<D>> {
        let (key, file, place, dtype) = self.found(name, shape)?;
        let bytes = place.change.bytes(file, &place.key)?;
        let data = match self.store.changes.get(&key) {
            Some(changes) => merged(bytes, shape, dtype, changes)?,
            None => TensorData::from_bytes_vec(bytes, shape, dtype),
        };
        let data = data.convert_dtype(as_dtype.into());
        self.mark_used(key);
        Ok(Tensor::from_data(
            data,
            (&self.store.device, as_dtype.into()),
        ))
    }

    fn mark_used(&self, key: String) {
        let mut used = (self.store.used.lock()).unwrap_or_else(PoisonError::into_inner);
        used.insert(key);
    }

    /// The memory of this view's tensors in bytes: matrices and kernels in the requested type or packed, everything
    /// else in the type of computations.
    pub fn bytes_in_memory(&self) -> u64 {
        self.bytes_in_memory_of(|_| true)
    }

    /// The bytes of a matrix that [`linear`](Self::linear) packs; `key` is its full one.
    fn packed_size(&self, key: &str, shape: &[usize]) -> Option<u64> {
        let &[rows, columns] = shape else { return None };
        let held = self.packing(key, self.store.index.get(key)?, [rows, columns])?;
        let [numbers, size] = held.packing().block();
        Some((rows * (columns / numbers) * size) as u64)
    }

    /// The same for the tensors whose full keys satisfy `are_needed`.
    pub(crate) fn bytes_in_memory_of(&self, are_needed: impl Fn(&str) -> bool) -> u64 {
        let size = |key: &str| {
            let shape = self.shape(key.strip_prefix(&self.prefix)?)?;
            let is_matrix = is_matrix(key, &shape);
            let dtype = match is_matrix {
                true => self.store.dtype,
                false => self.store.compute,
            };
            let elements: u64 = shape.iter().map(|&size| size as u64).product();
            let packed = self.packed_size(key, &shape).filter(|_| is_matrix);
            Some(packed.unwrap_or(elements * DType::from(dtype).size() as u64))
        };
        (self.keys().filter(|key| are_needed(key)))
            .filter_map(size)
            .sum()
    }

    /// Checks that every tensor of this view has been read, except those whose key ends with one of
    /// `ignored` (buffers such as `position_ids`): unused tensors indicate that the configuration is
    /// wrong.
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

    /// Marks tensors of this view as read if their keys after its prefix satisfy `are_known`.
    pub(crate) fn ignore(&self, are_known: impl Fn(&str) -> bool) {
        let keys = self
            .keys()
            .filter(|key| are_known(&key[self.prefix.len()..]));
        let mut used = self
            .store
            .used
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        used.extend(keys.map(str::to_owned));
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// The tensors of some files under their own keys.
fn index_of(files: &[Arc<TensorFile>]) -> Result<BTreeMap<String, Placement>> {
    let mut index = BTreeMap::new();
    for (number, file) in files.iter().enumerate() {
        for key in file.names() {
            let place = Placement {
                file: number,
                key: key.clone(),
                change: Change::None,
            };
            if index.insert(key.clone(), place).is_some() {
                let reason = format!("tensor `{key}` is also in another file of this model");
                return Err(Error::invalid_file(file.path(), reason));
            }
        }
    }
    Ok(index)
}

/// The prefixes that training wrappers add to every key: `torch.compile` and `DataParallel`.
const WRAPPERS: [&str; 2] = ["_orig_mod.", "module."];

/// The same without the wrapper that a model was saved with.
fn unwrapped(index: BTreeMap<String, Placement>) -> BTreeMap<String, Placement> {
    let is_around =
        |wrapper: &&&str| !index.is_empty() && index.keys().all(|key| key.starts_with(**wrapper));
    let Some(wrapper) = WRAPPERS.iter().find(is_around) else {
        return index;
    };
    let bare = |(key, place): (String, Placement)| (key[wrapper.len()..].to_owned(), place);
    unwrapped(index.into_iter().map(bare).collect())
}

/// Checks that shards have exactly the tensors listed in their index.
fn check_index(
    path: &Path,
    weight_map: &BTreeMap<String, String>,
    files: &[Arc<TensorFile>],
    index: &BTreeMap<String, Placement>,
) -> Result<()> {
    for (key, shard) in weight_map {
        let holder = index.get(key).map(|place| files[place.file].path());
        if holder != Some(&path.with_file_name(shard)) {
            let reason = format!("says that tensor `{key}` is in `{shard}`, where it is not");
            return Err(Error::invalid_file(path, reason));
        }
    }
    match index.keys().find(|key| !weight_map.contains_key(*key)) {
        Some(key) => {
            let reason = format!("does not name tensor `{key}`, which a shard holds");
            Err(Error::invalid_file(path, reason))
        }
        None => Ok(()),
    }
}

/// The bits of an element, if there are so few that the weights are quantised.
fn size_in_bits(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    (bits <= 8 && dtype != Dtype::BOOL).then_some(bits)
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
