//! A family unknown to the library: a row, a network of two layers that counts time backwards, a
//! bidirectional tower, a frame of its own, and straight paths from noise to latents. It learns,
//! applies and draws through the same functions as all others.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use burn::tensor::{DType, Device, FloatDType, Tensor};
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::family::{
    self, AutoencoderPart, Beside, DenoiserPart, EncoderPart, Family,
};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::memory::LearningMemory;
use difference_inversion::diffusion::model_files::{ModelFiles, SCHEDULER};
use difference_inversion::diffusion::sample::{FlowConfig, FlowSchedule, Noising};
use difference_inversion::diffusion::text_encoder::{Frame, Padding, TextEncoder};
use difference_inversion::image::{RgbImage, load_image};
use difference_inversion::method::analogy::{self, Example, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::{Draws, Pair, Records};
use difference_inversion::method::loss;
use difference_inversion::method::regenerate::Inversion;
use difference_inversion::models::denoiser::conditions::Conditions;
use difference_inversion::models::denoiser::{Denoiser, DenoiserConfig, How, Memory, Surroundings};
use difference_inversion::models::text::tokenizer::Tokenizer;
use difference_inversion::models::text::tower::{Beginning, Encoded, Tower, TowerKind};
use difference_inversion::util::arrays::{Array, Arrays};
use difference_inversion::util::progress::Progress;
use difference_inversion::weights::{Weights, from_value};
use difference_inversion::{Error, Result, hub};
use serde::Deserialize;
use serde_json::Value;

use crate::tiny::furthest;

/// The row.
static TINY_FLOW: Family = Family {
    class: "TinyFlowPipeline",
    models: &[],
    denoiser: DenoiserPart {
        part: "transformer",
        title: "transformer",
        open: open_denoiser,
    },
    text_encoders: &[EncoderPart {
        part: "text_encoder",
        kind: TowerKind::Clip,
        joint: false,
        learned: true,
        optional: false,
        needs: |_| true,
        open: open_text_encoder,
    }],
    conditions,
    force_zeros_for_empty_prompt: false,
    noising,
    beside: Beside::Nothing,
    autoencoder: AutoencoderPart {
        part: "vae",
        upcast: false,
    },
    single_files: &[],
    original: None,
};

fn noising(files: &ModelFiles) -> Result<Noising> {
    let config: FlowConfig = files.config(SCHEDULER)?;
    let schedule = FlowSchedule::new(&config, &files.config_path(SCHEDULER))?;
    Ok(Noising::Flow(schedule))
}

fn conditions(_: &[TextEncoder], encoded: &[Encoded]) -> Result<Conditions> {
    Ok(Conditions {
        pooled: Some(encoded[0].pooled.clone()),
        ..Conditions::new(encoded[0].last_hidden_state.clone())
    })
}

// The network.

#[derive(Debug, Clone, Deserialize)]
struct TransformerConfig {
    sample_size: u64,
    channels: usize,
    width: usize,
    hidden: usize,
}

#[derive(Debug)]
struct Transformer {
    /// Map latents, context, pooled prompt and time to the hidden width, and back.
    latents: Tensor<2>,
    context: Tensor<2>,
    pooled: Tensor<2>,
    time: Tensor<2>,
    output: Tensor<2>,
}

fn open_denoiser(config: Value, path: &Path) -> Result<Box<dyn DenoiserConfig>> {
    Ok(Box::new(from_value::<TransformerConfig>(config, path)?))
}

impl DenoiserConfig for TransformerConfig {
    fn trained_on(&self) -> Option<[u64; 2]> {
        Some([self.sample_size; 2])
    }

    fn in_channels(&self) -> usize {
        self.channels
    }

    fn check(&self, around: &Surroundings<'_>) -> Result<()> {
        match around.encoder_widths == [self.width] {
            true => Ok(()),
            false => Err(Error::invalid_input("another text encoder is needed")),
        }
    }

    fn load(&self, weights: &Weights, _: &Surroundings<'_>) -> Result<Arc<dyn Denoiser>> {
        let tensor = |name: &str, shape| weights.tensor::<2>(name, shape);
        let network = Transformer {
            latents: tensor("latents", [self.channels, self.hidden])?,
            context: tensor("context", [self.width, self.hidden])?,
            pooled: tensor("pooled", [self.width, self.hidden])?,
            time: tensor("time", [1, self.hidden])?,
            output: tensor("output", [self.hidden, self.channels])?,
        };
        weights.check_all_used(&[])?;
        Ok(Arc::new(network))
    }

    fn step_bytes(&self, rows: usize, [h, w]: [usize; 2], _: Memory) -> Result<u64> {
        Ok((rows * h * w * self.hidden * 4) as u64)
    }
}

impl Denoiser for Transformer {
    fn predict(
        &self,
        latents: Tensor<4>,
        times: &[f64],
        conditions: &Conditions,
        _: How<'_>,
    ) -> Tensor<4> {
        let [b, c, h, w] = latents.dims();
        // It was trained from 0, noise, to 1, and to predict x₀ − ε.
        let times: Vec<f64> = times.iter().map(|t| 1.0 - t / 1000.0).collect();
        let device = latents.device().without_autodiff();
        let time = Tensor::<1>::from_data(times.as_slice(), (&device, DType::F32));
        let time = time.reshape([b, 1]).matmul(self.time.clone());
        let context = conditions.context.clone().mean_dim(1).squeeze_dim::<2>(1);
        let context = context.matmul(self.context.clone());
        let pooled = conditions.pooled.clone().unwrap();
        let told = context + pooled.matmul(self.pooled.clone()) + time; // [b, hidden]
        let k = told.dims()[1];
        let x = latents.permute([0, 2, 3, 1]).reshape([b * h * w, c]);
        let x = x.matmul(self.latents.clone()).reshape([b, h * w, k]);
        let x = (x + told.reshape([b, 1, k])).tanh();
        let x = x.reshape([b * h * w, k]).matmul(self.output.clone());
        x.reshape([b, h, w, c]).permute([0, 3, 1, 2]).neg()
    }

    fn multiple(&self) -> usize {
        2
    }

    fn fingerprint(&self) -> String {
        "the only one".to_owned()
    }
}

// The tower.

#[derive(Debug)]
struct BothWays {
    table: Tensor<2>,
    layer: Tensor<2>,
}

fn open_text_encoder(
    files: &ModelFiles,
    part: &str,
    device: &Device,
    dtype: FloatDType,
) -> Result<TextEncoder> {
    #[derive(Deserialize)]
    struct Config {
        vocab_size: usize,
        d_model: usize,
    }
    let config: Config = files.config(part)?;
    let weights = files.weights(part, device, dtype)?;
    let tower = BothWays {
        table: weights.tensor("table", [config.vocab_size, config.d_model])?,
        layer: weights.tensor("layer", [config.d_model, config.d_model])?,
    };
    let tokenizer = Tokenizer::open(&files.vocabulary(part)?.folder)?;
    let end = tokenizer.id("<|endoftext|>")?;
    let frame = Frame {
        before: Vec::new(),
        after: vec![end, end],
        padding: Padding::Whole(0),
        length: 14,
    };
    TextEncoder::new(tokenizer, frame, tower)
}

impl Tower for BothWays {
    fn table(&self) -> &Tensor<2> {
        &self.table
    }

    fn max_positions(&self) -> usize {
        14
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let rows = ids
            .iter()
            .map(|&id| self.table.clone().narrow(0, id as usize, 1));
        Ok(Tensor::cat(rows.collect(), 0))
    }

    fn extend(&mut self, rows: usize, embeddings: Tensor<2>) {
        let kept = self.table.clone().slice([0..rows]);
        self.table = Tensor::cat(vec![kept, embeddings], 0);
    }

    fn begin(&self, embeds: Tensor<2>) -> Result<Beginning> {
        Ok(Beginning::new(embeds))
    }

    fn finish(
        &self,
        beginning: Option<&Beginning>,
        rest: Tensor<2>,
        end: usize,
    ) -> Result<Encoded> {
        let before = beginning.and_then(Beginning::embeds).cloned();
        let parts = before.into_iter().chain([rest.unsqueeze()]);
        let whole = Tensor::cat(parts.collect(), 1); // [1, n, d]
        let [_, n, d] = whole.dims();
        let x = whole.clone() + whole.clone().mean_dim(1);
        let x = x.reshape([n, d]).matmul(self.layer.clone()).tanh();
        let states = x.clone().unsqueeze::<3>();
        Ok(Encoded {
            hidden_states: vec![whole, states.clone()],
            last_hidden_state: states,
            pooled: x.narrow(0, end, 1),
        })
    }
}

// A model of it.

fn golden(name: &str) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    root.join("tests/golden/learning").join(name)
}

/// Pseudo-random numbers.
fn array(shape: [usize; 2], scale: f32, seed: f32) -> Array {
    let values = (0..shape[0] * shape[1]).map(|i| (seed + 12.9898 * i as f32).sin() * scale);
    Array::floats(shape, values.collect())
}

/// A folder with the model.
fn model() -> tempfile::TempDir {
    static ROW: Once = Once::new();
    ROW.call_once(|| family::add(&TINY_FLOW));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
    write("model_index.json", r#"{"_class_name": "TinyFlowPipeline"}"#);
    write(
        "scheduler/scheduler_config.json",
        r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}"#,
    );
    write(
        "transformer/config.json",
        r#"{"sample_size": 8, "channels": 4, "width": 6, "hidden": 24}"#,
    );
    write(
        "text_encoder/config.json",
        r#"{"vocab_size": 663, "d_model": 6}"#,
    );
    for part in ["vae", "tokenizer"] {
        for file in fs::read_dir(golden(part)).unwrap() {
            let file = file.unwrap();
            let name = format!("{part}/{}", file.file_name().to_str().unwrap());
            fs::copy(file.path(), path(&name)).unwrap();
        }
    }
    Arrays::default()
        .with("latents", array([4, 24], 0.5, 1.0))
        .with("context", array([6, 24], 2.0, 2.0))
        .with("pooled", array([6, 24], 1.0, 3.0))
        .with("time", array([1, 24], 1.0, 4.0))
        .with("output", array([24, 4], 0.5, 5.0))
        .write(&path("transformer/diffusion_pytorch_model.safetensors"))
        .unwrap();
    Arrays::default()
        .with("table", array([663, 6], 1.0, 6.0))
        .with("layer", array([6, 6], 0.7, 7.0))
        .write(&path("text_encoder/model.safetensors"))
        .unwrap();
    folder
}

fn paths(folder: &tempfile::TempDir) -> ModelPaths {
    ModelPaths {
        model: folder.path().to_owned(),
        ..ModelPaths::default()
    }
}

fn opened(folder: &tempfile::TempDir) -> Models {
    Models::open(&paths(folder), &Device::flex(), FloatDType::F32).unwrap()
}

fn silent(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn example() -> Example {
    Example {
        a: load_image(&golden("a.png")).unwrap(),
        a_prime: load_image(&golden("a_prime.png")).unwrap(),
        caption_a: Some("a red house".to_owned()),
        caption_a_prime: Some("a blue house at night".to_owned()),
    }
}

fn config() -> AnalogyConfig {
    let mut config = AnalogyConfig::default().with_seed(3);
    config.learn.steps = 60;
    config.learn.learning_rate = Some(0.02);
    config.learn.num_tokens = 3;
    config.learn.select_every = 20;
    config.generate.num_inference_steps = 10;
    config
}

/// The loss of tokens [3, 6] on both pictures, at fixed times, `[1]`.
fn loss_of(models: &Models, tokens: &Tensor<2>) -> Tensor<1> {
    let pipeline = models.pipeline();
    let words = |text: &str| pipeline.read(&pipeline.prompt(text).unwrap(), 3).unwrap();
    let example = example();
    let pair = Pair {
        latents_a: pipeline.encode_image(&example.a),
        latents_a_prime: pipeline.encode_image(&example.a_prime),
        prompt_a: words("a red house"),
        prompt_a_prime: words("a blue house at night"),
        deltas: Vec::new(),
    };
    let [_, c, h, w] = pipeline.latent_shape();
    let wave = (0..4 * c * h * w).map(|i| 1.4 * (0.37 * i as f32 * i as f32).sin());
    let wave: Vec<f32> = wave.collect();
    let noise = Tensor::<1>::from_floats(wave.as_slice(), &Device::flex());
    let draws = Draws {
        timesteps: vec![900.5, 600.0, 333.3, 100.0],
        noise: noise.reshape([4, c, h, w]),
    };
    let tokens = std::slice::from_ref(tokens);
    let terms = loss::token_consistency(pipeline, &[pair], &draws, tokens, true).unwrap();
    terms.after + terms.before.unwrap()
}

#[test]
fn it_learns_a_difference_from_its_own_states_and_says_so() {
    let folder = model();
    let models = opened(&folder);
    let trace = folder.path().join("trace.safetensors");
    let records = Records {
        trace: Some(trace.clone()),
        ..Records::default()
    };
    let mut notices = Vec::new();
    let mut observer = |progress: &Progress| {
        if let Progress::Notice { message: text } = progress {
            notices.push(text.clone());
        }
        ControlFlow::Continue(())
    };
    let mut short = config();
    short.learn.steps = 2;
    let none = Records::default();
    let led = analogy::learn(&models, &[example()], &short, &none, &mut observer).unwrap();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].contains("follows only the captions"),
        "{notices:?}"
    );
    assert!(led.history.iter().all(|terms| terms.clip > 0.0));

    // From the pictures alone.
    let mut config = config();
    config.learn.lambda_clip = 0.0;
    let learn = |records: &Records| {
        analogy::learn(&models, &[example()], &config, records, &mut silent).unwrap()
    };
    let learned = learn(&records);
    assert_eq!(learned.history.len(), 60);
    let found = &learned.tokens.embeddings()[0];
    let [before, after] =
        [&found.zeros_like(), found].map(|tokens| loss_of(&models, tokens).into_scalar::<f32>());
    println!("loss {before} before, {after} after");
    assert!(learned.best_step > 0 && after < before, "{before} {after}");

    // Its times are not whole numbers, and are replayed exactly.
    let replayed = Records {
        replay: Some(trace),
        ..Records::default()
    };
    let again = learn(&replayed);
    let values = |tokens: &DifferenceTokens| {
        let embeddings = tokens.embeddings()[0].clone();
        embeddings.try_into_vec_as::<f32>().unwrap()
    };
    assert_eq!(values(&again.tokens), values(&learned.tokens));
}

#[test]
fn its_gradient_is_that_of_its_loss() {
    let models = opened(&model());
    let start = Tensor::<2>::full([3, 6], 0.3, &Device::flex());
    let leaf = start.clone().autodiff().require_grad();
    let gradients = loss_of(&models, &leaf).backward();
    let gradient = leaf.grad(&gradients).unwrap();
    let slope = gradient.clone().powi_scalar(2).sum().sqrt();
    let slope = slope.into_scalar::<f32>();
    let along = gradient / slope;
    let at = |step: f32| {
        let tokens = start.clone() + along.clone() * step;
        loss_of(&models, &tokens).into_scalar::<f32>()
    };
    let found = (at(0.05) - at(-0.05)) / 0.1;
    println!("gradient {slope}, finite difference {found}");
    assert!(slope > 1e-4 && (found - slope).abs() < 0.02 * slope);
}

#[test]
fn it_applies_a_difference_by_every_inversion() {
    let folder = model();
    let models = opened(&folder);
    let pipeline = models.pipeline();
    let tokens = Tensor::<2>::full([3, 6], 0.5, &Device::flex());
    let tokens = DifferenceTokens::new(vec![tokens], pipeline.base()).unwrap();
    let target = Target {
        b: example().a,
        caption_b: Some("a red house".to_owned()),
    };
    let same = pipeline.decode(pipeline.encode_image(&target.b)).unwrap();
    let worst = |picture: &RgbImage| furthest(picture, &same);
    for inversion in [Inversion::EditFriendly, Inversion::Ddim, Inversion::Sdedit] {
        let apply = |strength: f64| {
            let mut config = config();
            config.generate.inversion = inversion;
            config.generate.inversion_iterations = 8;
            config.generate.strength = strength;
            let applied = analogy::apply(&models, &tokens, &target, &config, &mut silent);
            applied.unwrap().b_prime
        };
        let (nothing, all) = (apply(0.0), apply(1.0));
        let [without, with] = [&nothing, &all].map(worst);
        println!("{inversion:?}: {without} of 255 without the difference, {with} with it");
        match inversion {
            Inversion::Sdedit => assert!(nothing != all),
            _ => assert!(without <= 2 && with > 5, "{inversion:?}: {without} {with}"),
        }
    }
}

#[test]
fn it_draws_with_its_own_solver_and_refuses_those_that_need_another_schedule() {
    let folder = model();
    let models = opened(&folder);
    let draw = |scheduler: Option<&str>| {
        let request = TextToImage {
            prompt: "a red house".to_owned(),
            num_inference_steps: 5,
            scheduler: scheduler.map(str::to_owned),
            ..TextToImage::default()
        };
        generate::generate(&models, &request, Inputs::default(), &mut silent)
    };
    assert_eq!(draw(None).unwrap(), draw(Some("euler")).unwrap());
    let refused = draw(Some("uni-pc")).unwrap_err().to_string();
    assert!(refused.contains("euler or ddim"), "{refused}");
}

#[test]
fn what_lists_parts_and_classes_reads_its_row() {
    let folder = model();
    assert!(hub::missing(folder.path(), None).is_empty());
    let memory = LearningMemory {
        dtype: FloatDType::F32,
        q8: false,
        memory: Memory::Normal,
        rows: 2,
        side: None,
        captions: false,
    };
    assert!(memory.peak(&paths(&folder)).unwrap() > 64 << 20);
    let mut with_unet = paths(&folder);
    with_unet.options.unet = Some(golden("unet"));
    let error = Models::open(&with_unet, &Device::flex(), FloatDType::F32).unwrap_err();
    let message = error.to_string();
    let expected = "unet/config.json: field `.`: missing field `channels`";
    assert!(message.ends_with(expected), "{message}");

    fs::remove_dir_all(folder.path().join("transformer")).unwrap();
    let missing = hub::missing(folder.path(), None);
    assert_eq!(
        missing,
        ["transformer/config.json", "transformer/*.safetensors"]
    );
    let error = Models::open(&paths(&folder), &Device::flex(), FloatDType::F32).unwrap_err();
    assert!(
        error.to_string().contains("no folder `transformer`"),
        "{error}"
    );
    fs::write(
        folder.path().join("model_index.json"),
        r#"{"_class_name": "X"}"#,
    )
    .unwrap();
    let error = Models::open(&paths(&folder), &Device::flex(), FloatDType::F32).unwrap_err();
    assert!(error.to_string().contains("or TinyFlowPipeline"), "{error}");
}
