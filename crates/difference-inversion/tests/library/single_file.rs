//! Checkpoints that are one file in the original layout, against diffusers folders with the same
//! weights, both made by `training/reference/make_golden_single_file.py`.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use difference_inversion::Result;
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::model_files::layout::Layout;
use difference_inversion::diffusion::model_files::{FileOptions, MODEL_INDEX, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::diffusion::sample::{Noising, PredictionType};
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::RgbImage;
use difference_inversion::models::denoiser::unet::{UNet2DConditionModel, UNetConfig};
use difference_inversion::util::arrays::{Array, Arrays, Values};
use difference_inversion::weights::{Weights, read_config};
use serde_json::{Value, json};

/// The file or folder `name` under `tests/golden`.
fn golden(name: &str) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    root.join("tests/golden").join(name)
}

/// `family` with the configurations of the tiny networks in `folder`.
fn tiny(mut family: Layout, folder: &Path) -> Layout {
    let config = |network: &str| read_config(&folder.join(network).join("config.json")).unwrap();
    family.denoiser = config("unet");
    family.vae = config("vae");
    for encoder in &mut family.text_encoders {
        encoder.config = config(encoder.network);
    }
    let scheduler = folder.join("scheduler/scheduler_config.json");
    family.scheduler = read_config(&scheduler).unwrap();
    family
}

/// The family, the folder and the single file for a name.
fn case(name: &str) -> (Layout, PathBuf, PathBuf) {
    let folder = golden(match name {
        "sd1" => "pipeline",
        "sd2" => "sd21",
        _ => name,
    });
    let family = tiny(Layout::by_name(name).unwrap(), &folder);
    let file = golden("single_file").join(format!("{name}.safetensors"));
    (family, folder, file)
}

fn options(family: Layout) -> FileOptions {
    FileOptions {
        family: Some(family),
        ..FileOptions::default()
    }
}

/// The values of a tensor, which must be finite and not all equal.
fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let numbers: Vec<f32> = tensor.into_data().iter::<f32>().collect();
    assert!(numbers.iter().all(|x| x.is_finite()) && numbers.iter().any(|x| *x != numbers[0]));
    numbers
}

/// All outputs of a pipeline for a prompt and a picture.
fn outputs(files: &ModelFiles, dtype: FloatDType) -> Vec<Vec<f32>> {
    let pipeline = Pipeline::open(files, &Device::flex(), dtype).unwrap();
    let prompt = pipeline.prompt("a red house").unwrap();
    let words = pipeline.read(&prompt, 0).unwrap();
    let conditions = pipeline
        .encode_prompts(&[FullPrompt::plain(&words)])
        .unwrap();
    let [height, width] = pipeline.resolution();
    let picture = RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([x, y, 77].map(|value| u8::try_from(value).unwrap()))
    });
    let latents = pipeline.encode_image(&picture);
    let prediction = pipeline.predict(latents.clone(), &[500.0], &conditions);
    let decoded = pipeline.decode(latents.clone()).unwrap().into_raw();
    let Noising::Discrete(schedule) = pipeline.noising() else {
        panic!("a schedule of whole steps");
    };
    vec![
        numbers(conditions.context),
        numbers(latents),
        numbers(prediction),
        decoded.into_iter().map(f32::from).collect(),
        schedule
            .alphas_cumprod()
            .iter()
            .map(|value| *value as f32)
            .collect(),
    ]
}

#[test]
fn a_single_file_gives_the_same_numbers_as_the_folder() {
    for name in ["sd1", "sd2", "sdxl"] {
        let (family, folder, file) = case(name);
        let options = FileOptions {
            tokenizer: Some(folder.join("tokenizer")),
            ..options(family)
        };
        let folder = ModelFiles::open(&folder, &FileOptions::default()).unwrap();
        let file = ModelFiles::open(&file, &options).unwrap();
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            let (expected, found) = (outputs(&folder, dtype), outputs(&file, dtype));
            assert!(expected == found, "{name} in {dtype:?} differs");
        }
    }
}

#[test]
fn a_file_of_f32_gives_the_same_numbers_as_one_of_f16() {
    let (family, folder, file) = case("sd2");
    let wide = tempfile::tempdir().unwrap();
    let path = wide.path().join("model.safetensors");
    Arrays::read(&file).unwrap().write(&path).unwrap();
    assert!(path.metadata().unwrap().len() > file.metadata().unwrap().len() * 3 / 2);
    let options = FileOptions {
        tokenizer: Some(folder.join("tokenizer")),
        ..options(family)
    };
    let [narrow, wide] = [&file, &path].map(|path| ModelFiles::open(path, &options).unwrap());
    assert!(outputs(&narrow, FloatDType::F32) == outputs(&wide, FloatDType::F32));
}

#[test]
fn the_channels_of_the_unet_tell_the_kind_of_pipeline() {
    let (family, folder, file) = case("sd1");
    let key = "model.diffusion_model.input_blocks.0.0.weight";
    let arrays = Arrays::read(&file).unwrap();
    let (c_out, values) = match (
        arrays.array(key).unwrap().shape(),
        arrays.array(key).unwrap().values(),
    ) {
        (&[c_out, 4, 3, 3], Values::F32(values)) => (c_out, values.clone()),
        other => panic!("{other:?}"),
    };
    let options = FileOptions {
        tokenizer: Some(folder.join("tokenizer")),
        ..options(family)
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for (channels, kind) in [
        (4, &family::STABLE_DIFFUSION),
        (8, &family::INSTRUCT_PIX2PIX),
        (9, &family::INPAINT),
    ] {
        let count = c_out * channels * 9;
        let more = values.iter().cycle().take(count).copied().collect();
        let array = Array::floats([c_out, channels, 3, 3], more);
        arrays.clone().with(key, array).write(&path).unwrap();
        let files = ModelFiles::open(&path, &options).unwrap();
        let pipeline = Pipeline::open(&files, &Device::flex(), FloatDType::F32).unwrap();
        assert_eq!(pipeline.family(), kind);
    }
}

#[test]
fn the_padding_of_a_single_file_is_its_familys() {
    let (family, _, file) = case("sdxl");
    let with = FileOptions {
        tokenizer: Some(golden("tokenizer/files")),
        ..options(family.clone())
    };
    let files = ModelFiles::open(&file, &with).unwrap();
    let pad = |network: &str| files.vocabulary(network).unwrap().pad_token;
    assert_eq!(
        [pad("text_encoder"), pad("text_encoder_2")],
        [None, Some("!")]
    );
    let without = ModelFiles::open(&file, &options(family)).unwrap();
    let message = without.vocabulary("text_encoder").unwrap_err().to_string();
    assert!(message.contains("the vocabulary is missing"), "{message}");
}

/// A file with the tensors that identify families, and with `more`.
fn marks(
    folder: &Path,
    width: usize,
    channels: usize,
    encoders: &[&str],
    more: &[&str],
) -> PathBuf {
    let path = folder.join("model.safetensors");
    let unet = "model.diffusion_model.";
    let ones = |shape: &[usize]| Array::floats(shape, vec![1.0; shape.iter().product()]);
    let block = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight";
    let arrays = Arrays::default()
        .with(format!("{unet}{block}"), ones(&[1, width]))
        .with(
            format!("{unet}input_blocks.0.0.weight"),
            ones(&[1, channels, 1, 1]),
        )
        .with("first_stage_model.quant_conv.bias", ones(&[8]));
    let keys = encoders.iter().chain(more).copied();
    let arrays = keys.fold(arrays, |arrays, key| arrays.with(key, ones(&[3])));
    arrays.write(&path).unwrap();
    path
}

const CLIP: &str = "cond_stage_model.transformer.text_model.final_layer_norm.bias";
const OPEN_CLIP: &str = "cond_stage_model.model.ln_final.bias";
const BOTH: [&str; 2] = [
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
    "conditioner.embedders.1.model.ln_final.bias",
];

#[test]
fn families_are_recognised_by_keys_and_shapes() {
    let folder = tempfile::tempdir().unwrap();
    for (width, channels, encoders, name, class_name) in [
        (768, 4, &[CLIP][..], "sd1", "StableDiffusionPipeline"),
        (
            768,
            8,
            &[CLIP],
            "sd1",
            "StableDiffusionInstructPix2PixPipeline",
        ),
        (768, 9, &[CLIP], "sd1", "StableDiffusionInpaintPipeline"),
        (1024, 4, &[OPEN_CLIP], "sd2", "StableDiffusionPipeline"),
        (
            1024,
            9,
            &[OPEN_CLIP],
            "sd2-base",
            "StableDiffusionInpaintPipeline",
        ),
        (2048, 4, &BOTH, "sdxl", "StableDiffusionXLPipeline"),
    ] {
        let path = marks(folder.path(), width, channels, encoders, &[]);
        let files = ModelFiles::open(&path, &FileOptions::default()).unwrap();
        assert_eq!(files.layout().unwrap().name, name);
        let index: Value = files.config(MODEL_INDEX).unwrap();
        assert_eq!(index["_class_name"], class_name);
        let config: UNetConfig = files.config("unet").unwrap();
        assert_eq!(config.in_channels, channels);
        assert_eq!(files.notices().len(), usize::from(name == "sd2"));
    }
}

#[test]
fn what_the_unet_predicts_is_as_marked_asked_for_or_usual() {
    let folder = tempfile::tempdir().unwrap();
    let predicted = |width, encoders: &[&str], more: &[&str], asked| {
        let path = marks(folder.path(), width, 4, encoders, more);
        let options = FileOptions {
            prediction_type: asked,
            ..FileOptions::default()
        };
        let files = ModelFiles::open(&path, &options).unwrap();
        let scheduler: Value = files.config("scheduler").unwrap();
        let (unet, name) = (
            files.config::<Value>("unet").unwrap(),
            files.layout().unwrap().name,
        );
        let field = |name: &str| scheduler[name].as_str().map(str::to_owned);
        let spacing = field("timestep_spacing").unwrap();
        (
            field("prediction_type").unwrap(),
            unet["sample_size"].clone(),
            name,
            spacing,
        )
    };
    let expected = |kind: &str, size, name, spacing: &str| {
        (kind.to_owned(), json!(size), name, spacing.to_owned())
    };
    let (epsilon, velocity) = ("epsilon", "v_prediction");
    let asked = Some(PredictionType::Epsilon);
    assert_eq!(
        predicted(768, &[CLIP], &[], None),
        expected(epsilon, 64, "sd1", "leading")
    );
    assert_eq!(
        predicted(1024, &[OPEN_CLIP], &[], None),
        expected(velocity, 96, "sd2", "leading")
    );
    assert_eq!(
        predicted(1024, &[OPEN_CLIP], &[], asked),
        expected(epsilon, 64, "sd2-base", "leading")
    );
    assert_eq!(
        predicted(2048, &BOTH, &["v_pred", "ztsnr"], None),
        expected(velocity, 128, "sdxl", "trailing")
    );
    assert_eq!(
        predicted(2048, &BOTH, &["v_pred"], asked),
        expected(velocity, 128, "sdxl", "leading")
    );
    assert_eq!(
        predicted(1024, &[OPEN_CLIP], &["v_pred"], asked),
        expected(velocity, 96, "sd2", "leading")
    );
}

#[test]
fn what_merges_leave_behind_is_left_out_with_a_note() {
    let plain = FileOptions::default();
    let strays = ["control_model.x", "lora_te_x.alpha", "safety_checker.y"];
    let (_, _, notices) = said(768, &strays, &[], &plain);
    let expected = "it: 3 tensors belong to no network of a Stable Diffusion 1 and are left out: \
                    control_model.x, lora_te_x.alpha, safety_checker.y";
    assert_eq!(notices, [expected]);
    let tower = ["conditioner.embedders.0.transformer.vision_model.post_layernorm.bias"];
    assert_eq!(said(2048, &tower, &[], &plain).2, [""; 0]);

    let folder = tempfile::tempdir().unwrap();
    let refused = |width, encoders: &[&str], key: &str| {
        let path = marks(folder.path(), width, 4, encoders, &[key]);
        message(ModelFiles::open(&path, &plain))
    };
    for (key, expected) in [
        (
            "edm_vpred.sigma_max",
            "its noise is that of EDM, as in CosXL and Playground 2.5",
        ),
        (
            "edm_mean",
            "its noise is that of EDM, as in CosXL and Playground 2.5",
        ),
        ("noise_augmentor.data_mean", "draws from pictures"),
    ] {
        let found = refused(2048, &BOTH, key);
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn an_autoencoders_attention_may_have_newer_or_older_names() {
    let (family, folder, file) = case("sd1");
    let original = Arrays::read(&file).unwrap();
    let expected = Weights::open(&folder.join("vae"), &Device::flex(), FloatDType::F32).unwrap();
    let names = [
        ("q", "to_q", "query"),
        ("k", "to_k", "key"),
        ("v", "to_v", "value"),
        ("proj_out", "to_out.0", "proj_attn"),
    ];
    for newer in [true, false] {
        let mut arrays = original.clone();
        for (name, new, old) in names {
            for half in ["encoder", "decoder"] {
                for kind in ["weight", "bias"] {
                    let start = format!("first_stage_model.{half}.mid.attn_1");
                    let array = arrays
                        .arrays
                        .remove(&format!("{start}.{name}.{kind}"))
                        .unwrap();
                    let name = if newer { new } else { old };
                    arrays
                        .arrays
                        .insert(format!("{start}.{name}.{kind}"), array);
                }
            }
        }
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("model.safetensors");
        arrays.write(&path).unwrap();
        let files = ModelFiles::open(&path, &options(family.clone())).unwrap();
        let weights = files
            .weights("vae", &Device::flex(), FloatDType::F32)
            .unwrap();
        for half in ["encoder", "decoder"] {
            let name = format!("{half}.mid_block.attentions.0.to_v.weight");
            let shape: [usize; 2] = weights.shape(&name).unwrap().try_into().unwrap();
            let found = numbers(weights.tensor(&name, shape).unwrap());
            assert_eq!(
                found,
                numbers(expected.tensor(&name, shape).unwrap()),
                "{name}"
            );
        }
    }
}

/// The family recognised for a file of the U-Net's width with these metadata, and the notices.
fn said(
    width: usize,
    more: &[&str],
    metadata: &[(&str, &str)],
    options: &FileOptions,
) -> (String, bool, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let encoders: &[&str] = match width {
        768 => &[CLIP],
        1024 => &[OPEN_CLIP],
        _ => &BOTH,
    };
    let path = marks(folder.path(), width, 4, encoders, more);
    let mut arrays = Arrays::read(&path).unwrap();
    let metadata = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    arrays.metadata.extend(metadata);
    arrays.write(&path).unwrap();
    let files = ModelFiles::open(&path, options).unwrap();
    let scheduler: Value = files.config("scheduler").unwrap();
    let rescaled = scheduler["rescale_betas_zero_snr"] == json!(true);
    if rescaled {
        assert_eq!(scheduler["timestep_spacing"], "trailing");
    }
    let prediction = scheduler["prediction_type"].as_str().unwrap().to_owned();
    let name = format!("{} {prediction}", files.layout().unwrap().name);
    let notices = files.notices().iter();
    (
        name,
        rescaled,
        notices
            .map(|it| it.replace(&path.display().to_string(), "it"))
            .collect(),
    )
}

#[test]
fn what_a_file_says_of_itself_is_heard() {
    let plain = FileOptions::default();
    let asked = |prediction| FileOptions {
        prediction_type: Some(prediction),
        ..FileOptions::default()
    };
    let velocity = |by: &str| format!("it predicts velocity, as its {by} says");
    for (field, value) in [
        ("modelspec.prediction_type", "v"),
        ("modelspec.prediction_type", "v_prediction"),
        ("modelspec.predict_key", "v"),
        ("ss_v_parameterization", "True"),
    ] {
        for (width, family) in [(768, "sd1"), (2048, "sdxl"), (1024, "sd2")] {
            let found = said(width, &[], &[(field, value)], &plain);
            let expected = (
                format!("{family} v_prediction"),
                false,
                vec![velocity(field)],
            );
            assert_eq!(found, expected, "{field} {width}");
        }
    }
    for (field, value) in [
        ("modelspec.predict_key", "epsilon"),
        ("modelspec.architecture", "stable-diffusion-v2-512"),
    ] {
        let (name, _, notices) = said(1024, &[], &[(field, value)], &plain);
        assert_eq!(name, "sd2-base epsilon");
        assert_eq!(notices, [format!("it predicts noise, as its {field} says")]);
    }
    let silent = [
        ("ss_v_parameterization", "False"),
        ("modelspec.prediction_type", "?"),
    ];
    assert_eq!(
        said(768, &[], &silent, &plain),
        ("sd1 epsilon".to_owned(), false, vec![])
    );
    let zero = said(768, &[], &[("ss_zero_terminal_snr", "True")], &plain);
    assert!(zero.1);
    let zero_snr = FileOptions {
        zero_snr: true,
        ..FileOptions::default()
    };
    assert!(said(2048, &[], &[], &zero_snr).1);

    // The key, then the option, then the metadata.
    let metadata = [("modelspec.prediction_type", "v")];
    let noise = asked(PredictionType::Epsilon);
    assert_eq!(said(768, &[], &metadata, &noise).0, "sd1 epsilon");
    assert_eq!(said(1024, &[], &metadata, &noise).0, "sd2-base epsilon");
    let (name, _, notices) = said(768, &["v_pred"], &[], &noise);
    assert_eq!(name, "sd1 v_prediction");
    let expected = velocity("tensor `v_pred`") + "; the request for noise is ignored";
    assert_eq!(notices, [expected]);
    assert_eq!(
        said(768, &[], &[], &asked(PredictionType::Sample)).0,
        "sd1 sample"
    );
    let named = options(Layout::sd2_base());
    assert_eq!(said(1024, &[], &metadata, &named).0, "sd2-base epsilon");
}

#[test]
fn what_other_programs_save_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let open = |width, encoders: &[&str], more: &[&str]| {
        let path = marks(folder.path(), width, 4, encoders, more);
        ModelFiles::open(&path, &FileOptions::default()).unwrap()
    };
    // ComfyUI's, and fine-tunings that learned a word.
    let more = [
        "cond_stage_model.text_projection",
        "cond_stage_model.logit_scale",
        "embedding_manager.string_to_param_dict.*",
    ];
    assert!(open(768, &[CLIP], &more).has("text_encoder"));
    open(2048, &BOTH, &["conditioner.embedders.0.text_projection"]);
    // Those of diffusers' script for SDXL.
    let projection = "conditioner.embedders.1.model.text_projection.weight";
    let files = open(2048, &BOTH, &[projection]);
    let weights = files.weights("text_encoder_2", &Device::flex(), FloatDType::F32);
    weights
        .unwrap()
        .tensor("text_projection.weight", [3])
        .unwrap();
    // Stable Diffusion 2 in the layout of SDXL's code.
    let files = open(1024, &["conditioner.embedders.0.model.ln_final.bias"], &[]);
    assert_eq!(files.layout().unwrap().name, "sd2");
    assert!(files.has("text_encoder"));
}

fn message(opened: Result<ModelFiles>) -> String {
    opened.unwrap_err().to_string()
}

#[test]
fn files_that_are_something_else_say_what() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &Path| message(ModelFiles::open(path, &FileOptions::default()));
    let marked = |width, channels, encoders: &[&str], more: &[&str]| {
        open(&marks(folder.path(), width, channels, encoders, more))
    };
    for (found, expected) in [
        (
            marked(1280, 4, &[CLIP], &[]),
            "the refiner of SDXL: its U-Net reads prompts of width 1280",
        ),
        (
            marked(640, 4, &[CLIP], &[]),
            "not supported: its U-Net reads prompts of width 640",
        ),
        (
            marked(768, 5, &[CLIP], &[]),
            "expected a convolution of 4, 8 or 9 channels, found shape",
        ),
        (
            marked(768, 4, &[OPEN_CLIP], &[]),
            "no text encoder: a checkpoint of Stable Diffusion 1",
        ),
        (
            marked(
                768,
                4,
                &[CLIP],
                &["model.diffusion_model.surprise", "first_stage_model.x"],
            ),
            "2 tensors are not of a checkpoint of Stable Diffusion 1: first_stage_model.x, \
             model.diffusion_model.surprise",
        ),
        (
            marked(
                2048,
                4,
                &BOTH,
                &["conditioner.embedders.1.model.transformer.resblocks.0.attn.x"],
            ),
            "1 tensors are not of",
        ),
        (
            open(&golden("pipeline/unet/diffusion_pytorch_model.safetensors")),
            "one network of",
        ),
        (
            open(&golden("samplers/io.safetensors")),
            "not a checkpoint of Stable Diffusion",
        ),
        (
            open(&golden("pipeline/model_index.json")),
            "not a safetensors file",
        ),
        (open(&golden("absent")), "No such file"),
    ] {
        assert!(found.contains(expected), "{found}");
    }
    let two = format!("{OPEN_CLIP}.x").replace("ln_final.bias.x", "transformer.resblocks.0.attn");
    let path = marks(folder.path(), 1024, 4, &[OPEN_CLIP], &[]);
    let arrays = Arrays::read(&path).unwrap();
    let arrays = arrays.with(
        format!("{two}.in_proj_bias"),
        Array::floats([4], vec![0.0; 4]),
    );
    arrays.write(&path).unwrap();
    assert!(open(&path).contains("rows cannot be split in 3"));
    for name in ["model.ckpt", "model.PT", "model.bin", "model.pth"] {
        std::fs::write(folder.path().join(name), "junk").unwrap();
        let found = open(&folder.path().join(name));
        assert!(found.contains("a pickled file is not read"), "{found}");
    }
}

#[test]
fn a_wrong_family_or_an_option_that_does_not_apply_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = marks(folder.path(), 1024, 4, &[OPEN_CLIP], &[]);
    let forced = message(ModelFiles::open(&path, &options(Layout::sd1())));
    assert!(
        forced.starts_with("setting `family`: expected the family of"),
        "{forced}"
    );
    assert!(forced.ends_with("found sd1, which reads 768"), "{forced}");
    assert!(ModelFiles::open(&path, &options(Layout::sd2_base())).is_ok());
    assert!(
        Layout::by_name("sd3")
            .unwrap_err()
            .to_string()
            .contains("sd1, sd2-base, sd2, sdxl")
    );
    let variant = FileOptions {
        variant: Some("fp16".to_owned()),
        ..FileOptions::default()
    };
    assert!(message(ModelFiles::open(&path, &variant)).contains("`variant`: expected none"));
    let tokenizer = FileOptions {
        tokenizer: Some(golden("tokenizer/files")),
        ..FileOptions::default()
    };
    let of_folder = |options| message(ModelFiles::open(&golden("pipeline"), options));
    assert!(of_folder(&tokenizer).contains("`tokenizer`: expected none"));
    assert!(of_folder(&options(Layout::sd1())).contains("`family`: expected none"));
}

#[test]
fn weights_that_are_not_the_familys_are_named_by_both_of_their_names() {
    let (family, _, file) = case("sd1");
    let files = ModelFiles::open(&file, &options(family)).unwrap();
    let weights = files
        .weights("unet", &Device::flex(), FloatDType::F32)
        .unwrap();
    let config = UNetConfig::default();
    let message = UNet2DConditionModel::load(&weights, &config)
        .unwrap_err()
        .to_string();
    let names = "tensor `down_blocks.0.resnets.0.time_emb_proj.bias` from \
                 `model.diffusion_model.input_blocks.1.0.emb_layers.1.bias`: expected";
    assert!(message.contains(names), "{message}");
    let found = files
        .weights("text_encoder_2", &Device::flex(), FloatDType::F32)
        .unwrap_err();
    assert!(found.to_string().contains("has no `text_encoder_2`"));
}

#[test]
fn a_folder_that_only_holds_a_single_file_points_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = marks(folder.path(), 768, 4, &[CLIP], &[]);
    let files = ModelFiles::open(folder.path(), &FileOptions::default()).unwrap();
    let message = files.config::<Value>("unet").unwrap_err().to_string();
    let hint = format!("to open {}, name the file", path.display());
    assert!(
        message.contains("no folder `unet`") && message.contains(&hint),
        "{message}"
    );
}

#[test]
fn a_single_file_cut_anywhere_is_an_error() {
    let (family, _, file) = case("sd2");
    let bytes = std::fs::read(file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.safetensors");
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let ends = [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        bytes.len() - 1,
    ];
    for end in (0..bytes.len()).step_by(997).chain(ends) {
        std::fs::write(&path, &bytes[..end]).unwrap();
        let found = message(ModelFiles::open(&path, &options(family.clone())));
        assert!(
            found.contains("safetensors") || found.contains("truncated"),
            "{end}: {found}"
        );
    }
}
