//! Tiny models with random weights for tests of methods, and runs for tests of reports.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::FileOptions;
use difference_inversion::image::load_image;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::util::progress::Progress;
use difference_inversion::util::tensors::host;
use serde_json::{Map, Value};

use super::report::{MethodResults, Report};
use super::suite::Entry;
use super::{
    Analogy, Captions, EvalModelPaths, EvalModels, MethodRecord, ResultRecord, RunRecord, Status,
    SuiteRecord,
};

pub(super) fn golden(name: &str) -> PathBuf {
    (Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden")).join(name)
}

/// `tests/golden/learning`, with the U-Net of another golden folder if given.
fn paths(unet: Option<&str>) -> ModelPaths {
    ModelPaths {
        model: golden("learning"),
        options: FileOptions {
            unet: unet.map(|folder| golden(folder).join("unet")),
            ..FileOptions::default()
        },
        ..ModelPaths::default()
    }
}

/// The models of all methods, with one text encoder and joint space.
pub(super) fn eval_models() -> EvalModels {
    eval_models_with(Some("instruct_pix2pix"), Some("inpaint"))
}

/// A text-to-image model that has no CLIP.
pub(super) fn eval_models_without_clip() -> EvalModels {
    let text_to_image = ModelPaths {
        model: golden("z_image"),
        options: FileOptions {
            resolution: Some([32, 32]),
            ..FileOptions::default()
        },
        ..ModelPaths::default()
    };
    let paths = EvalModelPaths {
        text_to_image,
        ..EvalModelPaths::default()
    };
    let (recommended, device) = (AnalogyConfig::default(), Device::flex());
    EvalModels::new(paths, recommended, &device, FloatDType::F32)
}

/// The same with these U-Nets for the methods that take pictures as input.
pub(super) fn eval_models_with(instruct: Option<&str>, inpaint: Option<&str>) -> EvalModels {
    let paths = EvalModelPaths {
        text_to_image: paths(None),
        instruct_pix2pix: instruct.map(|unet| paths(Some(unet))),
        inpainting: inpaint.map(|unet| paths(Some(unet))),
    };
    let (recommended, device) = (AnalogyConfig::default(), Device::flex());
    EvalModels::new(paths, recommended, &device, FloatDType::F32)
}

/// The model with this U-Net.
pub(super) fn models(unet: Option<&str>) -> Models {
    Models::open(&paths(unet), &Device::flex(), FloatDType::F32).unwrap()
}

/// Two different pictures, the second of which is also B.
pub(super) fn analogy() -> Analogy {
    let [a, a_prime] =
        ["a.png", "a_prime.png"].map(|name| load_image(&golden("learning").join(name)).unwrap());
    Analogy {
        name: "one".to_owned(),
        kind: "colour".to_owned(),
        b: image::imageops::rotate180(&a),
        a,
        a_prime,
        b_prime: None,
        captions: Some(Captions {
            a: Some("a red house".to_owned()),
            a_prime: Some("a blue house at night".to_owned()),
            ..Captions::default()
        }),
        instruction: Some("make it blue".to_owned()),
        attributes: None,
    }
}

/// An analogy of a suite with the same pictures, with A as B.
pub(super) fn entry() -> Entry {
    let analogy = analogy();
    Entry {
        name: analogy.name,
        kind: analogy.kind,
        pictures: ["a.png", "a_prime.png", "a.png"].map(|name| golden("learning").join(name)),
        b_prime: None,
        captions: analogy.captions,
        instruction: analogy.instruction,
        attributes: None,
    }
}

pub(super) fn settings(values: &Value) -> Map<String, Value> {
    values.as_object().unwrap().clone()
}

/// Ignores progress and never asks to stop.
pub(super) fn silent(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Checks each row of the gradient of `loss` at `start` against a finite difference along that row's
/// gradient, and that every row has one.
pub(super) fn check_gradient(
    start: &Tensor<2>,
    gradient: &Tensor<2>,
    loss: impl Fn(&Tensor<2>) -> f32,
) {
    let [rows, d] = start.dims();
    for row in 0..rows {
        let along = gradient.clone().narrow(0, row, 1);
        let slope = host(along.clone().powi_scalar(2).sum().sqrt())[0];
        assert!(slope > 1e-5, "row {row} has no gradient");
        let direction = start
            .zeros_like()
            .slice_assign([row..row + 1, 0..d], along / slope);
        let at = |step: f32| loss(&(start.clone() + direction.clone() * step));
        let step = 0.02;
        let found = (at(step) - at(-step)) / (2.0 * step);
        println!("row {row}: gradient {slope:.5}, finite difference {found:.5}");
        assert!(
            (found - slope).abs() < 0.02 * slope,
            "row {row}: {slope} {found}"
        );
    }
}

/// The kind of an analogy, and its scores by metric if it was solved.
pub(super) type Scored<'a> = (&'a str, Option<Vec<(&'a str, f64)>>);

/// The report of one method called `m`, whose analogies have these kinds and scores; those without
/// scores failed.
pub(super) fn report(settings: Value, analogies: &[Scored<'_>]) -> Report {
    let suite = SuiteRecord {
        name: "x".to_owned(),
        version: Value::Null,
        identity: "same".to_owned(),
        analogies: analogies.len(),
    };
    let record = MethodRecord {
        name: "m".to_owned(),
        method: "sdedit".to_owned(),
        told: None,
        settings,
        skipped: None,
    };
    let result = |(number, (kind, scores)): (usize, &Scored<'_>)| ResultRecord {
        name: number.to_string(),
        kind: (*kind).to_owned(),
        changes: None,
        edit: None,
        status: match scores {
            Some(_) => Status::Done,
            None => Status::Failed("no luck".to_owned()),
        },
        seed: 0,
        seconds: 1.0,
        evaluations: None,
        peak_memory: None,
        made_with: BTreeMap::new(),
        measured_with: BTreeMap::new(),
        scores: (scores.iter().flatten())
            .map(|&(metric, score): &(&str, f64)| (metric.to_owned(), score))
            .collect(),
    };
    Report {
        run: RunRecord::new(suite, 0, "cpu".to_owned()),
        methods: vec![MethodResults {
            record,
            results: analogies.iter().enumerate().map(result).collect(),
        }],
    }
}
