//! Low-rank changes (LoRA) of a model's tensors, added when the tensors are read.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use sha2::{Digest, Sha256};

use crate::util::tensors::host;
use crate::weights::file::TensorFile;
use crate::weights::float_dtype;
use crate::weights::placement::Change;
use crate::{Error, Result};

/// A change of a matrix or kernel W: `W + scale · up · down`
/// ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)); a convolution's kernel has its columns side by side.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    pub(crate) file: Arc<TensorFile>,
    /// The tensor [rank, columns…].
    pub(crate) down: String,
    /// The tensor [rows, rank].
    pub(crate) up: String,
    /// How W is made of the trained layer, and so its change of `up`'s rows.
    pub(crate) part: Change,
    pub(crate) scale: f64,
    /// Its name for messages: the file's name and its weight.
    pub(crate) name: String,
}

impl LowRank {
    /// The change, [rows, columns], f32 on the CPU.
    fn change(&self) -> Result<Tensor<2>> {
        let up = matrix(&self.file, &self.up)?;
        let [rows, _] = up.dims();
        let up = match self.part {
            Change::Rows { start, end, of } => up.slice([rows * start / of..rows * end / of]),
            Change::SwapHalves => {
                let halves = [rows / 2..rows, 0..rows / 2].map(|half| up.clone().slice([half]));
                Tensor::cat(halves.to_vec(), 0)
            }
            Change::None | Change::Squeeze | Change::Transpose => up,
        }; // [rows, rank]
        let down = matrix(&self.file, &self.down)?; // [rank, columns]
        Ok(up.matmul(down).mul_scalar(self.scale))
    }

    /// Adds the identity of the change to a hash.
    pub(super) fn hash(&self, hash: &mut Sha256) -> Result<()> {
        hash.update(self.scale.to_le_bytes());
        for key in [&self.up, &self.down] {
            let numbers = numbers(&self.file, key)?;
            hash.update((numbers.len() as u64).to_le_bytes());
            numbers
                .iter()
                .for_each(|number| hash.update(number.to_le_bytes()));
        }
        Ok(())
    }
}

/// A tensor from its bytes, with all of `changes` added, in f32.
pub(super) fn merged<const D: usize>(
    bytes: Vec<u8>,
    shape: [usize; D],
    dtype: DType,
    changes: &[LowRank],
) -> Result<TensorData> {
    let mut weight = on_cpu(bytes, &shape, dtype);
    for change in changes {
        weight = weight + change.change()?;
    }
    Ok(weight.reshape(shape).into_data())
}

/// All numbers of a tensor of `file`.
pub(crate) fn numbers(file: &TensorFile, key: &str) -> Result<Vec<f32>> {
    Ok(host(matrix(file, key)?))
}

/// A tensor of `file` as the matrix of its first dimension and all others.
fn matrix(file: &TensorFile, key: &str) -> Result<Tensor<2>> {
    let wrong = |found: String| Error::Tensor {
        path: file.path().to_owned(),
        name: key.to_owned(),
        expected: "numbers of f16, bf16, f32 or f64".to_owned(),
        found,
    };
    let Some((dtype, shape)) = file.info(key) else {
        return Err(wrong("no such tensor".to_owned()));
    };
    let Some(float) = float_dtype(dtype) else {
        return Err(wrong(format!("elements of type {dtype:?}")));
    };
    Ok(on_cpu(file.bytes(key, [0, 1, 1])?, shape, float))
}

/// Numbers as the matrix of their first dimension and all others, f32 on the CPU.
fn on_cpu(bytes: Vec<u8>, shape: &[usize], dtype: DType) -> Tensor<2> {
    let rows = shape.first().copied().unwrap_or(1);
    let columns = shape.iter().skip(1).product();
    let data = TensorData::from_bytes_vec(bytes, [rows, columns], dtype);
    Tensor::from_data(
        data.convert_dtype(DType::F32),
        (&Device::flex(), DType::F32),
    )
}
