//! Blocks of which nothing inside is kept for the backward pass.

use std::array::from_fn;

use burn::tensor::Tensor;
use dinv_kernels::{differentiable, gradient::recomputed};

/// The block `run` of streams of tokens, each `[b, n, d]`, which returns the first `M` of them changed. The backward
/// pass computes its inside once more. Just `run(streams)` if nothing tracks them, or they cannot be tracked.
pub(super) fn recomputed_streams<const N: usize, const M: usize>(
    streams: [Tensor<3>; N],
    run: impl Fn([Tensor<3>; N]) -> [Tensor<3>; M] + Send + Sync + 'static,
) -> [Tensor<3>; M] {
    let is_tracked = streams.iter().any(Tensor::is_tracked);
    if !is_tracked || !streams.iter().all(differentiable) {
        return run(streams);
    }
    let lengths: [usize; M] = from_fn(|number| streams[number].dims()[1]);
    let output = recomputed(streams.map(with_axis), move |streams| {
        with_axis(Tensor::cat(run(streams.map(without_axis)).to_vec(), 1))
    });
    let output = without_axis(output);
    let mut start = 0;
    lengths.map(|length| {
        let stream = output.clone().narrow(1, start, length);
        start += length;
        stream
    })
}

fn with_axis(x: Tensor<3>) -> Tensor<4> {
    x.unsqueeze_dim(1)
}

fn without_axis(x: Tensor<4>) -> Tensor<3> {
    x.squeeze_dim(1)
}
