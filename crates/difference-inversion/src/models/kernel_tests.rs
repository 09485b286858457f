//! The kernels against Burn's own operations, which layers use under gradient checkpointing.

use std::cell::Cell;

use burn::tensor::{DType, Device, GradientCheckpointingStrategy, Tensor};
use dinv_kernels::{available, for_each_instruction_set, vector_instructions};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::models::denoiser::joint_block::{gated, modulated};
use crate::models::feature_map::{Conv2d, GroupNorm, resize_nearest};
use crate::models::layers::{
    Activation, LayerNorm, Linear, Mask, RmsNorm, gated_gelu, multi_head_attention,
    weighted_attention,
};
use crate::models::rotation::{Pairs, Rotation};
use crate::weights::Weights;

/// Largest difference relative to the largest value; Winograd's transforms cost a digit, and differences up to
/// 2.1e-5 occurred.
const TOLERANCE: f32 = 4e-5;
/// The least value that counts as the largest: in its tail, GELU is nearly 0, and Φ is accurate only to 1e-7.
const SMALLEST: f32 = 1e-2;

/// The functions of one number that have a kernel.
const FUNCTIONS: [Activation; 4] = [
    Activation::Silu,
    Activation::QuickGelu,
    Activation::Gelu,
    Activation::GeluTanh,
];

thread_local!(
    /// How many tensors of random numbers this thread has drawn.
    static DRAWN: Cell<u64> = const { Cell::new(0) };
);

/// Normal numbers: different at every call, the same in every run of a test.
fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let seed = DRAWN.replace(DRAWN.get() + 1);
    crate::util::random::normal(&mut ChaCha8Rng::seed_from_u64(seed), shape, &Device::flex())
}

fn weights(tensors: &[(&str, &[usize])]) -> Weights {
    weights_in(tensors, burn::tensor::FloatDType::F32)
}

fn weights_in(tensors: &[(&str, &[usize])], dtype: burn::tensor::FloatDType) -> Weights {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            random([shape.iter().product()])
                .into_data()
                .as_bytes()
                .to_vec()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes);
        (*name, view.unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    Weights::from_bytes(file, "test", &Device::flex(), dtype).unwrap()
}

fn assert_close<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    let largest = largest.max(SMALLEST);
    let error = (found - expected).abs().max().into_scalar::<f32>() / largest;
    assert!(
        error <= TOLERANCE,
        "{what}: relative error {error:.1e} with {:?}",
        vector_instructions()
    );
}

/// Compares results and gradients of the fused `run`, with every instruction set, and of the composed one.
fn compare<const N: usize, const D: usize, const R: usize>(
    shapes: [[usize; D]; N],
    run: impl Fn([Tensor<D>; N]) -> Tensor<R>,
) {
    // The same numbers for every set, so that later draws do not depend on the processor.
    let first = DRAWN.get();
    for_each_instruction_set(|| {
        DRAWN.set(first);
        compare_with(shapes.map(random), &run);
    });
}

fn compare_with<const N: usize, const D: usize, const R: usize>(
    inputs: [Tensor<D>; N],
    run: impl Fn([Tensor<D>; N]) -> Tensor<R>,
) {
    let balanced = GradientCheckpointingStrategy::Balanced;
    let leaves = [false, true].map(|composed| {
        inputs.clone().map(|input| {
            let leaf = input.autodiff();
            let leaf = if composed {
                leaf.with_gradient_checkpointing_strategy(balanced)
            } else {
                leaf
            };
            leaf.require_grad()
        })
    });
    assert!(available(&leaves[0][0]) && !available(&leaves[1][0]));
    let [fused, composed] = leaves.clone().map(&run);
    assert_close("result", fused.clone().inner(), composed.clone().inner());
    assert_close(
        "result without gradient",
        run(inputs),
        composed.clone().inner(),
    );
    let output_grad = random(fused.dims());
    let gradients = |output: Tensor<R>, leaves: &[Tensor<D>; N]| {
        let grads = (output * output_grad.clone()).sum().backward();
        leaves.each_ref().map(|leaf| leaf.grad(&grads).unwrap())
    };
    let (fused, composed) = (
        gradients(fused, &leaves[0]),
        gradients(composed, &leaves[1]),
    );
    for (i, (fused, composed)) in fused.into_iter().zip(composed).enumerate() {
        assert_close(&format!("gradient {i}"), fused, composed);
    }
}

#[test]
fn linear_layers() {
    let weights = weights(&[("weight", &[7, 5]), ("bias", &[7])]);
    let linear = Linear::load(&weights, 5, 7).unwrap();
    compare([[2, 3, 5]], |[x]| linear.forward(x));
    compare([[300, 5]], |[x]| linear.forward(x));
    // Few rows and many, in several blocks.
    let weights = self::weights(&[("weight", &[300, 170]), ("bias", &[300])]);
    let linear = Linear::load(&weights, 170, 300).unwrap();
    compare([[2, 20, 170]], |[x]| linear.forward(x));
    compare([[900, 170]], |[x]| linear.forward(x));
}

#[test]
fn convolutions_of_every_geometry() {
    for (kernel, stride, padding) in [(3, 1, 1), (3, 2, 1), (1, 1, 0), (4, 4, 0), (5, 1, 2)] {
        let shape = [6, 5, kernel, kernel];
        let weights = weights(&[("weight", shape.as_slice()), ("bias", &[6])]);
        let conv = Conv2d::load(&weights, [5, 6], kernel, stride, padding).unwrap();
        compare([[2, 8, 9, 5]], |[x]| conv.forward_channels_last(x));
        compare([[2, 5, 8, 9]], |[x]| conv.forward(x));
    }
    let weights = weights(&[("weight", &[6, 5, 3, 3])]);
    let conv = Conv2d::load_without_bias(&weights, [5, 6], 3, 2, 0).unwrap();
    compare([[2, 8, 9, 5]], |[x]| conv.forward_to(x, [4, 4]));
}

#[test]
fn weights_of_half_precision() {
    for dtype in [
        burn::tensor::FloatDType::F16,
        burn::tensor::FloatDType::BF16,
    ] {
        let weights = weights_in(&[("weight", &[6, 5, 3, 3]), ("bias", &[6])], dtype);
        let conv = Conv2d::load(&weights, [5, 6], 3, 2, 1).unwrap();
        compare([[2, 8, 9, 5]], |[x]| conv.forward_channels_last(x));
        let weights = weights_in(&[("weight", &[7, 5]), ("bias", &[7])], dtype);
        let linear = Linear::load(&weights, 5, 7).unwrap();
        compare([[2, 3, 5]], |[x]| linear.forward(x));
    }
}

#[test]
fn scores_of_half_precision_do_not_overflow() {
    // Scores that are infinite in f16 before they are scaled.
    let [q, k, v] = [[1, 5, 64], [1, 4, 64], [1, 4, 64]].map(random::<3>);
    let [q, k] = [q * 3.0 + 40.0, k * 0.1 + 40.0];
    let halves = [q, k, v].map(|x| x.cast(DType::F16));
    let [q, k, v] = halves.clone().map(|x| x.cast(DType::F32));
    let expected = multi_head_attention(q, k, v, 1, Mask::None);
    let [q, k, v] = halves;
    let softmax = |scores| burn::tensor::activation::softmax(scores, 3);
    let found = weighted_attention(q, k, v, 1, softmax);
    assert_eq!(found.dtype(), DType::F16);
    let error = (found.cast(DType::F32) - expected.clone()).abs().max();
    let error = (error / expected.abs().max()).into_scalar::<f32>();
    assert!(error < 2e-3, "relative error {error:.1e}");
}

#[test]
fn convolutions_with_many_channels() {
    // Tiles that are not full, groups of every size, blocks of channels and of tiles,
    // more transformed inputs than are held at once.
    for ([c_in, c_out], size) in [
        ([16, 16], [1, 3]),
        ([24, 40], [8, 8]),
        ([150, 33], [9, 7]),
        ([16, 70], [4, 20]),
        ([20, 16], [45, 50]),
        ([320, 16], [80, 80]),
    ] {
        let shape = [c_out, c_in, 3, 3];
        let weights = weights(&[("weight", shape.as_slice()), ("bias", &[c_out])]);
        let conv = Conv2d::load(&weights, [c_in, c_out], 3, 1, 1).unwrap();
        let [h, w] = size;
        compare([[2, h, w, c_in]], |[x]| conv.forward_channels_last(x));
    }
}

#[test]
fn convolutions_in_parts() {
    // More neighbourhoods than are gathered at once.
    let weights = weights(&[("weight", &[2, 128, 3, 3])]);
    let conv = Conv2d::load_without_bias(&weights, [128, 2], 3, 1, 1).unwrap();
    compare([[1, 90, 64, 128]], |[x]| conv.forward_channels_last(x));
}

#[test]
fn normalisations() {
    let weights = weights(&[("weight", &[24]), ("bias", &[24])]);
    let norm = GroupNorm::load(&weights, 4, 24, 1e-5).unwrap();
    compare([[2, 5, 7, 24]], |[x]| norm.forward(x));
    compare([[2, 5, 7, 24]], |[x]| norm.forward_act(x, Activation::Silu));
    compare([[1, 40, 50, 24]], |[x]| {
        norm.forward_act(x, Activation::Silu)
    });
    let norm = LayerNorm::load(&weights, 24, 1e-5).unwrap();
    compare([[2, 5, 24]], |[x]| norm.forward(x));
    compare([[3, 24]], |[x]| norm.forward(x));
}

#[test]
fn root_mean_square_norms() {
    let weights = weights(&[("weight", &[24])]);
    let norm = RmsNorm::load(&weights, 24, 1e-6).unwrap();
    compare([[2, 5, 24]], |[x]| norm.forward(x));
    compare([[1, 700, 3 * 24]], |[x]| norm.forward_heads(x));
}

#[test]
fn scales_shifts_and_gates() {
    // Several tasks, of sums too, and rows that do not fill them.
    for [n, d] in [[1, 5], [7, 40], [70, 600]] {
        let told = [2, 1, d];
        compare([[2, n, d], told, told], |[x, shift, scale]| {
            modulated(x, &shift, &scale)
        });
        compare([[2, n, d], [2, n, d], told], |[x, update, gate]| {
            gated(x, update, &gate)
        });
    }
}

#[test]
fn rotations() {
    let places: Vec<[usize; 2]> = (0..9).map(|i| [i, 9 - i]).collect();
    for pairs in [Pairs::Neighbours, Pairs::Halves] {
        let rotation = Rotation::new(&places, [4, 8], 1e2, pairs, &Device::flex());
        // Fewer tokens than there are places, as many, and more.
        for n in [4, 9, 11] {
            compare([[2, n, 36]], |[x]| rotation.turn(x));
        }
    }
}

#[test]
fn functions_of_every_element() {
    for function in FUNCTIONS {
        for shape in [[1, 1], [3, 7], [40, 1030]] {
            compare([shape], |[x]| function.forward(x * 3.0));
        }
    }
}

#[test]
fn gates_and_resizing() {
    compare([[2, 5, 34]], |[x]| gated_gelu(x));
    for size in [[6, 8], [5, 7], [4, 4], [3, 9]] {
        compare([[2, 3, 4, 5]], |[x]| resize_nearest(x, size));
    }
}

#[test]
fn attention_with_and_without_a_mask() {
    let run = |mask: Mask| {
        move |[q, k, v]: [Tensor<3>; 3]| multi_head_attention(q, k, v, 3, mask.clone())
    };
    compare([[2, 7, 12], [2, 5, 12], [2, 5, 12]], run(Mask::None));
    compare([[2, 7, 12], [2, 7, 12], [2, 7, 12]], run(Mask::Causal));
    // Several blocks of queries, panels of keys and of channels.
    compare(
        [[2, 230, 3 * 40], [2, 77, 3 * 40], [2, 77, 3 * 40]],
        run(Mask::None),
    );
    compare([[1, 131, 3 * 72]; 3], run(Mask::Causal));
    // Padding of part of the keys, of none, of all and of more than there are.
    let padded = || Mask::CausalAfter([2, 0, 6, 9].into());
    compare([[4, 3, 12], [4, 8, 12], [4, 8, 12]], run(padded()));
    compare([[4, 8, 12]; 3], run(padded()));
}

#[test]
fn padding_before_the_keys_changes_nothing() {
    let [q, k, v] = [[1, 3, 4], [1, 8, 4], [1, 8, 4]].map(random::<3>);
    let alone = multi_head_attention(q.clone(), k.clone(), v.clone(), 2, Mask::Causal);
    let padded = |x: Tensor<3>| Tensor::cat(vec![random([1, 5, 4]) * 9.0, x], 1);
    let mask = Mask::CausalAfter([5].into());
    let found = multi_head_attention(q, padded(k), padded(v), 2, mask);
    assert_close("after padding", found, alone);
}

#[test]
fn causal_queries_see_the_keys_before_them() {
    let [q, k, v] = [[1, 3, 4], [1, 8, 4], [1, 8, 4]].map(random::<3>);
    let last = |x: &Tensor<3>| x.clone().narrow(1, 5, 3);
    let all = Tensor::cat(vec![random([1, 5, 4]), q.clone()], 1);
    let whole = multi_head_attention(all, k.clone(), v.clone(), 2, Mask::Causal);
    let part = multi_head_attention(q, k, v, 2, Mask::Causal);
    assert_close("last queries", part, last(&whole));
}

#[test]
fn attention_in_parts() {
    // More scores than are held at once.
    compare([[1, 4200, 4]; 3], |[q, k, v]| {
        multi_head_attention(q, k, v, 1, Mask::None)
    });
}

#[test]
fn not_a_number_is_not_lost() {
    let nan = Tensor::<3>::full([1, 4, 4], f32::NAN, &Device::flex());
    let [q, k] = [[1, 4, 4]; 2].map(random::<3>);
    let is_nan = |x: Tensor<3>| x.contains_nan().into_scalar::<bool>();
    let attention = |q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>| {
        multi_head_attention(q.clone(), k.clone(), v.clone(), 1, Mask::None)
    };
    assert!(is_nan(attention(&nan, &k, &k)));
    assert!(is_nan(attention(&q, &nan, &k)));
    assert!(is_nan(attention(&q, &k, &nan)));
    for function in FUNCTIONS {
        assert!(is_nan(function.forward(nan.clone())));
    }
    assert!(is_nan(gated_gelu(nan)));
}
