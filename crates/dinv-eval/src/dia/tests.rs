use burn::tensor::{FloatDType, Tensor};
use difference_inversion::method::learn::LossScale;
use difference_inversion::util::random::{Purpose, normal, rng};
use difference_inversion::util::tensors::host;
use image::imageops;

use super::inversion::{Inversion, Target, tensor};
use super::*;
use crate::tiny;

fn config() -> DiaConfig {
    DiaConfig {
        num_tokens: 3,
        token_iterations: 2,
        crops: 1,
        num_inference_steps: 4,
        noise_iterations: 2,
        noise_inner_iterations: 4,
        ..DiaConfig::default()
    }
}

fn with_inversion(config: &DiaConfig, test: impl FnOnce(&Models, Inversion<'_>)) {
    let models = tiny::models(None);
    let inversion = Inversion {
        pipeline: models.pipeline(),
        config,
        seed: 1,
    };
    test(&models, inversion);
}

#[test]
fn the_gradient_to_the_token_embeddings_equals_finite_differences() {
    with_inversion(&config(), |_, inversion| {
        let views = inversion.views(&tiny::analogy().a, 0).unwrap();
        assert_eq!(views.latents.dims(), [3, 4, 8, 8]);
        let encoder = &inversion.pipeline.text_encoders()[0];
        let empty = encoder.empty_embeds().unwrap();
        let rest = empty.clone().narrow(0, 3, 29);
        let loss = |tokens: &Tensor<2>| {
            let whole = Tensor::cat(vec![tokens.clone(), rest.clone()], 0);
            let conditions = inversion.pipeline.encode_embeds(whole).unwrap();
            inversion.explains(&conditions, &views, 0)
        };
        let tokens = empty.narrow(0, 0, 3);
        let leaf = tokens.clone().autodiff().require_grad();
        let gradients = loss(&leaf).backward();
        let gradient = leaf.grad(&gradients).unwrap();
        tiny::check_gradient(&tokens, &gradient, |tokens| host(loss(tokens))[0]);
    });
}

#[test]
fn the_gradient_to_the_noise_equals_finite_differences() {
    with_inversion(&config(), |_, inversion| {
        let b = &tiny::analogy().b;
        let prompt = inversion.pipeline.encode_negative_prompt("").unwrap();
        let target = Target {
            latents: inversion.pipeline.encode_image(b),
            pixels: inversion.pipeline.pixels(b),
        };
        let shape = target.latents.dims();
        let noise = normal(
            &mut rng(3, Purpose::Generate, 0),
            shape,
            inversion.pipeline.device(),
        );
        // The initial loss scale of networks in f16 is not in the gradient.
        let mut scale = LossScale::new(FloatDType::F16);
        let (loss, gradient) = inversion
            .evaluate(noise.clone(), &prompt, &target, 0, &mut scale)
            .unwrap();
        let value = |noise| {
            host(
                inversion
                    .reconstruction_loss(noise, &prompt, &target)
                    .unwrap(),
            )[0]
        };
        assert!((loss - f64::from(value(noise.clone()))).abs() < 1e-6);
        let gradient = tensor(&gradient, shape, inversion.pipeline.device());
        let flat = |x: Tensor<4>| x.reshape([1, 256]);
        tiny::check_gradient(&flat(noise), &flat(gradient), |noise| {
            value(noise.clone().reshape(shape))
        });
    });
}

#[test]
fn views_are_the_picture_its_mirror_image_and_crops_at_the_least_noisy_steps() {
    with_inversion(
        &DiaConfig {
            crops: 2,
            num_inference_steps: 10,
            ..config()
        },
        |_, inversion| {
            let picture = tiny::analogy().a;
            let views = inversion.views(&picture, 0).unwrap();
            let mut timesteps = views.timesteps.clone();
            timesteps.sort_by(f64::total_cmp);
            assert_eq!(timesteps, [99.0, 199.0, 299.0, 399.0]);
            let encode = |picture: &RgbImage| host(inversion.pipeline.encode_image(picture));
            let row = |row: usize| host(views.latents.clone().narrow(0, row, 1));
            assert_eq!(row(0), encode(&picture));
            assert_eq!(row(1), encode(&imageops::flip_horizontal(&picture)));
            assert!(row(2) != row(0) && row(2) != row(3));
        },
    );
}

#[test]
fn tokens_are_learned_and_the_rest_of_the_prompt_stays() {
    with_inversion(&config(), |_, inversion| {
        let prompt = |iterations: usize| {
            let config = DiaConfig {
                token_iterations: iterations,
                ..config()
            };
            let inversion = Inversion {
                config: &config,
                ..inversion
            };
            let prompt = inversion
                .prompt(&tiny::analogy().a, 0, &mut tiny::silent)
                .unwrap();
            host(prompt.context)
        };
        let empty = inversion.pipeline.encode_negative_prompt("").unwrap();
        let (untouched, learned) = (prompt(0), prompt(2));
        let expected = host(empty.context);
        let close = |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-4);
        assert!(close(&untouched, &expected));
        assert!(!close(&learned, &expected));
        // A sufficient loss at the start leaves the prompt unchanged.
        let config = DiaConfig {
            sufficient_loss: 1e6,
            ..config()
        };
        let inversion = Inversion {
            config: &config,
            ..inversion
        };
        let prompt = inversion
            .prompt(&tiny::analogy().a, 0, &mut tiny::silent)
            .unwrap();
        assert!(close(&host(prompt.context), &expected));
    });
}

#[test]
fn lbfgs_finds_noise_that_becomes_b() {
    let loss = |noise_iterations: usize| {
        let config = DiaConfig {
            noise_iterations,
            noise_inner_iterations: 10,
            noise_learning_rate: 0.5,
            ..config()
        };
        let mut loss = 0.0;
        with_inversion(&config, |_, inversion| {
            let b = &tiny::analogy().b;
            let prompt = inversion.pipeline.encode_negative_prompt("").unwrap();
            let noise = inversion.noise(b, &prompt, &mut tiny::silent).unwrap();
            let target = Target {
                latents: inversion.pipeline.encode_image(b),
                pixels: inversion.pipeline.pixels(b),
            };
            loss = host(
                inversion
                    .reconstruction_loss(noise, &prompt, &target)
                    .unwrap(),
            )[0];
        });
        loss
    };
    let (before, after) = (loss(0), loss(3));
    assert!(after < 0.7 * before, "{before} {after}");
}

#[test]
fn the_picture_nearest_in_direction_is_taken() {
    let analogy = tiny::analogy();
    let method = Dia {
        models: Arc::new(tiny::models(None)),
        config: config(),
    };
    let analogy = Analogy {
        b: analogy.a.clone(),
        ..analogy
    };
    let (same, right) = (analogy.b.clone(), analogy.a_prime.clone());
    let taken = method
        .nearest(&analogy, vec![same.clone(), right.clone()])
        .unwrap();
    assert!(taken == right);
    assert!(method.nearest(&analogy, vec![same.clone()]).unwrap() == same);
    let joint = &method.models.joints().unwrap()[0];
    assert!((clip_direction(joint, &analogy, &right).unwrap() - 1.0).abs() < 1e-5);
    assert_eq!(clip_direction(joint, &analogy, &same).unwrap(), 0.0);
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let message = |values| {
        let made = dia(&tiny::eval_models(), &tiny::settings(&values));
        made.err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    assert!(
        message(serde_json::json!({"strengths": []}))
            .contains("`strengths`: expected at least one")
    );
    assert!(
        message(serde_json::json!({"least_crop": 1.5}))
            .contains("`least_crop`: expected more than 0")
    );
    assert!(
        message(serde_json::json!({"num_inference_steps": 2000})).contains("num_inference_steps")
    );
    assert_eq!(message(serde_json::json!({"inversion": "ddim"})), "");
}
