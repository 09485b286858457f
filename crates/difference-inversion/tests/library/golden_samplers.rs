//! Every solver against diffusers' scheduler of the same name, step by step, on schedules made by
//! `training/reference/make_golden_diffusion.py`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::sample::{
    AlphaSchedule, Noising, SchedulerConfig, SolverKind,
};
use difference_inversion::weights::{Weights, parse_config, read_config};

/// Largest difference allowed after each step, relative to the largest reference value there.
const TOLERANCE: f32 = 1e-4;

fn values<const D: usize>(weights: &Weights, name: &str) -> Tensor<D> {
    let shape = weights.shape(name).unwrap();
    weights.tensor(name, shape.try_into().unwrap()).unwrap()
}

fn step_of(tensor: &Tensor<5>, i: usize) -> Tensor<4> {
    tensor.clone().narrow(0, i, 1).squeeze_dim(0)
}

fn relative_error(found: &Tensor<4>, reference: Tensor<4>) -> f32 {
    let largest = reference.clone().abs().max().into_scalar::<f32>();
    (found.clone() - reference).abs().max().into_scalar::<f32>() / largest
}

#[test]
fn solvers_match_diffusers_step_by_step() {
    let folder =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden/samplers");
    let path = folder.join("configs.json");
    let configs: BTreeMap<String, serde_json::Value> = read_config(&path).unwrap();
    let io = folder.join("io.safetensors");
    let io = Weights::open(&io, &Device::flex(), FloatDType::F32).unwrap();
    assert_eq!(configs.len(), 23);
    for (name, json) in configs {
        let io = io.scope(&name);
        let text = json.to_string();
        let config: SchedulerConfig = parse_config(text.as_bytes(), &path).unwrap();
        let schedule = AlphaSchedule::new(&config, &path).unwrap();
        let alphas = values::<1>(&io, "alphas_cumprod")
            .try_into_vec_as::<f32>()
            .unwrap();
        for (i, alpha) in alphas.into_iter().enumerate() {
            let found = schedule.alphas_cumprod()[37 * i];
            // Without any signal, diffusers' other solvers use 2⁻²⁴.
            let expected = if found == 0.0 { 0.0 } else { f64::from(alpha) };
            assert!(
                (found - expected).abs() <= 1e-6 * expected,
                "{name}: {found} {expected}"
            );
        }

        let steps = json["num_inference_steps"].as_u64().unwrap() as usize;
        let eta = json["eta"].as_f64().unwrap();
        let kind = SolverKind::of_class(config.class_name.as_deref().unwrap()).unwrap();
        let mut solver = kind
            .build(&Noising::Discrete(schedule), steps, eta)
            .unwrap();
        let timesteps = values::<1>(&io, "timesteps")
            .try_into_vec_as::<f32>()
            .unwrap();
        let found: Vec<f32> = solver.timesteps().iter().map(|&t| t as f32).collect();
        assert_eq!(found, timesteps, "{name}");

        let [samples, inputs, outputs, noise] =
            ["samples", "model_inputs", "model_outputs", "noise"].map(|key| values::<5>(&io, key));
        let mut sample = step_of(&samples, 0);
        let mut worst = 0f32;
        for i in 0..steps {
            let input = solver.scale_model_input(i, sample.clone());
            worst = worst.max(relative_error(&input, step_of(&inputs, i)));
            let noise = solver.needs_noise().then(|| step_of(&noise, i));
            sample = solver.step(i, step_of(&outputs, i), sample, noise);
            worst = worst.max(relative_error(&sample, step_of(&samples, i + 1)));
        }
        println!("{name}: relative error {worst:.1e}");
        assert!(worst <= TOLERANCE, "{name}: relative error {worst:.1e}");
    }
}
