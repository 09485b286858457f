//! The place of a model's tensor in a file, and its conversion.

use crate::Result;
use crate::weights::file::TensorFile;

/// One tensor of a model, with the stored tensor it is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Index of the file.
    pub(crate) file: usize,
    /// Its key there.
    pub(crate) key: String,
    /// How the model's tensor is made from the stored one.
    pub(crate) change: Change,
}

/// How a tensor is made from the stored one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Unchanged.
    None,
    /// The first, second or last third of its rows, numbered from 0.
    Third(usize),
    /// A 1×1 convolution `[c_out, c_in, 1, 1]` (or `[c_out, c_in, 1]`) as the matrix
    /// `[c_out, c_in]`; a matrix stays unchanged.
    Squeeze,
    /// A transposed matrix.
    Transpose,
}

impl Change {
    /// The shape of the result for a tensor of shape `stored`.
    pub(crate) fn shape(self, stored: &[usize]) -> Vec<usize> {
        match (self, stored) {
            (Self::Third(_), [rows, columns @ ..]) => {
                [&[rows / 3], columns].concat() // whether three divides them is checked on opening
            }
            (Self::Squeeze, [c_out, c_in, 1] | [c_out, c_in, 1, 1]) => vec![*c_out, *c_in],
            (Self::Transpose, [rows, columns]) => vec![*columns, *rows],
            _ => stored.to_vec(),
        }
    }

    /// The bytes of the result for tensor `key` of `file`; only the needed part of it is read.
    pub(crate) fn bytes(self, file: &TensorFile, key: &str) -> Result<Vec<u8>> {
        match self {
            Self::None | Self::Squeeze => file.bytes(key, [0, 1]),
            Self::Third(number) => file.bytes(key, [number, 3]),
            Self::Transpose => {
                let bytes = file.bytes(key, [0, 1])?;
                Ok(match file.info(key) {
                    Some((_, &[rows, columns])) => transpose(&bytes, rows, columns),
                    _ => bytes,
                })
            }
        }
    }
}

/// Transposes a matrix whose elements have any size.
fn transpose(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let Some(size) = bytes.len().checked_div(rows * columns) else {
        return Vec::new();
    };
    let mut transposed = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let start = (row * columns + column) * size;
            transposed.extend_from_slice(&bytes[start..start + size]);
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_follow_the_change() {
        assert_eq!(Change::Third(2).shape(&[6, 4]), [2, 4]);
        assert_eq!(Change::Third(0).shape(&[6]), [2]);
        assert_eq!(Change::Squeeze.shape(&[5, 4, 1, 1]), [5, 4]);
        assert_eq!(Change::Squeeze.shape(&[5, 4, 1]), [5, 4]);
        assert_eq!(Change::Squeeze.shape(&[5, 4]), [5, 4]);
        assert_eq!(Change::Squeeze.shape(&[5, 4, 3, 3]), [5, 4, 3, 3]);
        assert_eq!(Change::Transpose.shape(&[5, 4]), [4, 5]);
        assert_eq!(Change::None.shape(&[5, 4]), [5, 4]);
    }

    #[test]
    fn elements_of_any_size_are_transposed() {
        assert_eq!(transpose(b"abcdef", 2, 3), b"adbecf");
        assert_eq!(transpose(b"aabbccddeeff", 2, 3), b"aaddbbeeccff");
        assert_eq!(transpose(b"", 0, 3), b"");
    }
}
