//! One call of the demo model's U-Net at batch 2: forward, and forward and backward to the
//! prompt's hidden states. `training/reference/bench_unet.py` times the same in PyTorch.
//!
//! Another U-Net is measured with `DINV_BENCH_UNET=FOLDER cargo bench --bench unet`.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use difference_inversion::models::unet::UNet2DConditionModel;
use difference_inversion::weights::{Weights, read_config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn folder() -> PathBuf {
    std::env::var_os("DINV_BENCH_UNET").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model/unet"),
        PathBuf::from,
    )
}

fn unet(criterion: &mut Criterion) {
    let (folder, device) = (folder(), Device::flex());
    let config = read_config(&folder.join("config.json")).expect("a U-Net's config.json");
    let weights = Weights::open(&folder, &device, FloatDType::F32).expect("a U-Net's weights");
    let unet = UNet2DConditionModel::load(&weights, &config).expect("a U-Net");

    let normal = Distribution::Normal(0.0, 1.0);
    let sample = Tensor::<4>::random([2, config.in_channels, 16, 16], normal, &device);
    let context = Tensor::<3>::random([2, 64, config.context_dim()], normal, &device);
    let timesteps = Tensor::<1>::from_floats([500.0, 500.0], &device);
    let forward = |context| unet.forward(sample.clone(), timesteps.clone(), context, None);

    let mut group = criterion.benchmark_group("unet");
    group.sample_size(20);
    group.bench_function("forward", |bencher| bencher.iter(|| forward(context.clone())));
    group.bench_function("forward and backward", |bencher| {
        bencher.iter(|| {
            let tracked = context.clone().autodiff().require_grad();
            let gradients = forward(tracked.clone()).square().mean().backward();
            tracked.grad(&gradients).expect("a gradient")
        });
    });
    group.finish();
}

criterion_group!(benches, unet);
criterion_main!(benches);
