//! Times one optimisation step of the built-in example, with 4 tokens and 2 draws a step: both
//! terms of the token consistency loss through text encoder and U-Net, the CLIP loss, the
//! gradient and AdamW. `training/reference/compare_learning.py` times a step next to
//! PyTorch.
//!
//! ```text
//! cargo bench --bench learn
//! ```

#![expect(clippy::print_stdout, reason = "the times are the result")]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::image::load_image;
use difference_inversion::method::analogy::{Example, learn};
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{LearnConfig, Records};
use difference_inversion::util::progress::{Progress, Stage};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps before the clock counts.
const WARM_UP: usize = 5;
/// Steps that are measured.
const REPEATS: usize = 40;

fn main() {
    difference_inversion::on_workers(run);
}

fn run() {
    let demo = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("demo");
    let paths = ModelPaths {
        model: demo.join("model"),
        ..ModelPaths::default()
    };
    let models = Models::open(&paths, &Device::flex(), FloatDType::F32).expect("the demo model");
    let picture = |name: &str| load_image(&demo.join("images").join(name)).expect("a picture");
    let example = Example {
        a: picture("a.png"),
        a_prime: picture("a_prime.png"),
        caption_a: None,
        caption_a_prime: None,
    };
    let config = AnalogyConfig {
        learn: LearnConfig {
            steps: WARM_UP + REPEATS,
            num_tokens: 4,
            clip_first: 0, // steps of the whole loss alone
            clip_thinned: 0,
            samples_per_step: 2,
            select_every: 0, // steps alone
            ..LearnConfig::default()
        },
        ..AnalogyConfig::default()
    };
    let mut ends = Vec::new();
    let mut observer = |progress: &Progress| {
        if let Progress::Step {
            stage: Stage::Learn,
            ..
        } = progress
        {
            ends.push(Instant::now());
        }
        ControlFlow::Continue(())
    };
    learn(
        &models,
        &[example],
        &config,
        &Records::default(),
        &mut observer,
    )
    .expect("a difference");
    let mut times: Vec<f64> = (ends.windows(2))
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
        .skip(WARM_UP)
        .collect();
    times.sort_by(f64::total_cmp);
    println!(
        "optimisation step: median {:.1} ms, fastest {:.1} ms",
        times[times.len() / 2],
        times[0]
    );
}
