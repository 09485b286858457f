//! The optimisation loop on a tiny pipeline with random weights.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::text_encoder::Beginnings;
use difference_inversion::diffusion::words::Words;
use difference_inversion::method::analogy;
use difference_inversion::method::delta::DeltaMode;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{
    self, ClipReading, Draws, Initialisation, LearnConfig, Outcome, Pair, Records, Schedule,
};
use difference_inversion::method::loss::{self, ClipLoss};
use difference_inversion::models::denoiser::Memory;
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::{Progress, Stage};
use difference_inversion::{Error, Result};

use crate::tiny::{
    example, example_in, golden, models, models_in, pair, pair_of, relative_error, short_analogy,
    silent,
};

/// Largest difference of the learned tokens from the PyTorch reference's, as a relative norm.
const TOKEN_TOLERANCE: f32 = 1e-3;
/// Largest relative difference of a directional derivative from its finite difference.
const GRADIENT_TOLERANCE: f32 = 0.02;

pub(crate) fn config() -> LearnConfig {
    LearnConfig {
        num_tokens: 3,
        steps: 12,
        clip_first: 0,
        clip_thinned: 0,
        learning_rate: Some(1e-2),
        learning_rate_schedule: Schedule::Constant,
        lambda_clip: 0.1,
        max_norm: None,
        samples_per_step: 2,
        select_every: 4,
        select_samples: 3,
        ..LearnConfig::default()
    }
}

pub(crate) fn run(
    models: &Models,
    pair: &Pair,
    config: &LearnConfig,
    records: &Records,
) -> Result<Outcome> {
    let pairs = std::slice::from_ref(pair);
    let joints = match models.pipeline().family().has_joint_space() {
        true => models.joints().unwrap(),
        false => &[],
    };
    learn::difference(
        models.pipeline(),
        joints,
        pairs,
        config,
        records,
        &mut silent,
    )
}

#[test]
fn saving_memory_learns_the_same() {
    let config = LearnConfig {
        steps: 4,
        select_every: 2,
        ..config()
    };
    let learned = [
        "learning", "sdxl", "sd3", "flux", "klein", "z_image", "chroma",
    ]
    .map(|folder| {
        [Memory::Normal, Memory::Low].map(|memory| {
            let models = small_with(folder, memory);
            let has_joint_space = models.pipeline().family().has_joint_space();
            let lambda_clip = if has_joint_space { 0.1 } else { 0.0 };
            let config = LearnConfig {
                lambda_clip,
                ..config.clone()
            };
            let pair = pair_of(&models, &example_in(folder), 3);
            let outcome = run(&models, &pair, &config, &Records::default()).unwrap();
            outcome.tokens.embeddings().to_vec()
        })
    });
    for [normal, low] in learned {
        for (normal, low) in normal.into_iter().zip(low) {
            let error = relative_error(low, normal);
            assert!(error <= 1e-5, "{error:.1e}");
        }
    }
}

#[test]
fn an_image_tower_that_was_closed_is_opened_once_more() {
    let models = models_in(&golden("learning"));
    let joint = &models.joints().unwrap()[0];
    let picture = example_in("learning").a;
    let look = || joint.image_features(&picture).unwrap();
    let before = look();
    joint.close_image_tower();
    assert_eq!(look(), before);
}

/// The models of a golden folder for pictures of the size of its A, even if their configuration states no
/// size.
fn small(folder: &str) -> Models {
    small_with(folder, Memory::Normal)
}

fn small_with(folder: &str, memory: Memory) -> Models {
    let mut paths = ModelPaths {
        model: golden(folder),
        ..ModelPaths::default()
    };
    let (width, height) = example_in(folder).a.dimensions();
    paths.options.resolution = Some([height, width]);
    paths.options.memory = memory;
    Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.clone().try_into_vec_as::<f32>().unwrap()
}

fn tokens(outcome: &Outcome) -> Vec<f32> {
    values(&outcome.tokens.embeddings()[0])
}

fn norm(x: &[f32]) -> f32 {
    x.iter().map(|v| v * v).sum::<f32>().sqrt()
}

/// Replays the PyTorch reference's draws in `tests/golden/<folder>` and compares the learned tokens, with
/// the paper's CLIP loss and with ours.
fn replay(folder: &str) {
    replay_reading(folder, ClipReading::Alone, "trace.safetensors");
    replay_reading(folder, ClipReading::Prompts, "trace_prompts.safetensors");
}

fn replay_reading(folder: &str, clip_reading: ClipReading, expected: &str) {
    let config = LearnConfig {
        steps: 20,
        select_every: 0,
        clip_reading,
        ..config()
    };
    replay_as(folder, &config, expected);
}

/// The same with all settings.
fn replay_as(folder: &str, config: &LearnConfig, expected: &str) {
    let written = tempfile::tempdir().unwrap();
    let records = Records {
        replay: Some(golden(folder).join("trace.safetensors")),
        trace: Some(written.path().join("trace.safetensors")),
        ..Records::default()
    };
    let models = small(folder);
    let pair = pair_of(&models, &example_in(folder), 3);
    run(&models, &pair, config, &records).unwrap();
    let read = |path: &Path| Arrays::read(path).unwrap();
    let found = read(records.trace.as_ref().unwrap());
    let expected = read(&golden(folder).join(expected));
    let device = Device::flex();
    for name in ["loss", "after", "before", "clip"] {
        if name == "clip" && config.lambda_clip == 0.0 {
            continue;
        }
        let [found, expected] =
            [&found, &expected].map(|file| file.tensor::<1>(name, &device).unwrap());
        let error = relative_error(found, expected);
        println!("{name}: relative error {error:.1e}");
        assert!(error <= TOKEN_TOLERANCE, "{name}: {error:.1e}");
    }
    for name in ["tokens", "tokens.1"]
        .iter()
        .take(models.pipeline().base().encoders.len())
    {
        let steps = config.steps;
        let last = |file: &Arrays| {
            let tokens = file.tensor::<3>(name, &device).unwrap();
            tokens.slice([steps - 1..steps])
        };
        let (found, expected) = (values(&last(&found)), values(&last(&expected)));
        let difference: Vec<f32> = found.iter().zip(&expected).map(|(x, y)| x - y).collect();
        let error = norm(&difference) / norm(&expected);
        println!("{name} after {steps} steps: relative error {error:.1e}");
        assert!(error <= TOKEN_TOLERANCE, "{name}: {error:.1e}");
    }
}

#[test]
fn twenty_replayed_steps_equal_the_pytorch_reference() {
    replay("learning");
}

#[test]
fn twenty_replayed_steps_on_stable_diffusion_2_equal_the_pytorch_reference() {
    replay("sd21");
}

#[test]
fn twenty_replayed_steps_on_stable_diffusion_3_equal_the_pytorch_reference() {
    replay("sd3");
}

#[test]
fn twenty_replayed_steps_on_flux_equal_the_pytorch_reference() {
    replay("flux");
}

/// Their text encoders are Qwen3 and T5, which read no zeros, and none has a CLIP loss.
#[test]
fn five_replayed_steps_on_klein_z_image_and_chroma_equal_the_pytorch_reference() {
    let config = LearnConfig {
        steps: 5,
        select_every: 0,
        lambda_clip: 0.0,
        initialisation: Initialisation::Word("blue house".to_owned()),
        ..config()
    };
    for folder in ["klein", "z_image", "chroma"] {
        replay_as(folder, &config, "trace.safetensors");
    }
}

#[test]
fn twenty_replayed_steps_on_sdxl_equal_the_pytorch_reference() {
    replay("sdxl");
}

/// The total loss of a batch of two, weighted as in the loop.
fn objective(
    models: &Models,
    pair: &Pair,
    config: &LearnConfig,
    draws: &Draws,
    tokens: &Tensor<2>,
) -> Tensor<1> {
    let pairs = std::slice::from_ref(pair);
    let tokens = std::slice::from_ref(tokens);
    let terms = loss::token_consistency(models.pipeline(), pairs, draws, tokens, true).unwrap();
    let clip = ClipLoss::new(&models.joints().unwrap()[0], 0, pairs, config).unwrap();
    let clip = clip.of(tokens).unwrap();
    (terms.after + terms.before.unwrap()) * config.lambda_mse + clip * config.lambda_clip
}

#[test]
fn gradients_of_the_whole_loss_equal_finite_differences_for_every_token() {
    let device = Device::flex();
    let models = models();
    let pair = pair(&models, 3);
    let arrays = Arrays::read(&golden("learning/trace.safetensors")).unwrap();
    let noise = arrays.tensor::<5>("noise", &device).unwrap();
    let draws = Draws {
        timesteps: vec![900.0, 400.0],
        noise: noise.slice([0..1]).squeeze_dim(0),
    };
    let d = models.pipeline().base().encoders[0].hidden_size;
    let start: Vec<f32> = (0..3 * d).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
    let tensor = |x: Vec<f32>| Tensor::<2>::from_data(TensorData::new(x, [3, d]), &device);

    for clip_reading in [ClipReading::Alone, ClipReading::Prompts] {
        let config = LearnConfig {
            clip_reading,
            lambda_clip: 1.0,
            ..config()
        };
        let objective = |tokens: &Tensor<2>| objective(&models, &pair, &config, &draws, tokens);
        let leaf = tensor(start.clone()).autodiff().require_grad();
        let gradients = objective(&leaf).backward();
        let gradient = values(&leaf.grad(&gradients).unwrap());
        for token in 0..3 {
            let row = &gradient[token * d..(token + 1) * d];
            let slope = norm(row);
            assert!(slope > 1e-4, "token {token} has no gradient");
            let at = |step: f32| {
                let mut moved = start.clone();
                for (x, g) in moved[token * d..].iter_mut().zip(row) {
                    *x += step * g / slope;
                }
                values(&objective(&tensor(moved)))[0]
            };
            let step = 0.02;
            let found = (at(step) - at(-step)) / (2.0 * step);
            let error = (found - slope).abs() / slope;
            println!("token {token}: gradient {slope:.4}, finite difference {found:.4}");
            assert!(error < GRADIENT_TOLERANCE, "token {token}: {slope} {found}");
        }
    }
}

#[test]
fn tokens_read_in_prompts_point_along_the_delta_and_back() {
    let models = models();
    let joint = &models.joints().unwrap()[0];
    let features = |words: &Words, tokens: Option<&Tensor<2>>| {
        let features = joint.prompt_features(words.prompt(), tokens).unwrap();
        let features = values(&features);
        let norm = norm(&features);
        features.into_iter().map(|x| x / norm).collect::<Vec<f32>>()
    };
    let d = models.pipeline().base().encoders[0].hidden_size;
    let tokens: Vec<f32> = (0..3 * d).map(|i| (i as f32 * 0.7).sin()).collect();
    let tokens = Tensor::<2>::from_data(TensorData::new(tokens, [3, d]), &Device::flex());
    let pair = pair(&models, 3);
    let change = |words: &Words, sign: f64| {
        let tokens = tokens.clone() * sign;
        let (with, without) = (features(words, Some(&tokens)), features(words, None));
        let change = with.iter().zip(&without).map(|(x, y)| x - y);
        change.collect::<Vec<f32>>()
    };
    let cosine = |change: &[f32], sign: f32| {
        let dot: f32 = change.iter().zip(&pair.deltas[0]).map(|(x, y)| x * y).sum();
        sign * dot / norm(change)
    };
    let after = cosine(&change(&pair.prompt_a, 1.0), 1.0);
    let before = cosine(&change(&pair.prompt_a_prime, -1.0), -1.0);
    for (consistency, expected) in [(true, 1.0 - (after + before) / 2.0), (false, 1.0 - after)] {
        let config = LearnConfig {
            clip_reading: ClipReading::Prompts,
            consistency,
            ..config()
        };
        let pairs = std::slice::from_ref(&pair);
        let clip = ClipLoss::new(joint, 0, pairs, &config).unwrap();
        let found = values(&clip.of(std::slice::from_ref(&tokens)).unwrap())[0];
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn prompts_read_together_have_the_features_of_each_alone() {
    let models = models();
    let joint = &models.joints().unwrap()[0];
    let encoder = joint.text_encoder();
    let d = encoder.hidden_size();
    let texts = ["", "a house", "a small red house by the sea at night"];
    let prompts = texts.map(|text| models.pipeline().prompt(text).unwrap());
    let tokens = |count: usize| {
        let tokens: Vec<f32> = (0..3 * count * d).map(|i| (i as f32 * 0.7).sin()).collect();
        Tensor::<3>::from_data(TensorData::new(tokens, [3, count, d]), &Device::flex())
    };
    for tokens in [None, Some(tokens(1)), Some(tokens(3))] {
        let count = tokens.as_ref().map_or(0, |tokens| tokens.dims()[1]);
        let [empty, house, red] = prompts.each_ref();
        let parts = [&[empty, house][..], &[red]].map(|part| joint.read(part, count).unwrap());
        let together = Beginnings::cat(&parts.each_ref());
        let together = encoder.features(&together, tokens.as_ref()).unwrap();
        for (row, prompt) in prompts.iter().enumerate() {
            let (beginning, _) = encoder.read(&prompt.ids(0), count).unwrap();
            let own =
                (tokens.as_ref()).map(|tokens| tokens.clone().narrow(0, row, 1).squeeze_dim(0));
            let alone = encoder.finish(&beginning, own.as_ref()).unwrap();
            let alone = values(&encoder.project(alone.pooled).unwrap());
            let found = values(&together.clone().narrow(0, row, 1));
            let scale = norm(&alone);
            for (found, expected) in found.iter().zip(&alone) {
                assert!(
                    (found - expected).abs() < 1e-5 * scale,
                    "{found} {expected}"
                );
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_gives_others() {
    let models = models();
    let pair = pair(&models, 3);
    let learn = |seed| {
        let config = LearnConfig { seed, ..config() };
        tokens(&run(&models, &pair, &config, &Records::default()).unwrap())
    };
    assert_eq!(learn(1), learn(1));
    assert_ne!(learn(1), learn(2));
}

#[test]
fn a_stopped_run_goes_on_to_the_same_result_as_one_never_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let models = models();
    let pair = pair(&models, 3);
    // Uses everything that is drawn.
    let config = LearnConfig {
        prompt_dropout: 0.3,
        jitter: 1,
        initialisation: Initialisation::Random,
        max_norm: Some(2.0),
        clip_first: 2,
        clip_thinned: 1,
        learning_rate_schedule: Schedule::Linear,
        ..config()
    };
    let whole = run(&models, &pair, &config, &Records::default()).unwrap();
    let records = Records {
        checkpoint: Some(checkpoint.clone()),
        ..Records::default()
    };
    let mut stop_at_7 = |progress: &Progress| match progress {
        Progress::Step { done: 7, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let pairs = std::slice::from_ref(&pair);
    let (pipeline, joints) = (models.pipeline(), models.joints().unwrap());
    let stopped = learn::difference(pipeline, joints, pairs, &config, &records, &mut stop_at_7);
    assert!(matches!(
        stopped,
        Err(Error::Stopped {
            done: 7,
            total: 12,
            checkpoint: Some(_),
            ..
        })
    ));
    let records = Records {
        resume: Some(checkpoint.clone()),
        ..Records::default()
    };
    let resumed = run(&models, &pair, &config, &records).unwrap();
    assert_eq!(tokens(&whole), tokens(&resumed));
    assert_eq!(whole.history, resumed.history);
    assert_eq!(whole.best_step, resumed.best_step);

    let other_alpha = LearnConfig {
        alpha: 0.2,
        ..config.clone()
    };
    // The learning rate of the first steps was another.
    let more_steps = LearnConfig {
        steps: 20,
        ..config
    };
    for (other, expected) in [
        (other_alpha, "its `alpha` is 0.8, this run's 0.2"),
        (more_steps, "its `steps` is 12, this run's 20"),
    ] {
        let error = run(&models, &pair, &other, &records).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn with_a_constant_learning_rate_a_run_can_be_made_longer() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let models = models();
    let pair = pair(&models, 3);
    let of = |steps| LearnConfig {
        steps,
        select_every: 0,
        ..config()
    };
    let records = Records {
        checkpoint: Some(checkpoint.clone()),
        ..Records::default()
    };
    run(&models, &pair, &of(4), &records).unwrap();
    let records = Records {
        resume: Some(checkpoint),
        ..Records::default()
    };
    let longer = run(&models, &pair, &of(9), &records).unwrap();
    let whole = run(&models, &pair, &of(9), &Records::default()).unwrap();
    assert_eq!(tokens(&whole), tokens(&longer));
}

#[test]
fn a_replayed_trace_gives_the_run_that_wrote_it() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.safetensors");
    let models = models();
    let pair = pair(&models, 3);
    let records = Records {
        trace: Some(trace.clone()),
        ..Records::default()
    };
    let drawn = run(&models, &pair, &config(), &records).unwrap();
    let records = Records {
        replay: Some(trace),
        ..Records::default()
    };
    let other_seed = LearnConfig {
        seed: 7,
        ..config()
    };
    let replayed = run(&models, &pair, &other_seed, &records).unwrap();
    assert_eq!(drawn.history, replayed.history);
    let drawn_anew = run(&models, &pair, &other_seed, &Records::default()).unwrap();
    assert_ne!(drawn.history, drawn_anew.history);
    // A checkpoint of it belongs to the file.
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let replaying = Records {
        checkpoint: Some(checkpoint.clone()),
        ..records
    };
    run(&models, &pair, &config(), &replaying).unwrap();
    let resumed = Records {
        resume: Some(checkpoint),
        ..Records::default()
    };
    let message = run(&models, &pair, &config(), &resumed).unwrap_err();
    let message = message.to_string();
    assert!(message.contains("(`--replay`)"), "{message}");
    let resumed = Records {
        replay: replaying.replay,
        ..resumed
    };
    run(&models, &pair, &config(), &resumed).unwrap();
}

/// What is learned at a smaller size is learned on latents of that size, and applies at the model's.
#[test]
fn a_difference_is_learned_at_a_smaller_size() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.safetensors");
    let models = models();
    let learn = |side: Option<u32>| {
        let mut analogy = short_analogy();
        analogy.learn.learn_resolution = side;
        let records = Records {
            trace: Some(trace.clone()),
            ..Records::default()
        };
        let learned = analogy::learn(&models, &[example()], &analogy, &records, &mut silent)?;
        let noise = Arrays::read(&trace).unwrap().arrays["noise"]
            .shape()
            .to_vec();
        Ok::<_, Error>((learned.tokens, noise[noise.len() - 2..].to_vec()))
    };
    let [height, width] = models.pipeline().resolution();
    assert_eq!(height, width);
    let (whole, latents) = learn(None).unwrap();
    let (half, halved) = learn(Some(height / 2)).unwrap();
    assert_eq!(latents, [halved[0] * 2, halved[1] * 2]);
    assert_ne!(whole.fingerprint(), half.fingerprint());
    half.check_base(&models.pipeline().base()).unwrap();

    // The longer side becomes one that can be drawn.
    let wide = models.pipeline().clone().with_resolution([32, 40]).unwrap();
    let smaller = wide.with_shorter_side(16).unwrap();
    assert_eq!(smaller.resolution(), [16, 24]);

    let refused = learn(Some(0)).unwrap_err().to_string();
    assert!(
        refused.contains("`learn_resolution`: expected 1 to"),
        "{refused}"
    );
    let refused = learn(Some(height / 2 + 1)).unwrap_err().to_string();
    assert!(
        refused.contains("learn_resolution") && refused.contains("multiples of"),
        "{refused}"
    );
    assert_eq!(models.pipeline().resolution(), [height, width]);
}

#[test]
fn the_best_tokens_are_chosen_on_the_fixed_set() {
    let models = models();
    let pair = pair(&models, 3);
    let outcome = run(&models, &pair, &config(), &Records::default()).unwrap();
    assert!([4, 8, 12].contains(&outcome.best_step));
    let config = LearnConfig {
        select_every: 0,
        ..config()
    };
    assert_eq!(
        run(&models, &pair, &config, &Records::default())
            .unwrap()
            .best_step,
        12
    );
    // Steps too small to change a number never improve anything.
    let patient = LearnConfig {
        learning_rate: Some(1e-20),
        select_every: 1,
        patience: Some(2),
        ..config
    };
    let outcome = run(&models, &pair, &patient, &Records::default()).unwrap();
    assert!(
        outcome.history.len() < 12,
        "{} steps",
        outcome.history.len()
    );
}

#[test]
fn the_clip_loss_leads_the_first_tokens_without_the_denoiser() {
    let models = models();
    let pair = pair(&models, 3);
    let all_of_it = LearnConfig {
        lambda_mse: 0.0,
        lambda_clip: 1.0,
        select_every: 0,
        ..config()
    };
    let first = LearnConfig {
        clip_first: 5,
        steps: 2,
        ..all_of_it.clone()
    };
    let learn = |config: &LearnConfig| run(&models, &pair, config, &Records::default()).unwrap();
    let (all_of_it, led) = (learn(&all_of_it), learn(&first));
    assert_eq!(led.history.len(), 2);
    // The steps that follow go on with the optimiser's moments.
    for (led, all) in led.history.iter().zip(&all_of_it.history[5..]) {
        assert_eq!(led.clip, all.clip);
    }
    assert!(led.history[0].clip < all_of_it.history[0].clip);
    // Without a CLIP loss there is nothing to follow.
    let no_clip = |clip_first| LearnConfig {
        clip_first,
        lambda_mse: 4.0,
        lambda_clip: 0.0,
        ..first.clone()
    };
    assert_eq!(learn(&no_clip(5)).history, learn(&no_clip(0)).history);
}

#[test]
fn a_loss_without_weight_is_not_computed() {
    let models = models();
    let mut pair = pair(&models, 3);
    // The denoiser would answer with NaN.
    pair.latents_a_prime = pair.latents_a_prime.mul_scalar(f32::NAN);
    let clip_alone = LearnConfig {
        lambda_mse: 0.0,
        ..config()
    };
    let outcome = run(&models, &pair, &clip_alone, &Records::default()).unwrap();
    assert_eq!(outcome.history.len(), 12);
    for terms in &outcome.history {
        assert_eq!((terms.after, terms.before), (0.0, 0.0));
        assert!(terms.clip > 0.0);
    }
}

/// AdamW's first step is the learning rate in every coordinate. By default that is a share of how large the
/// coordinates of words are.
#[test]
fn the_default_learning_rate_follows_the_vocabulary() {
    let models = models();
    let pair = pair(&models, 3);
    let first_step = LearnConfig {
        steps: 1,
        learning_rate: None,
        weight_decay: 0.0,
        select_every: 0,
        ..config()
    };
    let learned = tokens(&run(&models, &pair, &first_step, &Records::default()).unwrap());
    let table = values(models.pipeline().text_encoders()[0].token_table());
    let root_mean_square = norm(&table) / (table.len() as f32).sqrt();
    let largest = learned.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let expected = 0.45 * root_mean_square;
    assert!(
        (largest / expected - 1.0).abs() < 1e-3,
        "{largest} is not {expected}"
    );
}

#[test]
fn thinned_prompts_change_what_the_clip_loss_asks_for() {
    let models = models();
    let pair = pair(&models, 3);
    let learn = |clip_thinned, clip_reading| {
        let config = LearnConfig {
            lambda_mse: 0.0,
            steps: 3,
            select_every: 0,
            clip_thinned,
            clip_reading,
            ..config()
        };
        run(&models, &pair, &config, &Records::default()).unwrap()
    };
    let history = |outcome: &Outcome| -> Vec<f32> {
        let terms = outcome.history.iter();
        terms.map(|terms| terms.clip).collect()
    };
    let (whole, thinned) = (
        learn(0, ClipReading::Prompts),
        learn(2, ClipReading::Prompts),
    );
    assert_ne!(history(&whole), history(&thinned));
    // Drawn by the seed.
    assert_eq!(history(&learn(2, ClipReading::Prompts)), history(&thinned));
    // The tokens alone are no prompt that words could be left out of.
    assert_eq!(
        history(&learn(2, ClipReading::Alone)),
        history(&learn(0, ClipReading::Alone))
    );
}

#[test]
fn the_first_steps_on_the_clip_loss_can_be_stopped() {
    let models = models();
    let pair = [pair(&models, 3)];
    let config = LearnConfig {
        clip_first: 5,
        ..config()
    };
    let mut seen = Vec::new();
    let result = learn::difference(
        models.pipeline(),
        models.joints().unwrap(),
        &pair,
        &config,
        &Records::default(),
        &mut |progress| {
            let Progress::Step { stage, done, .. } = progress else {
                return ControlFlow::Continue(());
            };
            seen.push((*stage, *done));
            match seen.len() {
                3 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        },
    );
    assert_eq!(seen, [0, 1, 2].map(|done| (Stage::LearnClip, done)));
    let Err(Error::Stopped {
        stage, done, total, ..
    }) = result
    else {
        panic!("{result:?}");
    };
    assert_eq!((stage, done, total), (Stage::LearnClip, 2, 5));
}

#[test]
fn every_ablation_is_another_run() {
    let models = models();
    let pair = pair(&models, 3);
    let learn = |config: LearnConfig| run(&models, &pair, &config, &Records::default()).unwrap();
    let full = learn(config());
    assert!(
        full.history
            .iter()
            .all(|terms| terms.before > 0.0 && terms.clip > 0.0)
    );
    let no_consistency = learn(LearnConfig {
        consistency: false,
        ..config()
    });
    assert!(
        no_consistency
            .history
            .iter()
            .all(|terms| terms.before == 0.0)
    );
    let no_clip = learn(LearnConfig {
        lambda_clip: 0.0,
        ..config()
    });
    assert!(no_clip.history.iter().all(|terms| terms.clip == 0.0));
    let [random, from_word] = [
        Initialisation::Random,
        Initialisation::Word("house".to_owned()),
    ]
    .map(|initialisation| {
        learn(LearnConfig {
            initialisation,
            ..config()
        })
    });
    let read_alone = learn(LearnConfig {
        clip_reading: ClipReading::Alone,
        ..config()
    });
    let [quarter, nothing] = [0.25, 0.0].map(|lambda_before| {
        learn(LearnConfig {
            lambda_before,
            ..config()
        })
    });
    for terms in &quarter.history {
        let LearnConfig {
            lambda_mse,
            lambda_clip,
            ..
        } = config();
        let explained = f64::from(terms.after) + 0.25 * f64::from(terms.before);
        let total = lambda_mse * explained + lambda_clip * f64::from(terms.clip);
        assert!((f64::from(terms.total) - total).abs() < 1e-5 * total);
    }
    assert!(nothing.history.iter().all(|terms| terms.before == 0.0));
    let runs = [
        &full,
        &no_consistency,
        &no_clip,
        &random,
        &from_word,
        &read_alone,
        &quarter,
        &nothing, // its CLIP loss reads the prompt of A′, too
    ];
    assert_all_differ(&runs.map(tokens));
}

#[track_caller]
fn assert_all_differ(runs: &[Vec<f32>]) {
    for (number, run) in runs.iter().enumerate() {
        assert!(runs[..number].iter().all(|other| other != run), "{number}");
    }
}

#[test]
fn the_delta_and_its_alpha_decide_what_is_learned() {
    let models = models();
    let learn = |delta, alpha| {
        let config = AnalogyConfig {
            learn: LearnConfig {
                delta,
                alpha,
                ..short_analogy().learn
            },
            ..short_analogy()
        };
        let records = Records::default();
        let learned = analogy::learn(&models, &[example()], &config, &records, &mut silent);
        values(&learned.unwrap().tokens.embeddings()[0])
    };
    let LearnConfig { delta, alpha, .. } = LearnConfig::default();
    assert_eq!((delta, alpha), (DeltaMode::Interpolated, 0.8));
    assert_all_differ(&[
        learn(delta, alpha),
        learn(delta, 0.4),
        learn(DeltaMode::Image, alpha),
        learn(DeltaMode::Text, alpha),
    ]);
    // The two ends of alpha's range.
    assert_eq!(learn(delta, 0.0), learn(DeltaMode::Image, alpha));
    assert_eq!(learn(delta, 1.0), learn(DeltaMode::Text, alpha));
}

#[test]
fn tokens_stay_within_their_bound() {
    let models = models();
    let pair = pair(&models, 3);
    let config = LearnConfig {
        learning_rate: Some(1.0),
        max_norm: Some(0.5),
        ..config()
    };
    let outcome = run(&models, &pair, &config, &Records::default()).unwrap();
    let table = models.pipeline().text_encoders()[0].token_table().clone();
    let mut norms = values(&table.powi_scalar(2).sum_dim(1).sqrt());
    norms.sort_by(f32::total_cmp);
    let bound = 0.5 * norms[norms.len() / 2];
    for row in tokens(&outcome).chunks(16) {
        assert!(norm(row) <= bound * 1.001);
    }
}

#[test]
fn a_loss_that_is_not_finite_is_an_error_that_names_the_step() {
    let models = models();
    let mut pair = pair(&models, 3);
    pair.latents_a = pair.latents_a.mul_scalar(f32::NAN);
    let error = run(&models, &pair, &config(), &Records::default()).unwrap_err();
    assert!(matches!(
        error,
        Error::Diverged {
            step: 0,
            checkpoint: None
        }
    ));
    assert!(error.to_string().contains("learning rate"), "{error}");
}

#[test]
fn two_pairs_are_learned_from_together() {
    let models = models();
    let pair = pair(&models, 3);
    let mut second = pair.clone();
    std::mem::swap(&mut second.latents_a, &mut second.latents_a_prime);
    let (pipeline, joints) = (models.pipeline(), models.joints().unwrap());
    let learn = |pairs: &[Pair]| {
        let records = Records::default();
        learn::difference(pipeline, joints, pairs, &config(), &records, &mut silent).unwrap()
    };
    let both = learn(&[pair.clone(), second]);
    assert_ne!(tokens(&both), tokens(&learn(&[pair])));
    assert!(matches!(
        learn::difference(
            pipeline,
            joints,
            &[],
            &config(),
            &Records::default(),
            &mut silent
        ),
        Err(Error::Missing { .. })
    ));
}
