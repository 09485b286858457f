//! Times one call of the demo model's U-Net at batch 2: forward, and forward and backward to the
//! prompt's hidden states. `training/reference/bench_unet.py` times the same in PyTorch.
//!
//! ```text
//! cargo bench --bench unet
//! DINV_BENCH_UNET=FOLDER cargo bench --bench unet     # another U-Net
//! ```

#![expect(clippy::print_stdout, reason = "the times are the result")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use difference_inversion::models::denoiser::unet::{UNet2DConditionModel, UNetConfig};
use difference_inversion::weights::{Weights, read_config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Calls that are measured.
const REPEATS: usize = 20;

fn folder() -> PathBuf {
    std::env::var_os("DINV_BENCH_UNET").map_or_else(
        || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("demo/model/unet"),
        PathBuf::from,
    )
}

/// Prints the median and the fastest of some calls of `run`, after a few that warm up.
fn measure<T>(name: &str, run: impl Fn() -> T) {
    for _ in 0..3 {
        run();
    }
    let mut times: Vec<Duration> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    let [median, fastest] = [times[REPEATS / 2], times[0]].map(|time| time.as_secs_f64() * 1e3);
    println!("{name:22} median {median:.1} ms, fastest {fastest:.1} ms");
}

fn main() {
    difference_inversion::on_workers(run);
}

fn run() {
    let (folder, device) = (folder(), Device::flex());
    let config: UNetConfig = read_config(&folder.join("config.json")).expect("a config.json");
    let weights = Weights::open(&folder, &device, FloatDType::F32).expect("a U-Net's weights");
    let unet = UNet2DConditionModel::load(&weights, &config).expect("a U-Net");

    let normal = Distribution::Normal(0.0, 1.0);
    let sample = Tensor::<4>::random([2, config.in_channels, 16, 16], normal, &device);
    let context = Tensor::<3>::random([2, 64, config.context_dim()], normal, &device);
    let timesteps = Tensor::<1>::from_floats([500.0, 500.0], &device);
    let forward = |context| unet.forward(sample.clone(), timesteps.clone(), context, None);

    measure("forward:", || forward(context.clone()));
    measure("forward and backward:", || {
        let tracked = context.clone().autodiff().require_grad();
        let gradients = forward(tracked.clone()).square().mean().backward();
        tracked.grad(&gradients)
    });
}
