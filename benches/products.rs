//! Times linear layers forward and backward, with weights in several types and with the product of Burn's CPU back end, in
//! turns: the fastest of some calls, and its ratio to f32.
//!
//! ```text
//! cargo bench --bench products
//! ```

#![expect(clippy::print_stdout, reason = "the times are the result")]

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use dinv_kernels::conv::{Matrix, linear};
use dinv_kernels::packed::{Ggml, Packed, Packing};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Calls that are measured.
const REPEATS: usize = 6;

/// Rows, inputs and outputs: of FLUX.1 at 256 pixels, of Stable Diffusion 3.5 medium, XL and 1.5 at 512 pixels, of a text
/// encoder, and of a layer for two times.
const SIZES: [[usize; 3]; 10] = [
    [1536, 3072, 3072],
    [512, 3072, 12288],
    [1536, 15360, 3072],
    [2048, 1536, 6144],
    [666, 6144, 1536],
    [2048, 640, 2560],
    [8192, 320, 2560],
    [8192, 1280, 320],
    [154, 768, 3072],
    [2, 3072, 9216],
];

/// One way to compute a linear layer, with its name.
type Way = (&'static str, Box<dyn Fn(Tensor<2>) -> Tensor<2>>);

/// The same layer with its weights in every type that is measured, and with the back end's product.
fn ways(shape: [usize; 2]) -> Vec<Way> {
    let ours = |name, weight: Matrix| -> Way {
        (name, Box::new(move |x| linear(x, weight.clone(), None)))
    };
    let device = Device::flex();
    let weight = Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.02), &device);
    let values = weight.to_data().try_to_vec::<f32>().unwrap_or_default();
    let mut found = vec![
        ours("f32", weight.clone().into()),
        ours("f16", weight.clone().cast(DType::F16).into()),
    ];
    if let Some(packed) = Packed::q8(&values, shape) {
        found.push(ours("Q8_0", Matrix::Packed(Arc::new(packed))));
    }
    // Zeros: their widening takes as long.
    let [numbers, size] = Ggml::Q4K.block();
    let bytes = vec![0; shape[0] * shape[1] / numbers * size];
    if let Some(packed) = Packed::new(Packing::Ggml(Ggml::Q4K), bytes, shape) {
        found.push(ours("Q4_K", Matrix::Packed(Arc::new(packed))));
    }
    let product = move |x: Tensor<2>| x.matmul(weight.clone().autodiff().transpose());
    found.push(("Burn", Box::new(product)));
    found
}

/// Seconds of one call of a layer, and of its gradient.
fn seconds(x: &Tensor<2>, layer: &dyn Fn(Tensor<2>) -> Tensor<2>) -> [f64; 2] {
    let leaf = x.clone().autodiff().require_grad();
    let start = Instant::now();
    let y = layer(leaf);
    let forward = start.elapsed();
    let y = y.sum();
    let start = Instant::now();
    let gradients = y.backward();
    let backward = start.elapsed();
    drop(gradients);
    [forward.as_secs_f64(), backward.as_secs_f64()]
}

fn main() {
    println!("rows × inputs × outputs: type, GFLOP/s forward and backward, time relative to f32");
    for [rows, inputs, outputs] in SIZES {
        let distribution = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<2>::random([rows, inputs], distribution, &Device::flex());
        let ways = ways([outputs, inputs]);
        let mut best = vec![[f64::MAX; 2]; ways.len()];
        for _ in 0..REPEATS {
            for (best, (_, layer)) in best.iter_mut().zip(&ways) {
                let [forward, backward] = seconds(&x, layer);
                *best = [best[0].min(forward), best[1].min(backward)];
            }
        }
        let flops = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
        for (times, (name, _)) in best.iter().zip(&ways) {
            let [forward, backward] = times.map(|time| flops / time / 1e9);
            let [by, back] = [0, 1].map(|pass| times[pass] / best[0][pass]);
            println!(
                "{rows:5} × {inputs:5} × {outputs:5}: {name:5} {forward:6.1} {backward:6.1}  {by:.2} {back:.2}"
            );
        }
    }
}
