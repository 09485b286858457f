//! LoRA files of every layout on tiny pipelines, compared with what diffusers draws with them.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::diffusion::draw::InitNoise;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::model_files::lora::LoraFile;
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::image::load_image;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate::{self, Inputs};
use difference_inversion::util::arrays::{Array, Arrays};
use image::RgbImage;

use crate::tiny::{furthest, golden, relative_error, request, silent};

/// The scale at which the golden files fuse it.
const SCALE: f64 = 0.7;

/// The folders of the models with LoRAs, and the prefixes of these files.
const MODELS: [(&str, &str); 2] = [("sd1", "pipeline"), ("sdxl", "sdxl")];

fn with(folder: &Path, loras: &[(PathBuf, f64)]) -> Result<Models, difference_inversion::Error> {
    let loras = loras.iter().map(|(path, weight)| LoraFile {
        path: path.clone(),
        weight: *weight,
    });
    let paths = ModelPaths {
        model: folder.to_owned(),
        options: FileOptions {
            loras: loras.collect(),
            ..FileOptions::default()
        },
        ..ModelPaths::default()
    };
    Models::open(&paths, &Device::flex(), FloatDType::F32)
}

fn draw(models: &Models, name: &str) -> RgbImage {
    let mut request = request(4, 5.0);
    request.negative_prompt = "red".to_owned();
    request.scheduler = Some("ddim".to_owned());
    let latents = golden("lora").join(format!("{name}_latents.safetensors"));
    let inputs = Inputs {
        init: Some(InitNoise::read(&latents, &Device::flex()).unwrap()),
        ..Inputs::default()
    };
    generate::generate(models, &request, inputs, &mut silent).unwrap()
}

fn lora(name: &str, layout: &str) -> PathBuf {
    golden("lora").join(format!("{name}_{layout}.safetensors"))
}

#[track_caller]
fn check(what: &str, drawn: &RgbImage, expected: &str) {
    let expected = load_image(&golden("lora").join(format!("{expected}.png"))).unwrap();
    let furthest = furthest(drawn, &expected);
    println!("{what}: {furthest}/255");
    assert!(furthest <= 1, "{what}: {furthest}/255");
}

#[test]
fn pictures_with_every_layout_equal_diffusers() {
    for (name, folder) in MODELS {
        let folder = golden(folder);
        let plain = with(&folder, &[]).unwrap();
        check(name, &draw(&plain, name), &format!("{name}_plain"));
        for layout in ["diffusers", "kohya", "kohya_original", "comfyui"] {
            let models = with(&folder, &[(lora(name, layout), SCALE)]).unwrap();
            check(&format!("{name} {layout}"), &draw(&models, name), name);
        }
        let processors = format!("{name}_processors");
        let models = with(&folder, &[(lora(name, "processors"), SCALE)]).unwrap();
        check(&processors, &draw(&models, name), &processors);
        // Several add up, and a weight of 0 adds nothing.
        let parts = [("kohya", 0.9), ("comfyui", -0.2), ("processors", 0.0)];
        let parts = parts.map(|(layout, weight)| (lora(name, layout), weight));
        check(
            "several",
            &draw(&with(&folder, &parts).unwrap(), name),
            name,
        );
    }
}

/// Of every transformer, the weights with a LoRA in diffusers' names, in ComfyUI's and in kohya's, whose layers are
/// fused, are those that diffusers fuses.
#[test]
fn transformers_with_every_layout_equal_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["sd3", "flux", "klein", "z_image"] {
        let comfyui = Arrays::read(&lora(family, "comfyui")).unwrap();
        let renamed = |layout: &str, rename: fn(&str) -> String| {
            let path = folder.path().join(format!("{family}_{layout}.safetensors"));
            let arrays = comfyui.arrays.iter().map(|(name, array)| {
                let (layer, end) =
                    name.split_at(name.rfind(".lora_").or(name.rfind(".alpha")).unwrap());
                let layer = layer.strip_prefix("diffusion_model.").unwrap();
                (format!("{}{end}", rename(layer)), array.clone())
            });
            let arrays = Arrays {
                arrays: arrays.collect(),
                ..Arrays::default()
            };
            arrays.write(&path).unwrap();
            path
        };
        let kohya = renamed("kohya", |layer| {
            format!("lora_unet_{}", layer.replace('.', "_"))
        });
        let peft = renamed("peft", |layer| format!("base_model.model.{layer}"));
        let expected = Arrays::read(&lora(family, "fused")).unwrap();
        let published = ["diffusers", "comfyui"].map(|layout| lora(family, layout));
        for path in published.into_iter().chain([kohya, peft]) {
            let options = FileOptions {
                loras: vec![LoraFile {
                    path: path.clone(),
                    weight: SCALE,
                }],
                ..FileOptions::default()
            };
            let files = ModelFiles::open(&golden(family), &options).unwrap();
            let weights = files.weights("transformer", &Device::flex(), FloatDType::F32);
            let weights = weights.unwrap();
            for name in expected.arrays.keys() {
                let shape = weights.shape(name).unwrap();
                let weight: Tensor<2> = weights.matrix(name, [shape[0], shape[1]]).unwrap();
                let waves: Vec<f32> = (0..shape[1]).map(|j| (j as f32).sin()).collect();
                let waves = Tensor::<1>::from_floats(waves.as_slice(), &Device::flex());
                let product: Tensor<1> = weight.matmul(waves.reshape([-1, 1])).reshape([-1]);
                let golden: Tensor<1> = expected.tensor(name, &Device::flex()).unwrap();
                let error = relative_error(product, golden);
                assert!(error < 1e-5, "{}, {name}: {error:.1e}", path.display());
            }
        }
    }
}

/// A layer that is three in diffusers is changed in its parts.
#[test]
fn fused_layers_are_split() {
    let folder = tempfile::tempdir().unwrap();
    let model = golden("flux");
    let weights = |path: &Path| {
        let options = FileOptions {
            loras: vec![LoraFile {
                path: path.to_owned(),
                weight: 0.5,
            }],
            ..FileOptions::default()
        };
        let files = ModelFiles::open(&model, &options).unwrap();
        files.weights("transformer", &Device::flex(), FloatDType::F32)
    };
    let read = |weights: &difference_inversion::weights::Weights, layer: &str| -> Tensor<2> {
        let name = format!("{layer}.weight");
        let shape = weights.shape(&name).unwrap();
        weights.matrix(&name, [shape[0], shape[1]]).unwrap()
    };
    let plain = ModelFiles::open(&model, &FileOptions::default()).unwrap();
    let plain = plain
        .weights("transformer", &Device::flex(), FloatDType::F32)
        .unwrap();
    let path = folder.path().join("flux.safetensors");
    for (fused, parts) in [
        (
            "lora_unet_double_blocks_0_img_attn_qkv",
            ["to_q", "to_k", "to_v"]
                .map(|part| format!("transformer_blocks.0.attn.{part}"))
                .to_vec(),
        ),
        (
            "diffusion_model.single_blocks.0.linear1",
            ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
                .map(|part| format!("single_transformer_blocks.0.{part}"))
                .to_vec(),
        ),
    ] {
        let shapes = parts.iter().map(|part| read(&plain, part).dims());
        let shapes: Vec<[usize; 2]> = shapes.collect();
        let (rows, columns) = (
            shapes.iter().map(|shape| shape[0]).sum::<usize>(),
            shapes[0][1],
        );
        let numbers = |count: usize| {
            (0..count)
                .map(|i| ((i * 7 % 11) as f32 - 5.0) / 8.0)
                .collect()
        };
        let (up, down): (Vec<f32>, Vec<f32>) = (numbers(rows), numbers(columns));
        let file = Arrays::default()
            .with(
                format!("{fused}.lora_up.weight"),
                Array::floats([rows, 1], up.clone()),
            )
            .with(
                format!("{fused}.lora_down.weight"),
                Array::floats([1, columns], down.clone()),
            )
            .with(format!("{fused}.alpha"), Array::floats([1], vec![3.0]));
        file.write(&path).unwrap();
        let changed = weights(&path).unwrap();
        let mut start = 0;
        for (part, [rows, columns]) in parts.iter().zip(shapes) {
            let change = read(&changed, part) - read(&plain, part);
            let change: Vec<f32> = change.into_data().iter::<f32>().collect();
            for (row, found) in change.chunks(columns).enumerate() {
                for (column, found) in found.iter().enumerate() {
                    let expected = 1.5 * up[start + row] * down[column]; // 0.5 · 3 / 1
                    assert!(
                        (found - expected).abs() < 1e-5,
                        "{part}: {found} {expected}"
                    );
                }
            }
            start += rows;
        }
    }
}

/// A difference learned with a LoRA in the text encoder belongs to it.
#[test]
fn a_lora_of_the_text_encoder_is_part_of_the_base() {
    for (name, folder) in MODELS {
        let folder = golden(folder);
        let base = |loras: &[(PathBuf, f64)]| with(&folder, loras).unwrap().pipeline().base();
        let ours = base(&[(lora(name, "kohya"), SCALE)]);
        let tokens = DifferenceTokens::zeros(2, &ours, &Device::flex());
        // The same values in another file count as the same LoRA.
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("difference.safetensors");
        tokens.save(&path).unwrap();
        let tokens = DifferenceTokens::load(&path, &Device::flex()).unwrap();
        tokens
            .check_base(&base(&[(lora(name, "comfyui"), SCALE)]))
            .unwrap();
        let message =
            |loras: &[(PathBuf, f64)]| tokens.check_base(&base(loras)).unwrap_err().to_string();
        let without = message(&[]);
        let expected = format!(
            "was learned with the LoRA {name}_kohya.safetensors:0.7, which changes the text encoder"
        );
        assert!(without.contains(&expected), "{without}");
        let other = message(&[(lora(name, "kohya"), 0.6)]);
        assert!(
            other.contains("changed by") && other.contains("the same weights"),
            "{other}"
        );
        let plain = DifferenceTokens::zeros(2, &base(&[]), &Device::flex());
        let with_it = plain.check_base(&ours).unwrap_err().to_string();
        assert!(with_it.contains("learned without the LoRA"), "{with_it}");
    }
    // So it is with Qwen3.
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("qwen3.safetensors");
    let layer = "text_encoder.model.layers.0.self_attn.q_proj";
    Arrays::default()
        .with(format!("{layer}.lora_A.weight"), floats(&[2, 16]))
        .with(format!("{layer}.lora_B.weight"), floats(&[32, 2]))
        .write(&path)
        .unwrap();
    let [plain, changed] =
        [vec![], vec![(path, 1.0)]].map(|loras| with(&golden("z_image"), &loras).unwrap());
    let tokens = DifferenceTokens::zeros(2, &changed.pipeline().base(), &Device::flex());
    let message = tokens.check_base(&plain.pipeline().base());
    let message = message.unwrap_err().to_string();
    assert!(
        message.contains("was learned with the LoRA qwen3.safetensors"),
        "{message}"
    );
    // A difference does not belong to a LoRA of the U-Net only, but a checkpoint does.
    let only_unet = Arrays::read(&lora("sd1", "kohya")).unwrap();
    let mut only_unet = only_unet.clone();
    only_unet
        .arrays
        .retain(|key, _| key.starts_with("lora_unet_up_blocks_1_resnets"));
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("unet.safetensors");
    only_unet.write(&path).unwrap();
    let folder = golden("pipeline");
    let [plain, changed] = [vec![], vec![(path, 1.0)]].map(|loras| with(&folder, &loras).unwrap());
    assert_eq!(plain.pipeline().base(), changed.pipeline().base());
    let fingerprints = [&plain, &changed].map(|models| models.pipeline().fingerprint());
    assert_ne!(fingerprints[0], fingerprints[1]);
}

/// A layer of the U-Net, as kohya names it.
const LAYER: &str = "lora_unet_mid_block_attentions_0_proj_in";

/// The error of opening a golden model with a LoRA.
fn message(path: &Path, model: &str) -> String {
    let opened = with(&golden(model), &[(path.to_owned(), 1.0)]);
    opened.unwrap_err().to_string()
}

fn floats(shape: &[usize]) -> Array {
    Array::floats(shape, vec![0.5; shape.iter().product()])
}

#[test]
fn what_is_no_lora_of_the_model_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let good = || {
        Arrays::default()
            .with(format!("{LAYER}.lora_up.weight"), floats(&[16, 2, 1, 1]))
            .with(format!("{LAYER}.lora_down.weight"), floats(&[2, 16, 1, 1]))
    };
    good().write(&path).unwrap();
    with(&golden("pipeline"), &[(path.clone(), 1.0)]).unwrap();
    let double = "lora_unet_double_blocks_0_img_attn_qkv";
    let wide = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k";
    for (more, expected) in [
        (
            vec![(format!("{LAYER}.dora_scale"), vec![16, 1])],
            "a DoRA, which is not supported",
        ),
        (
            vec![("x.hada_w1_a".to_owned(), vec![4, 2])],
            "a LoHa, which is not supported",
        ),
        (
            vec![("x.lokr_w1".to_owned(), vec![4, 2])],
            "a LoKr, which is not supported",
        ),
        (
            vec![("x.diff".to_owned(), vec![4])],
            "whole layers (`diff`)",
        ),
        (
            vec![(
                "double_blocks.0.processor.qkv_lora1.down.weight".to_owned(),
                vec![2, 2],
            )],
            "a LoRA in the layout of XLabs, which is not supported",
        ),
        (
            vec![("x.lora_mid.weight".to_owned(), vec![2, 2, 3, 3])],
            "Tucker's form",
        ),
        (
            vec![("y.weight".to_owned(), vec![2])],
            "tensors that do not belong to a LoRA: 1; the first is `y.weight`",
        ),
        (
            vec![("y.lora_up.weight".to_owned(), vec![2, 2])],
            "layer `y` has no `down` matrix",
        ),
        (
            vec![
                ("y.lora_up.weight".to_owned(), vec![2, 2]),
                ("y.lora_down.weight".to_owned(), vec![2, 2]),
            ],
            "1 of its 2 layers are not in the model, a StableDiffusionPipeline; the first is `y`",
        ),
        (
            vec![
                (format!("{double}.lora_up.weight"), vec![2, 2]),
                (format!("{double}.lora_down.weight"), vec![2, 2]),
            ],
            "a LoRA for FLUX: 1 of its 2 layers",
        ),
        (
            vec![
                (format!("{wide}.lora_up.weight"), vec![640, 2]),
                (format!("{wide}.lora_down.weight"), vec![2, 2048]),
            ],
            "a LoRA for Stable Diffusion XL: 1 of its 2 layers",
        ),
        (
            vec![(format!("{LAYER}.alpha"), vec![2])],
            "expected one finite number",
        ),
    ] {
        let file = more.iter().fold(good(), |file, (key, shape)| {
            file.with(key.clone(), floats(shape))
        });
        file.write(&path).unwrap();
        let found = message(&path, "pipeline");
        assert!(
            found.contains(expected) && found.contains("x.safetensors"),
            "{found}"
        );
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    for (up, down) in [
        ([8, 2, 1, 1], [2, 16, 1, 1]),
        ([16, 3, 1, 1], [2, 16, 1, 1]),
        ([16, 2, 1, 1], [2, 4, 2, 2]),
    ] {
        let file = Arrays::default()
            .with(format!("{LAYER}.lora_up.weight"), floats(&up))
            .with(format!("{LAYER}.lora_down.weight"), floats(&down));
        file.write(&path).unwrap();
        let found = message(&path, "pipeline");
        assert!(
            found.contains("do not fit the model's `mid_block.attentions.0.proj_in.weight`"),
            "{found}"
        );
    }
    // LoRAs of one model on another, and files of other kinds.
    let found = message(&lora("sdxl", "kohya"), "pipeline");
    assert!(
        found.contains("a LoRA for Stable Diffusion XL: "),
        "{found}"
    );
    let found = message(
        &golden("pipeline/unet/diffusion_pytorch_model.safetensors"),
        "pipeline",
    );
    assert!(found.contains("not a LoRA: none of its tensors"), "{found}");
    let pickled = folder.path().join("x.pt");
    std::fs::write(&pickled, "x").unwrap();
    assert!(message(&pickled, "pipeline").contains("a pickled file is not read"));
    let absent = message(&folder.path().join("absent.safetensors"), "pipeline");
    assert!(absent.contains("absent.safetensors: "), "{absent}");
    let empty = message(&golden("pipeline/unet"), "pipeline");
    assert!(
        empty.contains("no LoRA in this folder: expected pytorch_lora_weights"),
        "{empty}"
    );
}

/// diffusers and PEFT save a folder; PEFT's α is in a separate file.
#[test]
fn folders_of_diffusers_and_peft_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_lora_weights.safetensors");
    std::fs::copy(lora("sd1", "diffusers"), &path).unwrap();
    let models = with(&golden("pipeline"), &[(folder.path().to_owned(), SCALE)]).unwrap();
    check("folder", &draw(&models, "sd1"), "sd1");
    std::fs::remove_file(&path).unwrap();

    let peft = folder.path().join("adapter_model.safetensors");
    let floats = |shape: [usize; 2]| Array::floats(shape, vec![0.5; shape[0] * shape[1]]);
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
    let file = Arrays::default()
        .with(
            format!("base_model.model.{layer}.lora_A.weight"),
            floats([4, 16]),
        )
        .with(
            format!("base_model.model.{layer}.lora_B.weight"),
            floats([16, 4]),
        );
    file.write(&peft).unwrap();
    let change = |config: &str| {
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let read = |loras: Vec<LoraFile>| -> Result<Tensor<2>, difference_inversion::Error> {
            let options = FileOptions {
                loras,
                ..FileOptions::default()
            };
            let files = ModelFiles::open(&golden("pipeline"), &options)?;
            Pipeline::check_configs(&files)?;
            let weights = files.weights("unet", &Device::flex(), FloatDType::F32)?;
            weights.matrix(&format!("{layer}.weight"), [16, 16])
        };
        let lora = LoraFile {
            path: folder.path().to_owned(),
            weight: 1.0,
        };
        let change = read(vec![lora])? - read(Vec::new())?;
        Ok::<f32, difference_inversion::Error>(change.mean().into_scalar::<f32>())
    };
    // up · down is 1 everywhere.
    for (config, expected) in [
        ("{}", 1.0),
        (r#"{"r": 4, "lora_alpha": 8}"#, 2.0),
        (r#"{"r": 4, "lora_alpha": 8, "use_rslora": true}"#, 4.0),
        (
            r#"{"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2, "to_k": 9}}"#,
            0.5,
        ),
    ] {
        let found = change(config).unwrap();
        assert!((found - expected).abs() < 1e-3, "{config}: {found}");
    }
    let dora = change(r#"{"use_dora": true}"#).unwrap_err().to_string();
    assert!(dora.contains("a DoRA by its settings"), "{dora}");
}
