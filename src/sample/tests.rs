use std::path::Path;

use burn::tensor::Device;

use super::*;

fn schedule(config: &SchedulerConfig) -> NoiseSchedule {
    NoiseSchedule::new(config, Path::new("scheduler_config.json")).unwrap()
}

fn stable_diffusion() -> SchedulerConfig {
    SchedulerConfig {
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        ..SchedulerConfig::default()
    }
}

fn assert_ends(schedule: &NoiseSchedule, first: f64, middle: f64, last: f64) {
    let alphas = &schedule.alphas_cumprod;
    assert_eq!(alphas.len(), 1000);
    for (t, expected) in [(0, first), (500, middle), (999, last)] {
        let error = (alphas[t] - expected).abs();
        assert!(error <= 1e-6 * expected, "{t}: {} != {expected}", alphas[t]);
    }
}

#[test]
fn first_middle_and_last_of_every_schedule() {
    // From diffusers 0.42.1.
    assert_ends(
        &schedule(&SchedulerConfig::default()),
        0.9999,
        0.077_796_653,
        4.035_830_4e-5,
    );
    assert_ends(
        &schedule(&stable_diffusion()),
        0.99915,
        0.276_332_47,
        0.004_660_095_1,
    );
    let cosine = SchedulerConfig {
        beta_schedule: BetaSchedule::SquaredCosine,
        ..SchedulerConfig::default()
    };
    assert_ends(&schedule(&cosine), 0.999_958_69, 0.492_285_04, 2.428_735e-9);
    let zero = SchedulerConfig {
        rescale_betas_zero_snr: true,
        ..stable_diffusion()
    };
    assert_ends(&schedule(&zero), 0.99915, 0.241_018_64, 0.0);
    assert_eq!(schedule(&zero).alphas_cumprod[999], 0.0);
}

#[test]
fn every_beta_counts() {
    // In ports that divide whole numbers, all betas but the last are 0.
    let alphas = schedule(&stable_diffusion()).alphas_cumprod;
    assert!(alphas.windows(2).all(|pair| pair[1] < pair[0]));
}

#[test]
fn timesteps_of_every_spacing() {
    let timesteps = |spacing, n| {
        let config = SchedulerConfig {
            timestep_spacing: Some(spacing),
            steps_offset: 1,
            ..stable_diffusion()
        };
        schedule(&config).timesteps(n).unwrap()
    };
    assert_eq!(timesteps(TimestepSpacing::Leading, 4), [751, 501, 251, 1]);
    assert_eq!(
        timesteps(TimestepSpacing::Trailing, 4),
        [999, 749, 499, 249]
    );
    assert_eq!(
        timesteps(TimestepSpacing::Trailing, 7),
        [999, 856, 713, 570, 428, 285, 142]
    );
    assert_eq!(timesteps(TimestepSpacing::Linspace, 4), [999, 666, 333, 0]);
    assert_eq!(timesteps(TimestepSpacing::Linspace, 3), [999, 500, 0]);
    assert_eq!(timesteps(TimestepSpacing::Linspace, 1), [0]);
    for n in 1..=1000 {
        for spacing in [
            TimestepSpacing::Leading,
            TimestepSpacing::Trailing,
            TimestepSpacing::Linspace,
        ] {
            let timesteps = timesteps(spacing, n);
            assert_eq!(timesteps.len(), n);
            assert!(timesteps.iter().all(|&t| t < 1000));
            assert!(timesteps.windows(2).all(|pair| pair[1] < pair[0]) || n == 1000);
        }
    }
}

#[test]
fn impossible_numbers_of_steps_are_errors() {
    for n in [0, 1001] {
        let message = schedule(&stable_diffusion())
            .timesteps(n)
            .unwrap_err()
            .to_string();
        assert!(message.starts_with("setting `num_inference_steps`: expected 1 to 1000"));
    }
}

#[test]
fn unsupported_values_are_errors() {
    let message = |json: &str| {
        let path = Path::new("scheduler_config.json");
        crate::weights::parse_config(json.as_bytes(), path)
            .and_then(|config| NoiseSchedule::new(&config, path))
            .map_or_else(|error| error.to_string(), |_| "ok".to_owned())
    };
    assert_eq!(
        message(r#"{"lambda_min_clipped": -Infinity, "_class_name": "X"}"#),
        "ok"
    );
    for (json, expected) in [
        (
            r#"{"trained_betas": [0.1]}"#,
            "field `trained_betas`: [0.1] is not supported",
        ),
        (
            r#"{"beta_schedule": "sigmoid"}"#,
            "field `beta_schedule`: unknown variant",
        ),
        (
            r#"{"prediction_type": "flow"}"#,
            "field `prediction_type`: unknown variant",
        ),
        (
            r#"{"num_train_timesteps": 1}"#,
            "field `num_train_timesteps`",
        ),
        (
            r#"{"beta_end": 2}"#,
            "field `beta_end`: expected a number from 0 to 1",
        ),
        (r#"{"steps_offset": 1000}"#, "field `steps_offset`"),
    ] {
        assert!(
            message(json).contains(expected),
            "{json}: {}",
            message(json)
        );
    }
}

/// The solvers that a model can be sampled with, and what the others say.
fn solvers(config: &str) -> (Vec<SolverKind>, Vec<String>) {
    let path = Path::new("scheduler_config.json");
    let config = crate::weights::parse_config(config.as_bytes(), path).unwrap();
    let schedule = NoiseSchedule::new(&config, path).unwrap();
    let (mut there, mut messages) = (Vec::new(), Vec::new());
    for kind in SolverKind::ALL {
        match kind.build(&schedule, 10, 0.0) {
            Ok(_) => there.push(kind),
            Err(error) => messages.push(error.to_string()),
        }
    }
    (there, messages)
}

#[test]
fn a_solver_minds_its_own_settings_alone() {
    for config in [
        r#"{"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}"#,
        r#"{"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}"#,
        r#"{"_class_name": "DPMSolverSinglestepScheduler", "lower_order_final": false, "solver_order": 3}"#,
        r#"{"_class_name": "UniPCMultistepScheduler", "solver_type": "midpoint"}"#,
        r#"{"use_karras_sigmas": true}"#,
    ] {
        assert_eq!(solvers(config).0, SolverKind::ALL, "{config}");
    }
    for (config, kind, field) in [
        (
            r#"{"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true}"#,
            SolverKind::DpmSolver,
            "field `use_karras_sigmas`: true is not supported",
        ),
        (
            r#"{"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}"#,
            SolverKind::DpmSolver,
            "field `solver_type`: \"heun\" is not supported",
        ),
        (
            r#"{"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}"#,
            SolverKind::UniPc,
            "field `solver_type`: \"bh1\" is not supported",
        ),
        (
            r#"{"_class_name": "DDIMScheduler", "thresholding": true}"#,
            SolverKind::Ddim,
            "field `thresholding`: true is not supported",
        ),
    ] {
        let (there, messages) = solvers(config);
        let others: Vec<_> = SolverKind::ALL.into_iter().filter(|&k| k != kind).collect();
        assert_eq!(there, others, "{config}");
        assert!(messages[0].contains(field), "{}", messages[0]);
    }
}

#[test]
fn predictions_undo_add_noise() {
    let device = Device::flex();
    let normal = burn::tensor::Distribution::Normal(0.0, 1.0);
    let original = Tensor::<4>::random([2, 1, 2, 2], normal, &device);
    let noise = Tensor::<4>::random([2, 1, 2, 2], normal, &device);
    for prediction_type in [
        PredictionType::Epsilon,
        PredictionType::Sample,
        PredictionType::VPrediction,
    ] {
        let schedule = schedule(&SchedulerConfig {
            prediction_type,
            ..stable_diffusion()
        });
        let t = [20, 700];
        let noisy = schedule.add_noise(original.clone(), noise.clone(), &t);
        let target = schedule.target(original.clone(), noise.clone(), &t);
        let x0 = schedule.pred_original(target.clone(), noisy.clone(), &t);
        let epsilon = schedule.pred_epsilon(target, noisy, &t);
        for (found, expected) in [(x0, &original), (epsilon, &noise)] {
            let error = (found - expected.clone()).abs().max().into_scalar::<f32>();
            assert!(error < 2e-5, "{prediction_type:?}: {error}");
        }
    }
}
