//! The header of a GGUF file ([specification](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use dinv_kernels::packed::{Ggml, Packing};
use safetensors::Dtype;

use crate::weights::file::{Header, Stored};
use crate::{Error, Result};

/// What a file begins with.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors begin, unless the file says otherwise: at multiples of this many bytes.
const ALIGNMENT: u64 = 32;
/// The most dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 8;
/// Metadata with the shapes that tensors had before they were stored with fewer dimensions (ComfyUI-GGUF).
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";
/// The names of numbered types that are not read, as far as files of diffusion models have them.
const UNREAD: [(u32, &str); 11] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (39, "MXFP4"),
];

/// A value of the metadata, as far as it is looked at.
enum Value {
    Text(String),
    Number(u64),
    Numbers(Vec<u64>),
    Other,
}

/// Reads from what is left of a file.
struct Reader<'a, R> {
    file: R,
    path: &'a Path,
    /// Bytes that were read.
    at: u64,
    /// Bytes of the whole file.
    length: u64,
}

impl<R: Read> Reader<'_, R> {
    fn cut_off(&self) -> Error {
        let reason = format!(
            "truncated: the header of a GGUF file extends beyond its {} bytes",
            self.length
        );
        Error::invalid_file(self.path, reason)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file
            .read_exact(&mut bytes)
            .map_err(|_| self.cut_off())?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A count of things that have at least one byte each.
    fn count(&mut self) -> Result<u64> {
        let count = self.u64()?;
        match count <= self.length - self.at.min(self.length) {
            true => Ok(count),
            false => Err(self.cut_off()),
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = self.count()?;
        let mut bytes = Vec::new();
        let taken = (&mut self.file).take(length).read_to_end(&mut bytes);
        if taken.map_err(Error::io(self.path))? as u64 != length {
            return Err(self.cut_off());
        }
        self.at += length;
        String::from_utf8(bytes)
            .map_err(|_| Error::invalid_file(self.path, "a name in its header is not UTF-8"))
    }

    /// A value of this type; arrays are one level deep, as in all files there are.
    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 | 1 | 7 => Value::Number(u64::from(self.bytes::<1>()?[0])),
            2 | 3 => Value::Number(u64::from(u16::from_le_bytes(self.bytes()?))),
            4 | 5 => Value::Number(u64::from(self.u32()?)),
            6 => {
                self.u32()?;
                Value::Other
            }
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, count) = (self.u32()?, self.count()?);
                if kind == 9 {
                    let reason = "an array of arrays in its metadata, which is not read";
                    return Err(Error::invalid_file(self.path, reason));
                }
                let mut numbers = Vec::new();
                for _ in 0..count {
                    if let Value::Number(number) = self.value(kind)? {
                        numbers.push(number);
                    }
                }
                Value::Numbers(numbers)
            }
            10 | 11 => Value::Number(self.u64()?),
            12 => {
                self.u64()?;
                Value::Other
            }
            other => {
                let reason = format!("metadata of type {other}, which GGUF does not have");
                return Err(Error::invalid_file(self.path, reason));
            }
        })
    }
}

/// Reads the header behind the [magic](MAGIC), of a file of `length` bytes, and checks that every tensor lies
/// within it.
pub(super) fn read_header(file: impl Read, length: u64, path: &Path) -> Result<Header> {
    let mut reader = Reader {
        file,
        path,
        at: MAGIC.len() as u64,
        length,
    };
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let version = reader.u32()?;
    if [2, 3].contains(&version.swap_bytes()) {
        return Err(invalid(
            "a big-endian GGUF file, which is not read".to_owned(),
        ));
    }
    if ![2, 3].contains(&version) {
        return Err(invalid(format!(
            "version {version} of GGUF, of which 2 and 3 are read"
        )));
    }
    let (tensors, pairs) = (reader.count()?, reader.count()?);
    let (mut metadata, mut shapes) = (BTreeMap::new(), BTreeMap::new());
    let mut alignment = ALIGNMENT;
    for _ in 0..pairs {
        let key = reader.text()?;
        let kind = reader.u32()?;
        match (reader.value(kind)?, key.strip_prefix(ORIGINAL_SHAPE)) {
            (Value::Numbers(numbers), Some(name)) => {
                shapes.insert(name.to_owned(), numbers);
            }
            (Value::Number(number), _) if key == "general.alignment" => alignment = number,
            (Value::Text(text), _) => {
                metadata.insert(key, text);
            }
            _ => {}
        }
    }
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(invalid(format!("tensors aligned to {alignment} bytes")));
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = reader.text()?;
        let dimensions = reader.u32()?;
        if dimensions > MOST_DIMENSIONS {
            let reason = format!("tensor `{name}` has {dimensions} dimensions");
            return Err(invalid(reason));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(reader.u64()?);
        }
        shape.reverse(); // the fastest comes first in the file
        let (kind, offset) = (reader.u32()?, reader.u64()?);
        found.push((name, shape, kind, offset));
    }
    let start = reader.at.next_multiple_of(alignment);
    let mut header = Header {
        metadata,
        ..Header::default()
    };
    for (name, shape, kind, offset) in found {
        if !offset.is_multiple_of(alignment) {
            return Err(invalid(format!(
                "tensor `{name}` begins at {offset}, which is not a multiple of {alignment}"
            )));
        }
        let size = |n: &u64| usize::try_from(*n).ok();
        let shape: Option<Vec<usize>> = shape.iter().map(size).collect();
        let stored = shape.and_then(|shape| stored(shape, kind, start.checked_add(offset)?));
        let Some(mut stored) = stored else {
            return Err(invalid(unread(&name, kind)));
        };
        if stored
            .start
            .checked_add(stored.length)
            .is_none_or(|end| end > length)
        {
            return Err(invalid(format!(
                "truncated: tensor `{name}` ends beyond the file's {length} bytes"
            )));
        }
        let original: Option<Vec<usize>> =
            (shapes.get(&name)).and_then(|shape| shape.iter().map(size).collect());
        let is_same = |shape: &Vec<usize>| product(shape) == product(&stored.shape);
        if let Some(shape) = original.filter(is_same) {
            stored.shape = shape;
        }
        if header.tensors.insert(name.clone(), stored).is_some() {
            return Err(invalid(format!("tensor `{name}` is there twice")));
        }
    }
    Ok(header)
}

fn product(shape: &[usize]) -> Option<usize> {
    (shape.iter()).try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// A tensor of a numbered type; nothing if its type is not read, or its rows are no whole blocks.
fn stored(shape: Vec<usize>, kind: u32, start: u64) -> Option<Stored> {
    let numbers = product(&shape)?;
    let (dtype, packing, bytes) = match kind {
        0 => (Dtype::F32, None, numbers.checked_mul(4)?),
        1 => (Dtype::F16, None, numbers.checked_mul(2)?),
        30 => (Dtype::BF16, None, numbers.checked_mul(2)?),
        _ => {
            let ggml = Ggml::numbered(kind)?;
            let [block, size] = ggml.block();
            let is_whole = shape.last().is_some_and(|row| row.is_multiple_of(block));
            let bytes = (numbers / block).checked_mul(size)?;
            let packing = is_whole.then_some(Packing::Ggml(ggml))?;
            (Dtype::F32, Some(packing), bytes)
        }
    };
    Some(Stored {
        dtype,
        shape,
        start,
        length: bytes as u64,
        packing,
    })
}

/// What is wrong with a tensor that is not read.
fn unread(name: &str, kind: u32) -> String {
    match UNREAD.iter().find(|(number, _)| *number == kind) {
        Some((_, title)) => format!(
            "tensor `{name}` is of type {title}, which is not read: take a file in Q8_0, Q6_K, Q5_K, Q4_K, BF16 \
             or F16"
        ),
        None if Ggml::numbered(kind).is_some() => {
            format!("tensor `{name}` has rows that are not whole blocks of its type")
        }
        None if [0, 1, 30].contains(&kind) => format!("tensor `{name}` is larger than any file"),
        None => format!(
            "tensor `{name}` is of type number {kind}, which is not read: take a file in Q8_0, \
             Q6_K, Q5_K, Q4_K, BF16 or F16"
        ),
    }
}
