//! The operations of the networks as kernels for GPUs, written in
//! [CubeCL](https://docs.rs/cubecl), for f32 and f16.
//!
//! With Burn's elementary operations, a normalisation takes a dozen launches, each of which reads and
//! writes the whole feature map; here it takes one to three. Arithmetic is in f32, whatever the type of
//! the tensors. Matrix products, convolutions included, are [cubek](https://docs.rs/cubek)'s, which
//! accumulate in f32 and use tensor cores if there are any.

pub(super) mod attention;
pub(super) mod conv;
pub(super) mod norm;
pub(super) mod pointwise;

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self, CubeCount, CubeDim, calculate_cube_count_elemwise};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::kernel::matmul::{MatmulStrategy, init_matmul_output, matmul};
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::std::InputBinding;

/// Units that work on one row together.
const UNITS: u32 = 128;

/// A tensor on a GPU without autodiff, its elements in row-major order.
///
/// `x` must be on a GPU and without autodiff, as [`available`](super::available) and
/// [`with_gradient`](super::gradient::with_gradient) ensure.
fn contiguous<const D: usize>(x: Tensor<D>) -> CubeTensor {
    into_contiguous(primitive(x))
}

/// As [`contiguous`], with elements in any order.
#[expect(clippy::expect_used, reason = "checked by all callers")]
fn primitive<const D: usize>(x: Tensor<D>) -> CubeTensor {
    x.try_into_primitive::<Cube>().expect("a tensor on a GPU")
}

fn tensor<const D: usize>(x: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(x)
}

/// Allocates a result on the device of `x`.
fn empty(x: &CubeTensor, shape: &[usize], dtype: DType) -> CubeTensor {
    burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
        x.client.clone(),
        x.device.clone(),
        shape.to_vec().into(),
        dtype,
    )
}

/// The element type of `x`, in the form that kernels take.
fn elem(x: &CubeTensor) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(x.dtype)
}

/// How many numbers of `size` bytes fit into a buffer on the device of `x`, at most `most`.
fn room(x: &CubeTensor, size: usize, most: usize) -> usize {
    let bytes = x.client.properties().memory.max_page_size;
    usize::try_from(bytes).map_or(most, |bytes| most.min(bytes / size))
}

/// One cube of [`UNITS`] for each of `rows` rows.
fn by_row(x: &CubeTensor, rows: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(UNITS);
    let count = calculate_cube_count_elemwise(&x.client, rows * UNITS as usize, dim);
    (count, dim)
}

/// One unit for each of `len` elements.
fn by_element(x: &CubeTensor, len: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(256);
    (calculate_cube_count_elemwise(&x.client, len, dim), dim)
}

/// The sum of the `value`s of all units of a cube.
#[cube]
fn cube_sum(value: f32) -> f32 {
    cube_reduce(value, false)
}

/// The largest of the `value`s of all units of a cube.
#[cube]
fn cube_max(value: f32) -> f32 {
    cube_reduce(value, true)
}

/// The sum or, if `largest`, the largest of the `value`s of all units of a cube.
#[cube]
fn cube_reduce(value: f32, #[comptime] largest: bool) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut stride = CUBE_DIM as usize / 2;
    while stride > 0 {
        if unit < stride {
            let other = shared[unit + stride];
            if largest {
                shared[unit] = max(shared[unit], other);
            } else {
                shared[unit] += other;
            }
        }
        sync_cube();
        stride /= 2;
    }
    let result = shared[0];
    sync_cube();
    result
}

/// The matrix product in `dtype`; half precision accumulates in f32.
///
/// # Shapes
/// `left` `[.., n, k]`, `right` `[.., k, m]`; result `[.., n, m]`.
#[expect(clippy::expect_used, reason = "shapes and types fit")]
fn product<const D: usize>(left: Tensor<D>, right: Tensor<D>, dtype: DType) -> Tensor<D> {
    let ([n, k], m) = (
        [left.dims()[D - 2], left.dims()[D - 1]],
        right.dims()[D - 1],
    );
    let (left, right) = (primitive(left), primitive(right));
    if left.dtype != DType::F32 {
        let out = init_matmul_output(&left, &right, dtype);
        let on_tensor_cores = fastest([n, k, m]).into_iter().any(|strategy| {
            let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
                lhs: elem(&left),
                rhs: elem(&right),
                out: elem(&out),
            });
            let input = |x: &CubeTensor| InputBinding::new(x.clone().binding(), elem(x));
            let (x, y) = (input(&left), input(&right));
            let out = out.clone().binding();
            launch_ref(&strategy.into(), &left.client, x, y, out, &mut elems).is_ok()
        });
        if on_tensor_cores {
            return tensor(out);
        }
    }
    let product = matmul(left, right, None, MatmulStrategy::Cube, dtype);
    tensor(product.expect("matrices that fit"))
}

/// Cubek's strategies for matrix products of half precision on tensor cores, fastest first, as measured
/// on an H100 (docs/performance.md). Burn's autotuning tries all of them for every shape, and had not
/// finished a step of Stable Diffusion 1.5 after a minute.
fn fastest([n, k, m]: [usize; 3]) -> Vec<Strategy> {
    let tile_matmul = TileMatmulKind::Cmma;
    let simple = |multi_rows| {
        Strategy::SimpleCyclicCmma(Inferred(SimpleArgs {
            multi_rows,
            tile_matmul,
        }))
    };
    if n >= 4096 || n * m >= 1 << 23 {
        return vec![simple(true), simple(false)];
    }
    let mut strategies = vec![simple(false)];
    if [n, k, m].iter().all(|size| size % 64 == 0) {
        let ordered = OrderedSelectionArgs {
            partition_k: Some(2),
            row_count: Some(4),
            rows_per_plane: Some(2),
            tile_matmul,
        };
        strategies.insert(0, Strategy::OrderedDoubleCmma(Inferred(ordered)));
    }
    strategies
}
