use std::path::Path;

use burn::tensor::Device;

use crate::diffusion::sample::*;

fn schedule(config: &SchedulerConfig) -> AlphaSchedule {
    AlphaSchedule::new(config, Path::new("scheduler_config.json")).unwrap()
}

fn stable_diffusion() -> SchedulerConfig {
    SchedulerConfig {
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        ..SchedulerConfig::default()
    }
}

fn assert_ends(schedule: &AlphaSchedule, first: f64, middle: f64, last: f64) {
    let alphas = schedule.alphas_cumprod();
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
    assert_eq!(schedule(&zero).alphas_cumprod()[999], 0.0);
}

#[test]
fn every_beta_counts() {
    // In ports that divide whole numbers, all betas but the last are 0.
    let schedule = schedule(&stable_diffusion());
    let alphas = schedule.alphas_cumprod();
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
            .and_then(|config| AlphaSchedule::new(&config, path))
            .map_or_else(|error| error.to_string(), |_| "ok".to_owned())
    };
    assert_eq!(
        message(r#"{"lambda_min_clipped": -Infinity, "_class_name": "X"}"#),
        "ok"
    );
    let betas = format!(r#"{{"trained_betas": {:?}}}"#, vec![0.1; 900]);
    assert_eq!(
        message(&betas),
        "scheduler_config.json: field `trained_betas`: expected 1000 numbers, found 900"
    );
    for (json, expected) in [
        (
            r#"{"num_train_timesteps": 2, "trained_betas": [0.1, 1.5]}"#,
            "field `trained_betas`: expected numbers from 0 to 1, found 1.5",
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

/// What opening a `scheduler_config.json` says.
fn opened(json: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    std::fs::write(&path, json).unwrap();
    let error = Noising::open(&path).err().map(|error| error.to_string());
    let named = format!("{}: ", path.display());
    error.map_or("ok".to_owned(), |error| error.replace(&named, ""))
}

#[test]
fn noise_that_is_no_schedule_of_betas_is_refused() {
    // Every scheduler of diffusers 0.42.1 that has no betas, or betas of another meaning.
    for class in [
        "AmusedScheduler",
        "CMStochasticIterativeScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDPMWuerstchenScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "IPNDMScheduler",
        "KarrasVeScheduler",
        "LTXEulerAncestralRFScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "UnCLIPScheduler",
        "VQDiffusionScheduler",
        "MyScheduler",
    ] {
        let found = opened(&format!(r#"{{"_class_name": "{class}"}}"#));
        let expected = format!("field `_class_name`: {class} is another kind of noise");
        assert!(found.starts_with(&expected), "{found}");
    }
    for (field, class) in [
        (r#""timestep_type": "continuous""#, "EulerDiscreteScheduler"),
        (r#""use_flow_sigmas": true"#, "UniPCMultistepScheduler"),
        (
            r#""prediction_type": "flow_prediction""#,
            "DPMSolverMultistepScheduler",
        ),
        (r#""snr_shift_scale": 3.0"#, "DDIMScheduler"),
    ] {
        let found = opened(&format!(r#"{{"_class_name": "{class}", {field}}}"#));
        let name = field.split('"').nth(1).unwrap();
        assert!(found.starts_with(&format!("field `{name}`: ")), "{found}");
    }
    for class in [
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
    ] {
        let plain =
            r#""timestep_type": "discrete", "use_flow_sigmas": false, "use_karras_sigmas": true"#;
        let found = opened(&format!(r#"{{"_class_name": "{class}", {plain}}}"#));
        assert_eq!(found, "ok");
    }
}

#[test]
fn what_a_file_leaves_out_is_as_in_the_class_that_it_is_of() {
    // From diffusers 0.42.1: β of the first and last step.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    for (class, first, last) in [
        ("LCMScheduler", 0.00085, 0.012),
        ("HeunDiscreteScheduler", 0.00085, 0.012),
        ("DDPMScheduler", 0.0001, 0.02),
    ] {
        std::fs::write(&path, format!(r#"{{"_class_name": "{class}"}}"#)).unwrap();
        let Noising::Discrete(schedule) = Noising::open(&path).unwrap() else {
            panic!("{class} has betas");
        };
        let alphas = schedule.alphas_cumprod();
        let beta = |t: usize| 1.0 - alphas[t] / if t == 0 { 1.0 } else { alphas[t - 1] };
        assert!((beta(0) - first).abs() < 1e-6, "{class}: {}", beta(0));
        assert!((beta(999) - last).abs() < 1e-4, "{class}: {}", beta(999));
        let clips = class == "DDPMScheduler";
        assert_eq!(schedule.config().clip_sample, clips, "{class}");
    }
}

#[test]
fn few_steps_begin_with_pure_noise_where_the_spacing_is_a_guess() {
    let config = SchedulerConfig {
        timestep_spacing: Some(TimestepSpacing::Leading),
        spacing_is_guessed: true,
        steps_offset: 1,
        ..stable_diffusion()
    };
    let guessed = Noising::Discrete(schedule(&config));
    let known = Noising::Discrete(schedule(&SchedulerConfig {
        spacing_is_guessed: false,
        ..config
    }));
    let begin = |noising: &Noising, kind: SolverKind, n| {
        let solver = kind.build(noising, n, 0.0).unwrap();
        (solver.timesteps()[0], noising.notice(solver.timesteps()))
    };
    for kind in SolverKind::ALL {
        for n in [1, 4, 8] {
            let (first, notice) = begin(&guessed, kind, n);
            assert_eq!(first, 999.0, "{kind:?} {n}");
            assert!(notice.unwrap().contains("--timestep-spacing leading"));
        }
        let ((first, notice), n) = (begin(&guessed, kind, 20), 20);
        assert_eq!((first, notice), (begin(&known, kind, n).0, None));
    }
    let (first, notice) = begin(&known, SolverKind::Euler, 1);
    assert_eq!(first, 1.0);
    assert!(notice.unwrap().contains("begin at timestep 1 of 1000"));
    // σ of pure noise, as diffusers' Euler begins with it: 14.6146.
    let euler = SolverKind::Euler.build(&guessed, 1, 0.0).unwrap();
    assert!((euler.init_noise_sigma() - 14.6146).abs() < 1e-3);
}

/// The solvers that a model can be sampled with, and what the others say.
fn solvers(config: &str) -> (Vec<SolverKind>, Vec<String>) {
    let path = Path::new("scheduler_config.json");
    let config = crate::weights::parse_config(config.as_bytes(), path).unwrap();
    let schedule = Noising::Discrete(AlphaSchedule::new(&config, path).unwrap());
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
        r#"{"_class_name": "DPMSolverMultistepScheduler", "solver_type": "bh2", "algorithm_type": "deis"}"#,
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
    ] {
        let (there, messages) = solvers(config);
        let others: Vec<_> = SolverKind::ALL.into_iter().filter(|&k| k != kind).collect();
        assert_eq!(there, others, "{config}");
        assert!(messages[0].contains(field), "{}", messages[0]);
    }
}

/// diffusers' schedulers take it over from one another, except Euler's, which do not know it.
#[test]
fn thresholding_goes_for_every_solver() {
    let (there, messages) = solvers(r#"{"_class_name": "DDIMScheduler", "thresholding": true}"#);
    assert_eq!(there, [SolverKind::Euler, SolverKind::EulerAncestral]);
    for message in messages {
        let expected = "field `thresholding`: true is not supported";
        assert!(message.contains(expected), "{message}");
    }
}

/// What a consistency model was distilled on, wherever diffusers' sampler reads it.
#[test]
fn the_steps_of_consistency_models_are_some_of_those_they_were_distilled_on() {
    let path = Path::new("scheduler_config.json");
    let build = |json: &str, n: usize| {
        let config = crate::weights::parse_config(json.as_bytes(), path)?;
        let schedule = Noising::Discrete(AlphaSchedule::new(&config, path)?);
        let solver = SolverKind::Lcm.build(&schedule, n, 0.0)?;
        solver.check_start(0)?;
        Ok::<_, Error>(solver.timesteps().to_vec())
    };
    let usual = build("{}", 4).unwrap();
    assert_eq!(usual, [999.0, 759.0, 499.0, 259.0]);
    let tcd = r#"{"_class_name": "TCDScheduler", "original_inference_steps": 40}"#;
    assert_eq!(build(tcd, 3).unwrap(), [999.0, 674.0, 349.0]);
    let float = r#"{"_class_name": "LCMScheduler", "original_inference_steps": 25.0}"#;
    assert_eq!(build(float, 1).unwrap(), [999.0]);
    for (fields, expected) in [
        (
            r#""original_inference_steps": "fifty""#,
            "expected a number, found \"fifty\"",
        ),
        (
            r#""original_inference_steps": 0"#,
            "expected a whole number from 1 to 1000, found 0",
        ),
        (
            r#""original_inference_steps": 2.5"#,
            "from 1 to 1000, found 2.5",
        ),
        (
            r#""timestep_scaling": "x""#,
            "field `timestep_scaling`: expected a number, found \"x\"",
        ),
        (r#""rescale_betas_zero_snr": true"#, "ends in pure noise"),
    ] {
        let message = build(
            &format!(r#"{{"_class_name": "LCMScheduler", {fields}}}"#),
            4,
        );
        let message = message.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

fn flow(shift: f64) -> Noising {
    let config = FlowConfig {
        shift,
        ..FlowConfig::default()
    };
    Noising::Flow(FlowSchedule::new(&config, Path::new("scheduler_config.json")).unwrap())
}

fn random(shape: [usize; 4]) -> Tensor<4> {
    let normal = burn::tensor::Distribution::Normal(0.0, 1.0);
    Tensor::random(shape, normal, &Device::flex())
}

fn worst(found: Tensor<4>, expected: Tensor<4>) -> f32 {
    (found - expected).abs().max().into_scalar::<f32>()
}

#[test]
fn predictions_undo_add_noise() {
    let [original, noise] = [(); 2].map(|()| random([2, 1, 2, 2]));
    let discrete = [
        PredictionType::Epsilon,
        PredictionType::Sample,
        PredictionType::VPrediction,
    ]
    .map(|prediction_type| {
        Noising::Discrete(schedule(&SchedulerConfig {
            prediction_type,
            ..stable_diffusion()
        }))
    });
    for noising in discrete.into_iter().chain([flow(1.0), flow(3.0)]) {
        let t = [20.0, 700.0];
        let noisy = noising.add_noise(original.clone(), noise.clone(), &t);
        let target = noising.target(original.clone(), noise.clone(), &t);
        let levels = t.map(|t| noising.level(t));
        let x0 = mix::pred_original(&levels, target.clone(), noisy.clone());
        let epsilon = mix::pred_epsilon(&levels, target, noisy);
        for (found, expected) in [(x0, &original), (epsilon, &noise)] {
            let error = worst(found, expected.clone());
            assert!(error < 2e-5, "{:?}: {error}", noising.prediction_type());
        }
    }
}

#[test]
fn the_times_of_a_flow_are_diffusers() {
    // FlowMatchEulerDiscreteScheduler: σ is shifted once when it is made and once when it is set.
    let near = |found: Vec<f64>, expected: &[f64]| {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-3, "{found} != {expected}");
        }
    };
    near(flow(1.0).times(3).unwrap(), &[1000.0, 500.5, 1.0]);
    near(flow(3.0).times(3).unwrap(), &[1000.0, 751.1211, 8.9286]);
    let steps = flow(3.0).steps(3).unwrap();
    assert_eq!(steps[2].to, Mix::new(1.0, 0.0));
    assert_eq!(steps[0].from.input, Mix::new(0.0, 1.0));
    assert_eq!(steps[0].to, steps[1].from.input);
}

#[test]
fn a_dynamic_shift_grows_with_the_picture() {
    // As FluxPipeline: calculate_shift, and σ from 1 to 1 / n.
    let config = FlowConfig {
        shift: 3.0,
        use_dynamic_shifting: true,
        ..FlowConfig::default()
    };
    let plain = FlowSchedule::new(&config, Path::new("scheduler_config.json")).unwrap();
    let whole = Noising::Flow(plain.clone().with_whole_steps());
    let empirical = Noising::Flow(plain.clone().with_empirical_shift());
    // StableDiffusion3Pipeline leaves the spacing to the scheduler, which ends at its least σ, unshifted.
    let plain = Noising::Flow(plain);
    for (noising, tokens, expected) in [
        (&whole, 256, [1000.0, 831.8243, 622.4594, 354.6612]),
        (&whole, 1024, [1000.0, 849.2348, 652.4894, 384.9447]),
        (&whole, 4096, [1000.0, 904.5308, 759.5109, 512.8441]),
        (&whole, 65536, [1000.0, 999.9968, 999.9904, 999.9711]),
        (&plain, 256, [1000.0, 767.5713, 452.6056, 1.6477]),
        (&plain, 4096, [1000.0, 863.4974, 612.9789, 3.1514]),
    ] {
        let times = noising.clone().for_tokens(tokens).times(4).unwrap();
        for (found, expected) in times.into_iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-3,
                "{tokens}: {found} != {expected}"
            );
        }
    }
    let huge = [whole, empirical].map(|noising| noising.for_tokens(1 << 24).times(4).unwrap());
    assert_eq!(
        huge.map(|times| times.into_iter().all(f64::is_finite)),
        [true; 2]
    );
}

#[test]
fn a_flow_saved_with_another_scheduler_is_refused() {
    for class in ["UniPCMultistepScheduler", "EulerDiscreteScheduler"] {
        let config = FlowConfig {
            class_name: Some(class.to_owned()),
            ..FlowConfig::default()
        };
        let opened = FlowSchedule::new(&config, Path::new("scheduler_config.json"));
        let message = opened.unwrap_err().to_string();
        assert!(
            message.contains("`_class_name`: expected FlowMatchEulerDiscreteScheduler or")
                && message.ends_with(&format!("found {class}")),
            "{message}"
        );
    }
}

#[test]
fn times_are_whole_or_shifted() {
    let discrete = Noising::Discrete(schedule(&stable_diffusion()));
    let times = [0.0, 0.4999, 0.9999].map(|place| discrete.time_at(place));
    assert_eq!(times, [0.0, 499.0, 999.0]);
    assert_eq!(discrete.time_at(1.0), 999.0);
    assert!(discrete.check_time(999.0).is_ok());
    for time in [-1.0, 0.5, 1000.0, f64::NAN] {
        let message = discrete.check_time(time).unwrap_err();
        assert_eq!(message, "timesteps in 0..1000");
    }
    assert_eq!(flow(1.0).time_at(0.25), 250.0);
    assert_eq!(flow(3.0).time_at(0.5), 750.0);
    assert!(flow(3.0).check_time(1000.0).is_ok());
    assert!(flow(3.0).check_time(1000.5).is_err());
    let time = flow(3.0).time_at(0.1);
    assert_eq!(time, f64::from(time as f32), "it can be recorded");
}

#[test]
fn a_flow_is_solved_by_eulers_method_alone() {
    let noising = flow(3.0);
    let mut solver = SolverKind::Euler.build(&noising, 5, 0.0).unwrap();
    let sigmas: Vec<f64> = solver.timesteps().iter().map(|t| t / 1000.0).collect();
    let [x, velocity] = [(); 2].map(|()| random([1, 2, 3, 3]));
    for (i, sigma) in sigmas.iter().enumerate() {
        let next = sigmas.get(i + 1).unwrap_or(&0.0);
        let found = solver.step(i, velocity.clone(), x.clone(), None);
        let expected = x.clone() + velocity.clone() * (next - sigma);
        assert!(worst(found, expected) < 1e-6);
    }
    assert!(SolverKind::Ddim.build(&noising, 5, 1.0).is_ok());
    for kind in [
        SolverKind::DpmSolver,
        SolverKind::EulerAncestral,
        SolverKind::UniPc,
    ] {
        let error = kind.build(&noising, 5, 0.0).err().unwrap().to_string();
        assert!(error.contains("euler or ddim"), "{error}");
        assert!(error.contains(kind.name()), "{error}");
    }
}

#[test]
fn edit_friendly_inversion_with_eulers_steps_is_flow_edit() {
    // Kulikov et al. 2025, algorithm 1: z += Δσ (v(z + x_σ − x, target) − v(x_σ, source)).
    // Any velocities will do.
    let source = |x: &Tensor<4>, t: f64| x.clone().sin() * (1.0 + t / 1000.0);
    let target = |x: &Tensor<4>, t: f64| x.clone().cos() + t / 2000.0;
    let noising = flow(3.0);
    let mut euler = Ddim::new(&noising, 6, 0.0).unwrap();
    let times = euler.timesteps().to_vec();
    let x = random([1, 2, 3, 3]);
    let mut path: Vec<Tensor<4>> = (0..times.len())
        .map(|i| euler.add_noise(i, x.clone(), random(x.dims())))
        .collect();
    path.push(x.clone());
    let mut y = path[0].clone(); // edit-friendly
    let mut z = x.clone(); // FlowEdit
    for (i, &t) in times.iter().enumerate() {
        let velocity = source(&path[i], t);
        let mean = euler.step(i, velocity.clone(), path[i].clone(), None);
        let residual = path[i + 1].clone() - mean;
        let edited = target(&y, t);
        y = euler.step(i, edited, y, None) + residual;

        let next = times.get(i + 1).unwrap_or(&0.0);
        let at = z.clone() + path[i].clone() - x.clone();
        z = z + (target(&at, t) - velocity) * ((next - t) / 1000.0);
        let error = worst(y.clone() - path[i + 1].clone() + x.clone(), z.clone());
        assert!(error < 2e-5, "step {i}: {error}");
    }
    assert!(worst(y, x) > 0.1);
}
