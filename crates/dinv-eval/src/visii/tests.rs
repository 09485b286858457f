use super::*;
use crate::tiny;

fn config() -> VisiiConfig {
    VisiiConfig {
        steps: 12,
        pez_steps: 3,
        pez_tokens: 4,
        ..VisiiConfig::default()
    }
}

fn with_inversion(config: &VisiiConfig, test: impl FnOnce(Inversion<'_>)) {
    let models = tiny::models(Some("instruct_pix2pix"));
    let inversion = Inversion::new(&models, &tiny::analogy(), config, 1, &mut tiny::silent);
    test(inversion.unwrap());
}

#[test]
fn the_gradient_equals_finite_differences() {
    // A CLIP term large enough to matter alongside the other.
    let config = VisiiConfig {
        lambda_clip: 2.0,
        ..config()
    };
    with_inversion(&config, |inversion| {
        let words = inversion.first.clone();
        assert_eq!(words.dims(), [4, 16]);
        let objective = |words: &Tensor<2>| inversion.objective(words, 400).unwrap().total;
        let leaf = words.clone().autodiff().require_grad();
        let gradients = objective(&leaf).backward();
        let gradient = leaf.grad(&gradients).unwrap();
        tiny::check_gradient(&words, &gradient, |words| host(objective(words))[0]);
    });
}

#[test]
fn the_loss_is_made_of_the_guided_error_and_the_clamped_cosine() {
    let terms = |config: &VisiiConfig| {
        let mut terms = [0.0; 2];
        with_inversion(config, |inversion| {
            let objective = inversion.objective(&inversion.first, 400).unwrap();
            terms = [objective.total, objective.mse].map(|term| host(term)[0]);
        });
        terms
    };
    let guided = |text, image| VisiiConfig {
        learn_guidance_scale: text,
        learn_image_guidance_scale: image,
        lambda_clip: 0.0,
        ..config()
    };
    let [total, mse] = terms(&guided(7.5, 1.5));
    assert!((total - 4.0 * mse).abs() < 1e-5);
    // The guided output is linear in either scale, so its error is a parabola.
    let [at_0, at_1, at_2, at_3] = [0.0, 1.0, 2.0, 3.0].map(|scale| terms(&guided(scale, 1.5))[1]);
    let third_difference = at_3 - 3.0 * at_2 + 3.0 * at_1 - at_0;
    assert!(third_difference.abs() < 1e-3 * at_3, "{third_difference}");
    assert!((at_2 - 2.0 * at_1 + at_0).abs() > 1e-3);
    // With both scales at 1, only the output under the instruction remains.
    with_inversion(&guided(1.0, 1.0), |inversion| {
        let latents = inversion.latents_a_prime.clone();
        let noise = normal(
            &mut rng(1, Purpose::Learn, 400),
            latents.dims(),
            &latents.device(),
        );
        let noising = inversion.pipeline.noising();
        let noisy = noising.add_noise(latents.clone(), noise.clone(), &[400.0]);
        let context = inversion.frame.around(&inversion.first);
        let conditions = Conditions::new(context).with_image(inversion.shown_a.clone());
        let output = inversion.pipeline.predict(noisy, &[400.0], &conditions);
        let error = (output - noising.target(latents, noise, &[400.0]))
            .powi_scalar(2)
            .mean();
        let mse = inversion.objective(&inversion.first, 400).unwrap().mse;
        assert!((host(mse)[0] - host(error)[0]).abs() < 1e-5);
    });
    let clip = VisiiConfig {
        lambda_clip: 1.0,
        ..config()
    };
    let [total, mse] = terms(&clip);
    let cosine = 4.0 * mse - total;
    assert!((-1.0..=0.5).contains(&cosine) && cosine != 0.0, "{cosine}");
}

#[test]
fn start_end_and_padding_stay_and_the_words_move() {
    with_inversion(&config(), |inversion| {
        let learned = inversion.learn(&mut tiny::silent).unwrap().last;
        let [before, after] =
            [&inversion.first, &learned].map(|words| host(inversion.frame.around(words)));
        let n = before.len().div_euclid(16);
        assert_eq!(n, 32);
        for (row, (before, after)) in before.chunks(16).zip(after.chunks(16)).enumerate() {
            assert_eq!(before == after, row == 0 || row > 4, "row {row}");
        }
    });
}

#[test]
fn the_frame_is_what_is_around_the_words() {
    let device = burn::tensor::Device::flex();
    let outputs = Tensor::<1>::from_floats([1., 2., 3., 4., 5.], &device).reshape([1, 5, 1]);
    let (frame, words) = Frame::of(outputs, 3);
    assert_eq!(host(words.clone()), [2., 3.]);
    assert_eq!(
        host(frame.around(&words.zeros_like())),
        [1., 0., 0., 4., 5.]
    );
}

#[test]
fn the_best_instruction_is_not_the_last() {
    with_inversion(&config(), |inversion| {
        let learn = || inversion.learn(&mut tiny::silent).unwrap();
        let (once, again) = (learn(), learn());
        assert_ne!(host(once.best), host(once.last.clone()));
        assert_eq!(host(once.last), host(again.last));
    });
}
