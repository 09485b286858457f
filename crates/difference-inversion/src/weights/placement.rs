//! The place of a model's tensor in a file, and its conversion.

use crate::Result;
use crate::weights::file::TensorFile;

/// One tensor of a model: the stored tensor that it is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Index of the file.
    pub(crate) file: usize,
    /// Its key there.
    pub(crate) key: String,
    /// How the model's tensor is made from the stored one.
    pub(crate) change: Change,
}

/// How a tensor is made from the one that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// As it is.
    None,
    /// Of its rows, those from `start` to `end` parts of `of`.
    Rows { start: usize, end: usize, of: usize },
    /// The second half of its rows, then the first.
    SwapHalves,
    /// A 1×1 convolution `[c_out, c_in, 1, 1]` (or `[c_out, c_in, 1]`) as the matrix
    /// `[c_out, c_in]`; a matrix stays as it is.
    Squeeze,
    /// A matrix with rows and columns exchanged.
    Transpose,
}

impl Change {
    /// The first, second or last third of the rows, numbered from 0.
    pub(crate) const fn third(number: usize) -> Self {
        Self::Rows {
            start: number,
            end: number + 1,
            of: 3,
        }
    }

    /// What number must divide the rows of the stored tensor.
    pub(crate) fn parts(self) -> usize {
        match self {
            Self::Rows { of, .. } => of,
            Self::SwapHalves => 2,
            _ => 1,
        }
    }

    /// The rows of the stored tensor, of those made from it.
    pub(crate) fn stored_rows(self, rows: usize) -> usize {
        match self {
            Self::Rows { start, end, of } => rows * of / (end - start).max(1),
            _ => rows,
        }
    }

    /// The shape made from a tensor of shape `stored`.
    pub(crate) fn shape(self, stored: &[usize]) -> Vec<usize> {
        match (self, stored) {
            (Self::Rows { start, end, of }, [rows, columns @ ..]) => {
                [&[rows / of * (end - start)], columns].concat() // whether it divides them is checked on opening
            }
            (Self::Squeeze, [c_out, c_in, 1] | [c_out, c_in, 1, 1]) => vec![*c_out, *c_in],
            (Self::Transpose, [rows, columns]) => vec![*columns, *rows],
            _ => stored.to_vec(),
        }
    }

    /// The bytes of what is made from tensor `key` of `file`; no more of it is read than needed.
    pub(crate) fn bytes(self, file: &TensorFile, key: &str) -> Result<Vec<u8>> {
        let bytes = self.rows(|part| file.bytes(key, part))?;
        Ok(match (self, file.info(key)) {
            (Self::Transpose, Some((_, &[rows, columns]))) => transpose(&bytes, rows, columns),
            _ => bytes,
        })
    }

    /// The same as the file packs them, row by row; not of what is transposed.
    pub(super) fn stored_bytes(self, file: &TensorFile, key: &str) -> Result<Vec<u8>> {
        self.rows(|part| file.stored_bytes(key, part))
    }

    /// The stored rows that it is made from, of which `read` reads the parts from one to another of so many.
    fn rows(self, read: impl Fn([usize; 3]) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        match self {
            Self::None | Self::Squeeze | Self::Transpose => read([0, 1, 1]),
            Self::Rows { start, end, of } => read([start, end, of]),
            Self::SwapHalves => {
                let [mut second, first] = [read([1, 2, 2])?, read([0, 1, 2])?];
                second.extend_from_slice(&first);
                Ok(second)
            }
        }
    }
}

/// Exchanges the rows and columns of a matrix whose elements have any size.
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
        assert_eq!(Change::third(2).shape(&[6, 4]), [2, 4]);
        assert_eq!(Change::third(0).shape(&[6]), [2]);
        let most = Change::Rows {
            start: 3,
            end: 7,
            of: 7,
        };
        assert_eq!(most.shape(&[14, 5]), [8, 5]);
        assert_eq!(Change::SwapHalves.shape(&[6, 4]), [6, 4]);
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
