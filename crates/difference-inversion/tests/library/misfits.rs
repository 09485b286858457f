//! Models, parts and inputs that do not match.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType};
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::model_files::{FileOptions, ModelFiles};
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::method::analogy::{self, Target};
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate;
use difference_inversion::method::generate::Inputs;
use difference_inversion::method::learn::Records;

use crate::tiny::{
    copy, edit, example_in, golden, models_in, opened, request, short_analogy, silent,
};

#[test]
fn pictures_and_masks_are_given_to_those_who_take_them() {
    let picture = example_in("sdxl").a;
    let message = |folder: &str, image: bool, mask: bool| {
        let models = models_in(&golden(folder));
        let inputs = Inputs {
            image: image.then_some(&picture),
            mask: mask.then_some(&picture),
            ..Inputs::default()
        };
        let drawn = generate::generate(&models, &request(2, 2.0), inputs, &mut silent);
        drawn
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    for (folder, image, mask, expected) in [
        ("sdxl", false, false, ""),
        (
            "sdxl",
            true,
            false,
            "a StableDiffusionXLPipeline takes no picture",
        ),
        ("instruct_pix2pix", false, false, "a picture is missing"),
        ("instruct_pix2pix", true, true, "takes no mask"),
        ("inpaint", false, true, "a picture is missing"),
        ("inpaint", true, false, "a mask is missing"),
    ] {
        let found = message(folder, image, mask);
        assert!(found.contains(expected), "{folder}: {found}");
        assert_eq!(found.is_empty(), expected.is_empty(), "{folder}: {found}");
    }
}

#[test]
fn another_u_net_decides_what_the_model_takes() {
    let open = |unet: &Path| {
        let options = FileOptions {
            unet: Some(unet.to_owned()),
            ..FileOptions::default()
        };
        let files = ModelFiles::open(&golden("learning"), &options)?;
        Pipeline::open(&files, &Device::flex(), FloatDType::F32)
    };
    for (folder, kind) in [
        ("learning", &family::STABLE_DIFFUSION),
        ("instruct_pix2pix", &family::INSTRUCT_PIX2PIX),
        ("inpaint", &family::INPAINT),
    ] {
        let pipeline = open(&golden(folder).join("unet")).unwrap();
        assert_eq!(pipeline.family(), kind, "{folder}");
    }
    for (folder, expected) in [
        (
            "sdxl/unet",
            "sdxl/unet/config.json: field `cross_attention_dim`",
        ),
        ("learning/vae", "learning/vae"),
        ("nowhere", "nowhere/config.json: "),
    ] {
        let message = open(&golden(folder)).unwrap_err().to_string();
        assert!(message.contains(expected), "{folder}: {message}");
    }
}

#[test]
fn a_difference_is_not_learned_on_models_that_take_a_picture() {
    let target = Target {
        b: example_in("sdxl").a_prime,
        caption_b: Some("a green house".to_owned()),
    };
    for folder in ["instruct_pix2pix", "inpaint"] {
        let models = models_in(&golden(folder));
        let (examples, records) = ([example_in("sdxl")], Records::default());
        let learned = analogy::learn(&models, &examples, &short_analogy(), &records, &mut silent);
        let tokens = DifferenceTokens::zeros(2, &models.pipeline().base(), &Device::flex());
        let applied = analogy::apply(&models, &tokens, &target, &short_analogy(), &mut silent);
        for error in [learned.unwrap_err(), applied.unwrap_err()] {
            let message = error.to_string();
            assert!(
                message.contains("draws from a picture and words"),
                "{message}"
            );
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    type Harm = fn(&Path);
    let message = |harm: Harm| {
        let folder = copy("sdxl");
        harm(folder.path());
        opened(folder.path()).unwrap_err().to_string()
    };
    let cases: [(Harm, &str); 6] = [
        (
            |model| fs::remove_dir_all(model.join("text_encoder_2")).unwrap(),
            "no folder `text_encoder_2`",
        ),
        (
            |model| {
                edit(
                    &model.join("model_index.json"),
                    "StableDiffusionXLPipeline",
                    "StableDiffusionPipeline",
                )
            },
            "field `cross_attention_dim`: expected 16",
        ),
        (
            |model| {
                edit(
                    &model.join("model_index.json"),
                    "XLPipeline",
                    "XLInpaintPipeline",
                )
            },
            "found \"StableDiffusionXLInpaintPipeline\"",
        ),
        (
            |model| {
                edit(
                    &model.join("unet/config.json"),
                    "\"projection_class_embeddings_input_dim\": 34",
                    "\"projection_class_embeddings_input_dim\": 35",
                )
            },
            "expected 34: 10 of the pooled prompt and 24 of the sizes, found Some(35)",
        ),
        (
            |model| {
                edit(
                    &model.join("unet/config.json"),
                    "\"addition_embed_type\": \"text_time\"",
                    "\"addition_embed_type\": null",
                )
            },
            "field `addition_embed_type`: expected text_time",
        ),
        (
            |model| {
                let path = model.join("tokenizer_2/tokenizer.json");
                edit(&path, "\"#\": 2", "\"#\": 3");
                edit(&path, "\"$\": 3", "\"$\": 2");
            },
            "different vocabularies",
        ),
    ];
    for (harm, expected) in cases {
        let found = message(harm);
        assert!(found.contains(expected), "{expected}: {found}");
    }
    let folder = copy("sd21");
    edit(
        &folder.path().join("unet/config.json"),
        "\"in_channels\": 4",
        "\"in_channels\": 9",
    );
    let found = opened(folder.path()).unwrap_err().to_string();
    assert!(
        found
            .contains("field `in_channels`: expected 4, as a StableDiffusionPipeline has, found 9"),
        "{found}"
    );
}
