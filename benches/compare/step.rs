//! The worker of `compare.py`: one optimisation step, or one call of the denoiser, for every line read. With
//! `kernels`, what `benches/gpu` says of a GPU's kernels.
//!
//! ```text
//! step kernels GROUP …
//! step MODEL INPUTS step|call [--dtype f16|bf16|q8] [--memory low] [--device cpu|vulkan|webgpu]
//! ```
//!
//! Says `ready` when the models are open, then prints the loss and the norm of the gradient each
//! time (for `call` the mean square of the prediction, and 0), as `torch_step.py` does.

#![expect(clippy::print_stdout, reason = "the results are the result")]

#[cfg(feature = "gpu")]
#[path = "../gpu/kernels.rs"]
mod kernels;
mod transformer;

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use difference_inversion::method::learn::{AdamW, Moments};
use difference_inversion::models::denoiser::conditions::Conditions;
use difference_inversion::models::denoiser::unet::{
    AddedConditions, UNet2DConditionModel, UNetConfig,
};
use difference_inversion::models::denoiser::{Denoiser, How, Memory};
use difference_inversion::models::text::clip_text::ClipTextModel;
use difference_inversion::models::text::tower::Beginning;
use difference_inversion::util::arrays::{Arrays, Values};
use difference_inversion::weights::{Weights, compute_dtype, read_config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LEARNING_RATE: f64 = 1e-3;
const WEIGHT_DECAY: f64 = 0.01;
const LAMBDA_MSE: f64 = 4.0;
const LAMBDA_CLIP: f64 = 0.1;
/// The loss is this many times as large in the backward pass: gradients fall below the range of f16.
const LOSS_SCALE: f32 = 1024.0;

fn main() {
    difference_inversion::on_workers(run);
}

fn run() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    #[cfg(feature = "gpu")]
    if let [kernels, arguments @ ..] = arguments.as_slice()
        && kernels == "kernels"
    {
        return kernels::run(arguments);
    }
    let [model, inputs, what, flags @ ..] = arguments.as_slice() else {
        println!(
            "usage: step MODEL INPUTS step|call [--dtype f16|bf16|q8] [--memory low] \
             [--device cpu|vulkan|webgpu]"
        );
        return;
    };
    let flag = |name: &str| {
        let place = flags.iter().position(|flag| flag == name)?;
        flags.get(place + 1).map(String::as_str)
    };
    let dtype = match flag("--dtype") {
        Some("f16" | "q8") => FloatDType::F16,
        Some("bf16") => FloatDType::BF16,
        _ => FloatDType::F32,
    };
    let device = match flag("--device") {
        None | Some("cpu") => Device::flex(),
        #[cfg(feature = "vulkan")]
        Some("vulkan") => Device::vulkan(Default::default()),
        #[cfg(feature = "webgpu")]
        Some("webgpu") => Device::wgpu(Default::default()),
        Some(other) => {
            println!("no device {other} in this build");
            return;
        }
    };
    let memory = match flag("--memory") {
        Some("low") => Memory::Low,
        _ => Memory::Normal,
    };
    let q8 = flag("--dtype") == Some("q8");
    if q8 && device != Device::flex() {
        println!("q8 is for the CPU");
        return;
    }
    let (model, inputs) = (Path::new(model), Path::new(inputs));
    let way = Way {
        device,
        dtype,
        q8,
        memory,
    };
    let mut step: Box<dyn Work> = match model.join("transformer").is_dir() {
        true => Box::new(TransformerStep::open(model, inputs, &way)),
        false => Box::new(Step::open(model, inputs, &way)),
    };
    println!("ready");
    for line in std::io::stdin().lines() {
        // A line may name something else to be done.
        let line = line.expect("a line");
        let (loss, norm) = match if line.is_empty() { what } else { line.as_str() } {
            "step" => step.step(),
            _ => step.once(),
        };
        println!("[{loss}, {norm}]");
    }
}

/// How a model is opened.
struct Way {
    device: Device,
    dtype: FloatDType,
    q8: bool,
    memory: Memory,
}

impl Way {
    fn weights(&self, folder: &Path) -> Weights {
        let weights = Weights::open(folder, &self.device, self.dtype).expect("weights");
        match self.q8 {
            true => weights.in_8_bits(),
            false => weights,
        }
    }

    /// What is computed in.
    fn computed(&self) -> DType {
        compute_dtype(&self.device, self.dtype).into()
    }
}

/// What is timed. Both return the loss and the norm of the gradient.
trait Work {
    fn step(&mut self) -> (f32, f32);
    fn once(&self) -> (f32, f32);
}

/// A flow-matching transformer by itself: the gradient is that of what it is told.
struct TransformerStep {
    network: Arc<dyn Denoiser>,
    inputs: Arrays,
    device: Device,
    dtype: DType,
    memory: Memory,
}

impl TransformerStep {
    fn open(model: &Path, inputs: &Path, way: &Way) -> Self {
        let folder = model.join("transformer");
        Self {
            network: transformer::open(&folder, &way.weights(&folder)).expect("a transformer"),
            inputs: Arrays::read(inputs).expect("inputs"),
            device: way.device.clone(),
            dtype: way.computed(),
            memory: way.memory,
        }
    }

    fn input<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.inputs.tensor(name, &self.device).expect("an input")
    }

    fn predict(&self, context: Tensor<3>, pooled: Tensor<2>) -> Tensor<4> {
        let times: Vec<f64> = (self.input::<1>("timesteps").into_data().iter::<f64>()).collect();
        let conditions = Conditions {
            pooled: Some(pooled),
            ..Conditions::new(context)
        };
        let how = How {
            memory: self.memory,
            ..How::default()
        };
        let noisy = self.input::<4>("noisy").cast(self.dtype);
        let predicted = (self.network).predict(noisy, &times, &conditions.cast(self.dtype), how);
        predicted.cast(DType::F32)
    }
}

impl Work for TransformerStep {
    fn once(&self) -> (f32, f32) {
        let prediction = self.predict(self.input("context"), self.input("pooled"));
        (prediction.square().mean().into_scalar(), 0.0)
    }

    fn step(&mut self) -> (f32, f32) {
        let context = self.input::<3>("context").autodiff().require_grad();
        let pooled = self.input::<2>("pooled").autodiff().require_grad();
        let prediction = self.predict(context.clone(), pooled.clone());
        let loss = (prediction - self.input("target")).square().mean();
        let gradients = (loss.clone() * LOSS_SCALE).backward();
        let squares = |x: Tensor<1>| (x / LOSS_SCALE).square().sum().into_scalar::<f32>();
        let of_context = context.grad(&gradients).expect("a gradient").flatten(0, 2);
        let of_pooled = pooled.grad(&gradients).expect("a gradient").flatten(0, 1);
        let norm = (squares(of_context) + squares(of_pooled)).sqrt();
        (loss.into_scalar(), norm)
    }
}

/// A text encoder, what it has to read, and the tokens to learn.
struct Encoder {
    model: ClipTextModel,
    /// The beginnings of both prompts, and the start alone.
    beginnings: [Beginning; 3],
    /// What follows the tokens in each, [n, d].
    ends: [Tensor<2>; 3],
    delta: Tensor<2>,
    tokens: Tensor<2>,
    moments: Moments<2>,
}

/// What one prompt becomes: hidden states for the U-Net, and pooled features.
struct Read {
    states: Tensor<3>,
    features: Tensor<2>,
}

impl Encoder {
    fn open(
        folder: &Path,
        number: usize,
        inputs: &Arrays,
        device: &Device,
        dtype: FloatDType,
    ) -> Self {
        let model = ClipTextModel::open(folder, device, dtype).expect("a text encoder");
        let floats = |name: &str| inputs.tensor::<2>(&format!("{name}.{number}"), device);
        let tokens = floats("tokens").expect("tokens");
        let count = tokens.dims()[0];
        let embed = |ids: &[u32]| model.embed_tokens(&[ids.to_vec()]).expect("known ids");
        let starts = ids(inputs, "starts");
        let prompts = ids(inputs, "ids");
        let length = prompts.len() / 2;
        let (first, second) = prompts.split_at(length);
        let alone = ids(inputs, "ids_alone");
        let rows = [
            (first, starts[0] as usize),
            (second, starts[1] as usize),
            (&alone, 1),
        ];
        Self {
            beginnings: rows.map(|(ids, start)| model.prefix(embed(&ids[..start])).expect("room")),
            ends: rows.map(|(ids, start)| embed(&ids[start + count..]).squeeze_dim(0)),
            delta: floats("delta").expect("a delta"),
            moments: Moments::zeros_like(&tokens),
            tokens,
            model,
        }
    }

    /// Reads prompt `number` with `tokens` in their place; SDXL's U-Net takes the hidden states
    /// before the last layer.
    fn read(&self, number: usize, tokens: Tensor<2>, penultimate: bool) -> Read {
        let (beginning, ends) = (&self.beginnings[number], &self.ends[number]);
        let position = beginning.len() + tokens.dims()[0];
        let rest = Tensor::cat(vec![tokens.cast(ends.dtype()), ends.clone()], 0).unsqueeze();
        let output = (self.model)
            .forward_embeds_after(beginning, rest, &[position])
            .expect("a prompt that fits");
        let layer = output.hidden_states.len() - 2;
        Read {
            states: if penultimate {
                output.hidden_states[layer].clone()
            } else {
                output.last_hidden_state
            },
            features: self.model.project(output.pooled).expect("a projection"),
        }
    }
}

fn ids(inputs: &Arrays, name: &str) -> Vec<u32> {
    match inputs.array(name).expect("an input").values() {
        Values::I64(ids) => ids
            .iter()
            .map(|&id| u32::try_from(id).expect("an id"))
            .collect(),
        Values::F32(_) => Vec::new(),
    }
}

struct Step {
    unet: UNet2DConditionModel,
    encoders: Vec<Encoder>,
    inputs: Arrays,
    device: Device,
    /// What is computed in.
    dtype: DType,
    memory: Memory,
    steps: usize,
}

impl Step {
    fn open(model: &Path, inputs: &Path, way: &Way) -> Self {
        let folder = model.join("unet");
        let config: UNetConfig = read_config(&folder.join("config.json")).expect("a config.json");
        let unet = UNet2DConditionModel::load(&way.weights(&folder), &config).expect("a U-Net");
        let inputs = Arrays::read(inputs).expect("inputs");
        let encoders = ["text_encoder", "text_encoder_2"].map(|name| model.join(name));
        let encoders = (encoders.iter().filter(|folder| folder.is_dir()).enumerate())
            .map(|(number, folder)| Encoder::open(folder, number, &inputs, &way.device, way.dtype))
            .collect();
        Self {
            unet,
            encoders,
            inputs,
            device: way.device.clone(),
            dtype: way.computed(),
            memory: way.memory,
            steps: 0,
        }
    }

    fn input<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.inputs.tensor(name, &self.device).expect("an input")
    }

    /// `states` [2, n, d] and the pooled prompts [2, e] for as many rows as there are latents.
    fn predict(&self, states: &Tensor<3>, text_embeds: Option<Tensor<2>>) -> Tensor<4> {
        let noisy: Tensor<4> = self.input("noisy");
        let draws = noisy.dims()[0] / 2;
        let rows: Vec<usize> = (0..2).flat_map(|row| vec![row; draws]).collect();
        let added = text_embeds.map(|text_embeds| {
            let time_ids: Tensor<2> = self.input("time_ids");
            AddedConditions {
                text_embeds: repeat(&text_embeds.cast(self.dtype), &rows),
                time_ids: repeat(&time_ids, &rows),
            }
        });
        (self.unet)
            .forward_with(
                noisy.cast(self.dtype),
                self.input("timesteps"),
                repeat(&states.clone().cast(self.dtype), &rows),
                added.as_ref(),
                How {
                    memory: self.memory,
                    ..How::default()
                },
            )
            .cast(DType::F32)
    }
}

impl Work for Step {
    fn once(&self) -> (f32, f32) {
        let text_embeds = (self.encoders.len() > 1).then(|| self.input("text_embeds"));
        let prediction = self.predict(&self.input("context"), text_embeds);
        (prediction.square().mean().into_scalar(), 0.0)
    }

    fn step(&mut self) -> (f32, f32) {
        let sdxl = self.encoders.len() > 1;
        let (mut tracked, mut states, mut pooled, mut clip) = (vec![], vec![], None, vec![]);
        for encoder in &self.encoders {
            let tokens = encoder.tokens.clone().autodiff().require_grad();
            let after = encoder.read(0, tokens.clone(), sdxl);
            let before = encoder.read(1, tokens.clone().neg(), sdxl);
            states.push(Tensor::cat(vec![after.states, before.states], 0));
            pooled = Some(Tensor::cat(vec![after.features, before.features], 0));
            let features = encoder
                .read(2, tokens.clone(), false)
                .features
                .cast(DType::F32);
            clip.push(cosine(features, encoder.delta.clone()).neg() + 1.0);
            tracked.push(tokens);
        }
        let prediction = self.predict(&Tensor::cat(states, 2), pooled.filter(|_| sdxl));
        let squares = (prediction - self.input("target")).square();
        let rows = squares.dims()[0];
        let after = squares.clone().slice([0..rows / 2]).mean();
        let before = squares.slice([rows / 2..rows]).mean();
        let loss = (after + before) * LAMBDA_MSE + Tensor::cat(clip, 0).mean() * LAMBDA_CLIP;
        let gradients = (loss.clone() * LOSS_SCALE).backward();
        let optimiser = AdamW::new(LEARNING_RATE, WEIGHT_DECAY);
        let mut squares = 0.0;
        for (encoder, tracked) in self.encoders.iter_mut().zip(&tracked) {
            let gradient = tracked.grad(&gradients).expect("a gradient") / LOSS_SCALE;
            squares += gradient.clone().square().sum().into_scalar::<f32>();
            let tokens = encoder.tokens.clone();
            encoder.tokens = optimiser.step(tokens, gradient, &mut encoder.moments, self.steps);
        }
        self.steps += 1;
        (loss.into_scalar(), squares.sqrt())
    }
}

/// The rows numbered `rows`.
fn repeat<const D: usize>(x: &Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let rows = rows.iter().map(|&row| x.clone().slice_dim(0, row..row + 1));
    Tensor::cat(rows.collect(), 0)
}

fn cosine(x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    let norm = |x: Tensor<2>| x.square().sum().sqrt();
    (x.clone() * y.clone()).sum() / (norm(x) * norm(y))
}
