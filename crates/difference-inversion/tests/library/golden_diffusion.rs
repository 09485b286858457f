//! The U-Net and the autoencoder against diffusers, on tiny networks with random weights made by
//! `training/reference/make_golden_diffusion.py`.

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::models::denoiser::unet::{
    AddedConditions, UNet2DConditionModel, UNetConfig,
};
use difference_inversion::models::vae::{Autoencoder, AutoencoderKL, AutoencoderKLConfig};
use difference_inversion::weights::{PerBlock, Weights, read_config};

use super::common::{assert_matches, golden, open, read};

struct UNetCase {
    unet: UNet2DConditionModel,
    io: Weights,
    added: Option<AddedConditions>,
}

impl UNetCase {
    fn open(name: &str) -> Self {
        let folder = golden(name);
        let config: UNetConfig = read_config(&folder.join("config.json")).unwrap();
        let unet = UNet2DConditionModel::load(&open(&folder), &config).unwrap();
        let io = open(&folder.join("io.safetensors"));
        let added = config.needs_added_conditions().then(|| AddedConditions {
            text_embeds: read(&io, "text_embeds"),
            time_ids: read(&io, "time_ids"),
        });
        Self { unet, io, added }
    }

    fn forward(&self, context: Tensor<3>) -> Tensor<4> {
        let (sample, timesteps) = (read(&self.io, "sample"), read(&self.io, "timesteps"));
        self.unet
            .forward(sample, timesteps, context, self.added.as_ref())
    }

    /// `Σ output · output_grad`, of which `context_grad` is the gradient.
    fn weighted_output(&self, context: Tensor<3>) -> Tensor<1> {
        (self.forward(context) * read::<4>(&self.io, "output_grad")).sum()
    }
}

fn check_unet(name: &str) {
    let case = UNetCase::open(name);
    let context = read::<3>(&case.io, "encoder_hidden_states");
    assert_matches(
        name,
        case.forward(context.clone()),
        read(&case.io, "output"),
    );

    let tracked = context.autodiff().require_grad();
    let grads = case.weighted_output(tracked.clone()).backward();
    let gradient = tracked.grad(&grads).unwrap();
    assert_matches(
        &format!("{name} gradient"),
        gradient,
        read(&case.io, "context_grad"),
    );
}

#[test]
fn unet_of_stable_diffusion_1_matches_diffusers() {
    check_unet("unet_sd15");
}

#[test]
fn unet_of_stable_diffusion_2_matches_diffusers_at_an_odd_size() {
    check_unet("unet_sd21");
}

#[test]
fn unet_of_sdxl_matches_diffusers() {
    check_unet("unet_sdxl");
}

/// Each transformer of a level has its own number of blocks, and the up path differs from the down path.
#[test]
fn unet_of_ssd_1b_matches_diffusers() {
    check_unet("unet_ssd1b");
}

#[test]
fn unet_gradient_agrees_with_finite_differences() {
    const STEP: f32 = 1e-2;
    let case = UNetCase::open("unet_sd15");
    let context = read::<3>(&case.io, "encoder_hidden_states");
    let tracked = context.clone().autodiff().require_grad();
    let grads = case.weighted_output(tracked.clone()).backward();
    let gradient = tracked.grad(&grads).unwrap();
    let [b, n, d] = context.dims();
    for token in 0..b * n {
        // Along the token's own gradient the slope is the gradient's norm.
        let place = [token / n..token / n + 1, token % n..token % n + 1, 0..d];
        let token_grad = gradient.clone().slice(place.clone());
        let norm = token_grad
            .clone()
            .square()
            .sum()
            .sqrt()
            .into_scalar::<f32>();
        assert!(norm > 1e-3, "token {token} has no gradient");
        let direction = context.zeros_like().slice_assign(place, token_grad / norm);
        let at = |step: f32| {
            let moved = context.clone() + direction.clone() * step;
            case.weighted_output(moved).into_scalar::<f32>()
        };
        let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        assert!(
            (slope - norm).abs() <= 1e-2 * norm,
            "token {token}: {slope} against {norm}"
        );
    }
}

fn check_vae(name: &str) {
    let folder = golden(name);
    let config: AutoencoderKLConfig = read_config(&folder.join("config.json")).unwrap();
    let vae = AutoencoderKL::load(&open(&folder), &config).unwrap();
    let io = open(&folder.join("io.safetensors"));
    let posterior = vae.encode(read(&io, "image"));
    assert_matches(&format!("{name} mean"), posterior.mean, read(&io, "mean"));
    assert_matches(
        &format!("{name} logvar"),
        posterior.logvar,
        read(&io, "logvar"),
    );
    let decoded = vae.decode(read(&io, "latents"));
    assert_matches(&format!("{name} decoded"), decoded, read(&io, "decoded"));
}

#[test]
fn autoencoder_matches_diffusers() {
    check_vae("vae");
}

#[test]
fn autoencoder_without_its_optional_layers_matches_diffusers() {
    check_vae("vae_plain");
}

#[test]
fn autoencoder_with_the_tensor_names_of_stable_diffusion_1_is_read() {
    let folder = golden("vae");
    let bytes = std::fs::read(folder.join("diffusion_pytorch_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let old_name = |name: String| {
        [
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ]
        .into_iter()
        .fold(name, |name, (new, old)| name.replace(new, old))
    };
    let tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (old_name(name), view));
    let bytes = safetensors::serialize(tensors, None).unwrap();
    let weights = Weights::from_bytes(bytes, "vae", &Device::flex(), FloatDType::F32).unwrap();
    assert!(weights.contains("encoder.mid_block.attentions.0.proj_attn.weight"));
    let config: AutoencoderKLConfig = read_config(&folder.join("config.json")).unwrap();
    let vae = AutoencoderKL::load(&weights, &config).unwrap();
    let io = open(&folder.join("io.safetensors"));
    let decoded = vae.decode(read(&io, "latents"));
    assert_matches("vae of old names", decoded, read(&io, "decoded"));
}

#[test]
fn a_config_that_does_not_fit_the_weights_is_an_error() {
    let folder = golden("unet_sd15");
    let message = |change: fn(&mut UNetConfig)| {
        let mut config: UNetConfig = read_config(&folder.join("config.json")).unwrap();
        change(&mut config);
        UNet2DConditionModel::load(&open(&folder), &config)
            .unwrap_err()
            .to_string()
    };
    let text = message(|config| config.cross_attention_dim = PerBlock::Same(16));
    assert!(text.contains("attn2.to_k.weight`: expected shape [8, 16], found shape [8, 12]"));
    let text = message(|config| config.layers_per_block = PerBlock::Same(3));
    assert!(text.contains("found no such tensor"), "{text}");
    let text = message(|config| config.mid_block_type = None);
    assert!(text.contains("are not used by the model that config.json describes: mid_block."));
}
