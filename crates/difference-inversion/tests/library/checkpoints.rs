//! The checkpoints that a run resumes from.

use std::path::Path;

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::FileOptions;
use difference_inversion::method::learn::{LearnConfig, Records};
use difference_inversion::models::denoiser::Memory;
use difference_inversion::util::arrays::{Array, Arrays, Values};

use crate::learning::{config, run};
use crate::tiny::{copy, edit, example_in, golden, models_in, pair_of};

type Harm = fn(&Path);

const KEYS: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight";
const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// Doubles the numbers of a tensor of the U-Net in `model`.
fn double(model: &Path, name: &str) {
    let path = model.join("unet/diffusion_pytorch_model.safetensors");
    let mut unet = Arrays::read(&path).unwrap();
    let tensor = unet.array(name).unwrap();
    let doubled = match tensor.values() {
        Values::F32(values) => values.iter().map(|value| 2.0 * value).collect(),
        Values::I64(_) => Vec::new(),
    };
    let doubled = Array::floats(tensor.shape().to_vec(), doubled);
    unet.arrays.insert(name.to_owned(), doubled);
    unet.write(&path).unwrap();
}

/// In tiles, the autoencoder gives nearly the same latents.
#[test]
fn a_run_is_resumed_with_less_memory_but_not_with_other_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let open = |model: &str, change: fn(&mut FileOptions)| {
        let mut paths = ModelPaths {
            model: golden(model),
            ..ModelPaths::default()
        };
        change(&mut paths.options);
        Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
    };
    let written = Records {
        checkpoint: Some(checkpoint.clone()),
        ..Records::default()
    };
    let resumed = Records {
        resume: Some(checkpoint),
        ..Records::default()
    };
    let of = |model: &str, models: &Models| pair_of(models, &example_in(model), 3);
    let config = || LearnConfig {
        steps: 1,
        select_every: 0,
        ..config()
    };
    let [whole, tiled] = [
        (|options| options.resolution = Some([384, 384])) as fn(&mut FileOptions),
        |options| (options.resolution, options.memory) = (Some([384, 384]), Memory::Low),
    ]
    .map(|change| open("../../demo/model", change));
    let [pair, of_tiles] = [&whole, &tiled].map(|models| of("learning", models));
    let difference = pair.latents_a.clone() - of_tiles.latents_a.clone();
    assert!(difference.abs().max().into_scalar::<f32>() > 0.0);
    let learned = run(&whole, &pair, &config(), &written).unwrap();
    let again = run(&tiled, &of_tiles, &config(), &resumed).unwrap();
    assert_eq!(again.history, learned.history);

    let usual = open("sd3", |options| options.without_t5 = true);
    run(&usual, &of("sd3", &usual), &config(), &written).unwrap();
    let short = open("sd3", |options| {
        options.max_sequence_length = Some(40);
        options.without_t5 = true;
    });
    let message = run(&short, &of("sd3", &short), &config(), &resumed).unwrap_err();
    let message = message.to_string();
    let expected = "its `max_sequence_length` is null, this run's 40";
    assert!(message.contains(expected), "{message}");
}

#[test]
fn a_checkpoint_of_another_u_net_or_noise_schedule_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    let learn = |model: &Path, records: &Records| {
        let models = models_in(model);
        let pair = pair_of(&models, &example_in("learning"), 3);
        run(&models, &pair, &config(), records)
    };
    let model = copy("learning");
    let written = Records {
        checkpoint: Some(checkpoint.clone()),
        ..Records::default()
    };
    let whole = learn(model.path(), &written).unwrap();
    let resumed = Records {
        resume: Some(checkpoint.clone()),
        ..Records::default()
    };
    let again = learn(model.path(), &resumed).unwrap();
    assert_eq!(again.history, whole.history);

    let cases: [(Harm, &str); 5] = [
        (
            |model| edit(&model.join(SCHEDULER), "v_prediction", "epsilon"),
            r#"its `prediction_type` is "v_prediction", this run's "epsilon""#,
        ),
        (
            |model| edit(&model.join(SCHEDULER), "0.012", "0.0121"),
            "it was made with another noise schedule",
        ),
        (
            |model| double(model, "conv_in.weight"),
            "it was made with another U-Net",
        ),
        (
            |model| double(model, "conv_out.weight"),
            "it was made with another U-Net",
        ),
        (
            |model| double(model, KEYS),
            "it was made with another U-Net",
        ),
    ];
    for (harm, expected) in cases {
        let other = copy("learning");
        harm(other.path());
        let message = learn(other.path(), &resumed).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("start again without it"), "{message}");
    }

    // A setting unknown when the checkpoint was written had its default.
    let mut older = Arrays::read(&checkpoint).unwrap();
    let settings = older.metadata["config"].replace(r#""lambda_before":1.0,"#, "");
    assert_ne!(settings, older.metadata["config"]);
    older.metadata.insert("config".to_owned(), settings);
    older.write(&checkpoint).unwrap();
    let again = learn(model.path(), &resumed).unwrap();
    assert_eq!(again.history, whole.history);

    // A checkpoint of an earlier format is not accepted either.
    let mut old = Arrays::read(&checkpoint).unwrap();
    old.metadata
        .insert("format_version".to_owned(), "1".to_owned());
    old.write(&checkpoint).unwrap();
    let message = learn(model.path(), &resumed).unwrap_err().to_string();
    assert!(message.contains("format version 3, found 1"), "{message}");
}
