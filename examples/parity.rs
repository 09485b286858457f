//! One network of a model folder against what diffusers or transformers computed with it: the
//! Rust half of `training/reference/parity.py`, which makes the folders and the reference.
//!
//! ```text
//! cargo run --release --example parity -- PART FOLDER IO.safetensors
//! ```
//!
//! PART is `unet`, `transformer`, `vae`, `text`, `vision`, `t5` or `qwen3`. The file holds the inputs and the expected outputs. For every output a line is printed: its
//! name, and the largest difference relative to the largest reference value.

#![expect(clippy::print_stdout, reason = "the errors are the result")]

#[path = "../benches/compare/transformer.rs"]
mod transformer_of;

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Error;
use difference_inversion::models::denoiser::conditions::Conditions;
use difference_inversion::models::denoiser::unet::{
    AddedConditions, UNet2DConditionModel, UNetConfig,
};
use difference_inversion::models::denoiser::{How, Memory};
use difference_inversion::models::text::clip_text::ClipTextModel;
use difference_inversion::models::text::qwen3::{Qwen3Config, Qwen3Model};
use difference_inversion::models::text::t5::{T5Config, T5EncoderModel};
use difference_inversion::models::text::tower::Tower;
use difference_inversion::models::vae::{Autoencoder, AutoencoderKL, AutoencoderKLConfig};
use difference_inversion::models::vision::clip_image::ClipVisionModel;
use difference_inversion::util::arrays::{Arrays, Values};
use difference_inversion::weights::{Weights, read_config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Nothing, or whatever went wrong.
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [part, folder, io] = &arguments[..] else {
        return Err("usage: parity PART FOLDER IO.safetensors".into());
    };
    difference_inversion::on_workers(|| {
        let (folder, arrays) = (Path::new(folder), Arrays::read(Path::new(io))?);
        let reference = Reference { arrays };
        match part.as_str() {
            "unet" => unet(folder, &reference)?,
            "transformer" => transformer(folder, &reference)?,
            "vae" => vae(folder, &reference)?,
            "text" => text(folder, &reference)?,
            "vision" => vision(folder, &reference)?,
            "t5" => t5(folder, &reference)?,
            "qwen3" => qwen3(folder, &reference)?,
            _ => return Err(format!("{part}: no such part").into()),
        }
        Ok(())
    })
}

/// Inputs and expected outputs.
struct Reference {
    arrays: Arrays,
}

impl Reference {
    fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>, Error> {
        self.arrays.tensor(name, &Device::flex())
    }

    /// The token ids of the prompt.
    fn ids(&self) -> Result<Vec<u32>, Box<dyn std::error::Error + Send + Sync>> {
        match self.arrays.array("input_ids")?.values() {
            Values::I64(ids) => {
                let ids = ids.iter().map(|&id| u32::try_from(id));
                Ok(ids.collect::<Result<_, _>>()?)
            }
            Values::F32(_) => Err("input_ids: expected integers, found fractions".into()),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.arrays.arrays.contains_key(name)
    }

    /// Prints how far an output is from the expected one.
    fn compare<const D: usize>(&self, name: &str, found: Tensor<D>) -> Result<(), Error> {
        let expected = self.tensor::<D>(name)?;
        if found.dims() != expected.dims() {
            let (found, expected) = (found.dims(), expected.dims());
            let reason = format!("{name}: expected shape {expected:?}, found {found:?}");
            return Err(Error::invalid_input(reason));
        }
        let largest = expected.clone().abs().max().into_scalar::<f32>();
        let error = (found - expected).abs().max().into_scalar::<f32>() / largest;
        println!("{name} {error:.3e}");
        Ok(())
    }
}

fn weights(folder: &Path) -> Result<Weights, Error> {
    Weights::open(folder, &Device::flex(), FloatDType::F32)
}

fn unet(folder: &Path, reference: &Reference) -> Result<(), Error> {
    let config: UNetConfig = read_config(&folder.join("config.json"))?;
    let unet = UNet2DConditionModel::load(&weights(folder)?, &config)?;
    let added = match reference.has("text_embeds") {
        true => Some(AddedConditions {
            text_embeds: reference.tensor("text_embeds")?,
            time_ids: reference.tensor("time_ids")?,
        }),
        false => None,
    };
    let (sample, timesteps) = (reference.tensor("sample")?, reference.tensor("timesteps")?);
    let context = reference.tensor("encoder_hidden_states")?;
    let output = unet.forward(sample, timesteps, context, added.as_ref());
    reference.compare("output", output)
}

fn transformer(folder: &Path, reference: &Reference) -> Outcome {
    let network = transformer_of::open(folder, &weights(folder)?)?;
    let pooled = match reference.has("pooled") {
        true => Some(reference.tensor("pooled")?),
        false => None,
    };
    let conditions = Conditions {
        pooled,
        ..Conditions::new(reference.tensor("context")?)
    };
    let times = reference.tensor::<1>("timesteps")?.into_data();
    let times: Vec<f64> = times.iter::<f64>().collect();
    let latents = reference.tensor("latents")?;
    let output = network.predict(latents, &times, &conditions, How::default());
    Ok(reference.compare("output", output)?)
}

fn vae(folder: &Path, reference: &Reference) -> Result<(), Error> {
    let config: AutoencoderKLConfig = read_config(&folder.join("config.json"))?;
    let vae = AutoencoderKL::load(&weights(folder)?, &config)?;
    let (image, latents) = (reference.tensor("image")?, reference.tensor("latents")?);
    reference.compare("mean", vae.encode(image).mean)?;
    reference.compare("decoded", vae.decode(latents))
}

fn text(folder: &Path, reference: &Reference) -> Outcome {
    let model = ClipTextModel::open(folder, &Device::flex(), FloatDType::F32)?;
    let ids = reference.ids()?;
    let end = model.eos_position(&ids);
    let output = model.forward_embeds(model.embed_tokens(&[ids])?, &[end])?;
    let layers = output.hidden_states.len();
    reference.compare("last_hidden_state", output.last_hidden_state)?;
    reference.compare("penultimate", output.hidden_states[layers - 2].clone())?;
    if reference.has("text_embeds") {
        reference.compare("text_embeds", model.project(output.pooled)?)?;
    }
    Ok(())
}

fn t5(folder: &Path, reference: &Reference) -> Outcome {
    let config: T5Config = read_config(&folder.join("config.json"))?;
    let model = T5EncoderModel::load(&weights(folder)?, &config, Memory::Normal)?;
    let ids = reference.ids()?;
    let encoded = model.finish(None, model.embed(&ids)?, ids.len() - 1)?;
    Ok(reference.compare("last_hidden_state", encoded.last_hidden_state)?)
}

fn qwen3(folder: &Path, reference: &Reference) -> Outcome {
    let config: Qwen3Config = read_config(&folder.join("config.json"))?;
    let model = Qwen3Model::load(&weights(folder)?, &config, &[1, 2])?;
    let ids = reference.ids()?;
    let encoded = model.finish(None, model.embed(&ids)?, ids.len() - 1)?;
    for (number, states) in encoded.hidden_states.into_iter().enumerate() {
        reference.compare(&format!("layer_{}", number + 1), states)?;
    }
    Ok(())
}

fn vision(folder: &Path, reference: &Reference) -> Result<(), Error> {
    let model = ClipVisionModel::open(folder, &Device::flex(), FloatDType::F32)?;
    let pooled = model.forward(reference.tensor("pixel_values")?)?;
    reference.compare("image_embeds", model.project(pooled)?)
}
