//! Operations of the networks with their own kernels and gradients: for f32 on the CPU, where weights
//! may be of half precision or packed in fewer bits, and for f32 and f16 on GPUs (`gpu`).
//!
//! Burn composes normalisation, attention and gates from elementary operations, and its autodiff
//! stores each of their results. The operations here take one or two passes over the memory and keep
//! only their input for the backward pass. Only inputs have a gradient: weights are constants. Layers
//! use these operations where they are [`available`], and Burn's own elsewhere.
//!
//! Feature maps are channels-last, so a convolution is a matrix product without transpositions, and
//! transformers need no transposition at all.

pub mod conv;
pub mod fused_attention;
#[cfg(all(feature = "gpu", not(test)))] // its tests need a device and are in the library
mod gpu;
pub mod gradient;
mod math;
pub mod modulation;
pub mod norm;
pub mod packed;
pub mod pointwise;
mod product;
pub mod rotation;
mod weights;
mod winograd;

use std::cell::{Cell, RefCell};

use burn::backend::Flex;
use burn::tensor::{DType, Device, GradientCheckpointingStrategy, Tensor};
use pulp::Arch;
use rayon::prelude::*;

/// The fewest floats that one task should touch.
const TASK: usize = 1 << 14;

/// The vector instructions that operations on the CPU use here, if any: `avx512`, `avx2, fma` or
/// `neon`. Without them they take many times as long.
pub fn vector_instructions() -> Option<&'static str> {
    match instructions() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => Some("avx512"),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => Some("avx2, fma"),
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => Some("neon"),
        _ => None,
    }
}

thread_local!(
    /// The vector instructions used on this thread in place of the widest.
    static CHOSEN: Cell<Option<Arch>> = const { Cell::new(None) };
);

/// The widest vector instructions of this processor, unless a test chose others.
fn instructions() -> Arch {
    CHOSEN.get().unwrap_or_default()
}

/// Runs `test` without vector instructions, and with every set that this processor has.
#[doc(hidden)]
pub fn for_each_instruction_set<T>(mut test: impl FnMut() -> T) {
    let mut sets = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        sets.extend(pulp::x86::V3::try_new().map(Arch::V3));
        sets.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    #[cfg(target_arch = "aarch64")]
    sets.extend(pulp::aarch64::Neon::try_new().map(Arch::Neon));
    for set in sets {
        CHOSEN.set(Some(set));
        test();
    }
    CHOSEN.set(None);
}

/// Whether these operations work on `x`: f32 on the CPU back end, any type on a GPU, without Burn's
/// checkpointing.
pub fn available<const D: usize>(x: &Tensor<D>) -> bool {
    differentiable(x) && (x.dtype() == DType::F32 || !on_cpu(x))
}

/// Whether `x` is on the CPU besides: what operations without a kernel for GPUs need.
pub fn available_on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    available(x) && on_cpu(x)
}

/// Whether operations on `x` can have their own gradient: without Burn's checkpointing.
pub fn differentiable<const D: usize>(x: &Tensor<D>) -> bool {
    matches!(
        x.gradient_checkpointing_strategy(),
        None | Some(GradientCheckpointingStrategy::Disabled)
    )
}

/// Whether `x` is on the CPU back end.
fn on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    x.device() == Device::flex()
}

/// A tensor's elements in row-major order, read-only.
struct Values(<Flex as burn::backend::BackendTypes>::FloatTensorPrimitive);

impl Values {
    /// `x` must be on the CPU and without autodiff, as [`available`] and
    /// [`gradient::with_gradient`] ensure.
    #[expect(clippy::expect_used, reason = "checked by all callers")]
    fn of<const D: usize>(x: Tensor<D>) -> Self {
        let primitive = x.try_into_primitive::<Flex>().expect("a tensor on the CPU");
        Self(primitive.to_contiguous())
    }

    fn as_slice(&self) -> &[f32] {
        &self.0.storage()[self.range()]
    }

    /// The range of the elements in the tensor's storage.
    fn range(&self) -> std::ops::Range<usize> {
        let start = self.0.layout().start_offset();
        start..start + self.0.layout().num_elements()
    }
}

/// A tensor of the given elements.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(
        burn::tensor::TensorData::new(values, shape),
        &Device::flex(),
    )
}

/// `len` zeros. All threads write them: the system provides fresh memory when it is first touched,
/// which takes time.
fn zeros(len: usize) -> Vec<f32> {
    const PART: usize = 1 << 10;
    if len < 2 * TASK {
        return vec![0.0; len];
    }
    let parts = (0..len.div_ceil(PART)).into_par_iter();
    let parts: Vec<[f32; PART]> = parts
        .with_min_len(TASK / PART)
        .map(|_| [0.0; PART])
        .collect();
    let mut zeros = parts.into_flattened();
    zeros.truncate(len);
    zeros
}

/// Lends `work` a buffer of `len` floats with any contents, and keeps it for the next call: fresh memory
/// would have to be cleared first, which takes as long as filling it.
fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    thread_local!(static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) });
    let mut buffer = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer = vec![0.0; len];
    }
    let result = work(&mut buffer[..len]);
    KEPT.with_borrow_mut(|kept| kept.push(buffer));
    result
}

/// Work on every chunk of an output.
///
/// Arithmetic is in `#[inline(always)]` methods of structs, which become part of the function compiled
/// for each instruction set. Closures do not, and are only for copies.
trait Kernel: Sync {
    /// Computes chunk `index`.
    fn run(&self, index: usize, out: &mut [f32]);
}

impl<F: Fn(usize, &mut [f32]) + Sync> Kernel for F {
    fn run(&self, index: usize, out: &mut [f32]) {
        self(index, out);
    }
}

/// The chunks of one task, numbered from `first`.
struct Task<'a, K> {
    kernel: &'a K,
    first: usize,
    len: usize,
    out: &'a mut [f32],
}

impl<K: Kernel> pulp::WithSimd for Task<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _simd: S) {
        for (i, chunk) in self.out.chunks_mut(self.len).enumerate() {
            self.kernel.run(self.first + i, chunk);
        }
    }
}

/// Runs `kernel` on every chunk of `len` elements of `out`, in parallel if there is enough work, with
/// the widest vector instructions available.
fn for_chunks<K: Kernel>(out: &mut [f32], len: usize, kernel: &K) {
    let simd = instructions();
    let chunks_per_task = if out.len() < 2 * TASK {
        out.len()
    } else {
        (TASK / len).max(1)
    };
    let run = |(task, out)| {
        simd.dispatch(Task {
            kernel,
            first: task * chunks_per_task,
            len,
            out,
        });
    };
    if out.len() < 2 * TASK {
        run((0, out));
    } else {
        out.par_chunks_mut(chunks_per_task * len)
            .enumerate()
            .for_each(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_vectors_of_the_processor_are_used() {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("bmi2") && has!("lzcnt");
            let avx512 =
                has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            let expected = match (avx512, avx2) {
                (true, _) => Some("avx512"),
                (false, true) => Some("avx2, fma"),
                (false, false) => None,
            };
            assert_eq!(vector_instructions(), expected);
        }
        #[cfg(target_arch = "aarch64")]
        assert_eq!(vector_instructions(), Some("neon"));
    }
}
