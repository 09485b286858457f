//! Every family of models, on tiny pipelines with random weights, against diffusers.

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::draw::{InitNoise, TextToImage};
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::guide::GuidedBy;
use difference_inversion::diffusion::pipeline::{Conditions, Pipeline};
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::load_image;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::models::denoiser::unet_denoiser::time_ids;
use difference_inversion::util::arrays::Arrays;

use crate::tiny::{
    PROMPT, copy, edit, example_in, golden, models_in, opened, opened_in, refused, relative_error,
    request, silent,
};

/// Largest difference from diffusers, relative to the largest reference value.
const TOLERANCE: f32 = 1e-4;
const NEGATIVE: &str = "red";

/// The results of diffusers in a golden folder.
struct Expected(Arrays);

impl Expected {
    fn of(folder: &str) -> Self {
        Self(Arrays::read(&golden(folder).join("io.safetensors")).unwrap())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.0.tensor(name, &Device::flex()).unwrap()
    }

    /// The initial latents of all drawings.
    fn init(&self) -> InitNoise {
        InitNoise {
            latents: self.tensor("latents"),
            noise: None,
        }
    }

    #[track_caller]
    fn check<const D: usize>(&self, name: &str, found: Tensor<D>) {
        let expected = self.tensor::<D>(name);
        assert_eq!(found.dims(), expected.dims(), "{name}");
        let error = relative_error(found, expected);
        println!("{name}: relative error {error:.1e}");
        assert!(error <= TOLERANCE, "{name}: relative error {error:.1e}");
    }

    /// Compares the picture drawn from the golden latents.
    #[track_caller]
    fn check_drawing(&self, name: &str, models: &Models, request: &TextToImage) -> Tensor<4> {
        self.check_change(name, models, request, &Inputs::default())
    }

    /// The same for models that also take other inputs.
    #[track_caller]
    fn check_change(
        &self,
        name: &str,
        models: &Models,
        request: &TextToImage,
        inputs: &Inputs<'_>,
    ) -> Tensor<4> {
        let inputs = Inputs {
            init: Some(self.init()),
            ..inputs.clone()
        };
        let drawn = generate::generate_latents(models, request, inputs, &mut silent).unwrap();
        self.check(name, drawn.clone());
        drawn
    }

    /// Compares a decoded picture, which has 256 levels.
    fn check_picture(&self, models: &Models, latents: Tensor<4>) {
        let picture = models.pipeline().decode(latents).unwrap();
        let expected: Vec<f32> = (self.tensor::<4>("picture").squeeze_dim::<3>(0))
            .permute([1, 2, 0])
            .try_into_vec_as()
            .unwrap();
        let differs = |(&found, expected): (&u8, f32)| (f32::from(found) - expected * 255.0).abs();
        let worst = (picture.as_raw().iter().zip(expected))
            .map(differs)
            .fold(0.0, f32::max);
        println!("picture: {worst:.2} of 255");
        assert!(worst <= 0.51, "{worst} of 255");
    }
}

fn encode(pipeline: &Pipeline, text: &str) -> Conditions {
    let words = pipeline.read(&pipeline.prompt(text).unwrap(), 0).unwrap();
    pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap()
}

#[test]
fn stable_diffusion_2_equals_diffusers() {
    let (models, expected) = (models_in(&golden("sd21")), Expected::of("sd21"));
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::STABLE_DIFFUSION);
    let negative = pipeline.encode_negative_prompt(NEGATIVE).unwrap();
    expected.check("prompt_embeds", encode(pipeline, PROMPT).context);
    expected.check("negative_prompt_embeds", negative.context);
    let drawn = expected.check_drawing("drawn", &models, &request(5, 4.0));
    expected.check_picture(&models, drawn);
}

#[test]
fn sdxl_reads_prompts_as_diffusers_does() {
    let (models, expected) = (models_in(&golden("sdxl")), Expected::of("sdxl"));
    let pipeline = models.pipeline();
    assert_eq!(pipeline.family(), &family::STABLE_DIFFUSION_XL);
    let check = |prefix: &str, negative: &str, conditions: Conditions| {
        let name = |kind: &str| format!("{prefix}{negative}{kind}");
        expected.check(&name("prompt_embeds"), conditions.context);
        expected.check(&name("pooled_prompt_embeds"), conditions.pooled.unwrap());
    };
    check("", "", encode(pipeline, PROMPT));
    let sizes = time_ids(pipeline.resolution().map(|side| side as usize));
    assert_eq!(sizes, [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]);
    let negative = pipeline.encode_negative_prompt(NEGATIVE).unwrap();
    check("given.", "negative_", negative);

    // Without a negative prompt, zeros; but not for a model that does not request them.
    let values = |conditions: &Conditions| {
        let states = conditions.context.clone();
        states.try_into_vec_as::<f32>().unwrap()
    };
    let absent = pipeline.encode_negative_prompt("").unwrap();
    assert!(values(&absent).iter().all(|&value| value == 0.0));
    expected_zeros(&expected);
    let other = copy("sdxl");
    let index = other.path().join("model_index.json");
    edit(
        &index,
        "\"force_zeros_for_empty_prompt\": true",
        "\"force_zeros_for_empty_prompt\": false",
    );
    let other = opened(other.path()).unwrap();
    let absent = other.encode_negative_prompt("").unwrap();
    assert_eq!(values(&absent), values(&encode(&other, "")));
}

/// Checks that diffusers also has zeros without a negative prompt.
fn expected_zeros(expected: &Expected) {
    let states: Tensor<3> = expected.tensor("negative_prompt_embeds");
    let pooled: Tensor<2> = expected.tensor("negative_pooled_prompt_embeds");
    assert_eq!(states.abs().max().into_scalar::<f32>(), 0.0);
    assert_eq!(pooled.abs().max().into_scalar::<f32>(), 0.0);
}

#[test]
fn sdxl_draws_what_diffusers_draws() {
    let (models, expected) = (models_in(&golden("sdxl")), Expected::of("sdxl"));
    let drawn = expected.check_drawing("drawn", &models, &request(4, 5.0));
    expected.check_picture(&models, drawn);
    let with_negative = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 5.0)
    };
    expected.check_drawing("drawn_with_negative", &models, &with_negative);
}

#[test]
fn sdxl_turbo_draws_without_guidance() {
    let folder = copy("sdxl");
    let scheduler = folder.path().join("scheduler/scheduler_config.json");
    edit(&scheduler, "\"leading\"", "\"trailing\"");
    edit(&scheduler, "\"steps_offset\": 1", "\"steps_offset\": 0");
    let (models, expected) = (models_in(folder.path()), Expected::of("sdxl"));
    for guidance_scale in [0.0, 1.0] {
        let request = TextToImage {
            negative_prompt: "whatever".to_owned(),
            ..request(2, guidance_scale)
        };
        expected.check_drawing("drawn_by_turbo", &models, &request);
    }
}

#[test]
fn sdxl_keeps_its_autoencoder_in_f32() {
    let picture = example_in("sdxl").a;
    let encode = |folder: &str, dtype| {
        let pipeline = opened_in(&golden(folder), dtype).unwrap();
        let latents = pipeline.encode_image(&picture);
        assert_eq!(latents.dtype(), burn::tensor::DType::F32);
        latents
    };
    let difference = |folder| {
        let narrow = encode(folder, FloatDType::BF16); // the files hold f16
        relative_error(narrow, encode(folder, FloatDType::F32))
    };
    assert_eq!(difference("sdxl"), 0.0);
    assert!(difference("sd21") > 0.0);
}

#[test]
fn instruct_pix2pix_changes_a_picture_as_diffusers_does() {
    let folder = golden("instruct_pix2pix");
    let (models, expected) = (models_in(&folder), Expected::of("instruct_pix2pix"));
    assert_eq!(models.pipeline().family(), &family::INSTRUCT_PIX2PIX);
    let image = load_image(&folder.join("a.png")).unwrap();
    let inputs = Inputs {
        image: Some(&image),
        ..Inputs::default()
    };
    let guided = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 4.0)
    };
    let drawn = expected.check_change("drawn", &models, &guided, &inputs);
    expected.check_picture(&models, drawn.clone());
    // Difference tokens may follow the instruction.
    let base = models.pipeline().base();
    let tokens = vec![Tensor::ones(
        [2, base.encoders[0].hidden_size],
        &Device::flex(),
    )];
    let tokens = DifferenceTokens::new(tokens, base).unwrap();
    let with_difference = Inputs {
        tokens: Some(&tokens),
        init: Some(expected.init()),
        ..inputs.clone()
    };
    let changed = generate::generate_latents(&models, &guided, with_difference, &mut silent);
    assert!(relative_error(changed.unwrap(), drawn) > TOLERANCE);
    // Either scale turns guidance off.
    let by_picture_alone = TextToImage {
        image_guidance_scale: 0.9,
        ..guided
    };
    for request in [request(4, 1.0), by_picture_alone] {
        expected.check_change("drawn_without_guidance", &models, &request, &inputs);
    }
}

#[test]
fn inpainting_draws_what_is_masked_as_diffusers_does() {
    let folder = golden("inpaint");
    let (models, expected) = (models_in(&folder), Expected::of("inpaint"));
    assert_eq!(models.pipeline().family(), &family::INPAINT);
    let [image, mask] = ["a.png", "mask.png"].map(|name| load_image(&folder.join(name)).unwrap());
    let inputs = Inputs {
        image: Some(&image),
        mask: Some(&mask),
        ..Inputs::default()
    };
    let drawn = expected.check_change("drawn", &models, &request(4, 4.0), &inputs);
    expected.check_picture(&models, drawn);
}

#[test]
fn a_consistency_model_is_told_its_guidance_as_in_diffusers() {
    let models = models_in(&golden("lcm"));
    let expected = Expected::of("lcm");
    assert_eq!(models.pipeline().family(), &family::STABLE_DIFFUSION);
    assert_eq!(
        models.pipeline().denoiser().guided_by(),
        GuidedBy::Embedding { usual: 8.5 }
    );
    let inputs = Inputs {
        init: Some(InitNoise {
            noise: Some(expected.tensor("noise")),
            ..expected.init()
        }),
        ..Inputs::default()
    };
    let draw = |request: &TextToImage| {
        generate::generate_latents(&models, request, inputs.clone(), &mut silent)
    };
    // Without a scale it is the usual one, and the model's own sampler is LCM's.
    let usual = TextToImage {
        guidance_scale: None,
        ..request(4, 0.0)
    };
    let drawn = draw(&usual).unwrap();
    expected.check("drawn", drawn.clone());
    expected.check_picture(&models, drawn);
    expected.check("drawn_at_3", draw(&request(4, 3.0)).unwrap());
    expected.check("drawn_without_guidance", draw(&request(4, 1.0)).unwrap());
    let looking_away = TextToImage {
        negative_prompt: NEGATIVE.to_owned(),
        ..request(4, 3.0)
    };
    let message = draw(&looking_away).unwrap_err().to_string();
    assert!(
        message.starts_with("setting `negative_prompt`: expected none"),
        "{message}"
    );
    let message = draw(&request(51, 3.0)).unwrap_err().to_string();
    let told = "setting `num_inference_steps`: expected 1 to 50 with the scheduler lcm";
    assert!(message.starts_with(told), "{message}");
}

/// Only some of diffusers' pipelines correct what a scheduler's file says.
#[test]
fn a_consistency_model_clamps_if_it_says_so() {
    let folder = copy("lcm");
    let model = folder.path();
    let draw = || {
        let models = models_in(model);
        let inputs = Inputs {
            init: Some(Expected::of("lcm").init()),
            ..Inputs::default()
        };
        generate::generate_latents(&models, &request(1, 8.5), inputs, &mut silent).unwrap()
    };
    let free = draw();
    edit(
        &model.join("scheduler/scheduler_config.json"),
        r#""clip_sample": false"#,
        r#""clip_sample": true"#,
    );
    let clamped = draw();
    // One step ends at the clean latents; at time 999 nearly nothing of the noise is kept.
    let largest = |x: &Tensor<4>| x.clone().abs().max().into_scalar::<f32>();
    assert!(largest(&free) > 1.1, "{}", largest(&free));
    assert!(largest(&clamped) < 1.001, "{}", largest(&clamped));
    let index = model.join("model_index.json");
    edit(
        &index,
        "LatentConsistencyModelPipeline",
        "StableDiffusionPipeline",
    );
    assert!(relative_error(draw(), free) < 1e-6);
}

#[test]
fn instruct_pix2pix_is_not_told_its_guidance() {
    let message = refused("instruct_pix2pix", |model| {
        let config = model.join("unet/config.json");
        edit(
            &config,
            r#""time_cond_proj_dim": null"#,
            r#""time_cond_proj_dim": 6"#,
        );
    });
    assert!(message.contains("field `time_cond_proj_dim`"), "{message}");
}
