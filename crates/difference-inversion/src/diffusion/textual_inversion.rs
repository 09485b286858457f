//! Textual inversions: learned words for text encoders, as other programs save them.
//!
//! A word is written `<name>` in prompts and stands for the vectors of its file, one after the other
//! ([Gal et al. 2022](https://arxiv.org/abs/2208.01618)).

use std::path::Path;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};

use crate::diffusion::family::{EncoderPart, Family};
use crate::diffusion::model_files::ModelFiles;
use crate::diffusion::model_files::embedding::{EmbeddingFile, is_name};
use crate::diffusion::pipeline;
use crate::diffusion::text_encoder::{Base, TextEncoder};
use crate::models::text::tower::TowerKind;
use crate::weights::file::TensorFile;
use crate::weights::low_rank::numbers;
use crate::{Error, Result};

/// The extensions of pickled files of this kind.
const PICKLED: [&str; 4] = ["pt", "bin", "ckpt", "pth"];
const CONVERT: &str = "a pickled file is not read, because reading one can run any code; convert it in Python: \
    `d = torch.load(\"FILE\", weights_only=True)`, then `safetensors.torch.save_file({\"emb_params\": \
    d[\"string_to_param\"][\"*\"].detach()}, \"FILE.safetensors\")`; of a file without `string_to_param`, save `d` itself";

/// More tensors than any file of words has.
const MOST_TENSORS: usize = 64;

/// Names of vectors for one text encoder in ComfyUI, kohya's scripts, OneTrainer and diffusers' trainers: its
/// architecture, its number among those of that architecture in the model, and the models that they were made for.
const NAMED: [(&str, TowerKind, usize, &str); 5] = [
    ("clip_l", TowerKind::Clip, 0, "Stable Diffusion 1"),
    ("clip_h", TowerKind::Clip, 0, "Stable Diffusion 2"),
    ("clip_g", TowerKind::Clip, 1, "Stable Diffusion XL"),
    ("t5", TowerKind::T5, 0, "a model with T5"),
    ("t5xxl", TowerKind::T5, 0, "a model with T5"),
];

/// The models that vectors of these widths without such a name were made for.
const WIDTHS: [(usize, &str); 4] = [
    (768, "Stable Diffusion 1"),
    (1024, "Stable Diffusion 2"),
    (1280, "Stable Diffusion XL"),
    (4096, "a model with T5"),
];

/// Adds the words of all files to the text encoders they were learned for, by the names and widths of their
/// tensors.
///
/// # Errors
/// If a file is invalid (the error names it); [`Error::Setting`] for a name that is taken or cannot stand in a prompt.
pub(crate) fn add_all(
    files: &[EmbeddingFile],
    parts: &[&EncoderPart],
    encoders: &mut [TextEncoder],
) -> Result<()> {
    for file in files {
        let name = file.name();
        if !is_name(&name) {
            return Err(Error::Setting {
                name: "embedding",
                expected: "a name of letters, digits, `.`, `_` and `-`, which NAME=FILE gives"
                    .to_owned(),
                found: format!("`{name}`"),
            });
        }
        for (number, embeddings) in read(&file.path, parts, encoders)? {
            encoders[number].add_word(&name, embeddings)?;
        }
    }
    Ok(())
}

/// The vectors of one word for the text encoders of a model that difference tokens are learned for, [n, d] each, and
/// the base of such tokens. The word may have a file for each text encoder, as diffusers wants for SDXL.
///
/// # Errors
/// If a file is invalid (the error names it), or if a text encoder has no vectors, two files' vectors, or another number
/// of them than the others.
pub(crate) fn vectors(
    words: &[impl AsRef<Path>],
    files: &ModelFiles,
    device: &Device,
) -> Result<(Vec<Tensor<2>>, Base)> {
    let family = Family::of(files)?;
    let parts = family.encoders_in(files)?.into_iter();
    let parts: Vec<_> = parts.take_while(|part| part.learned).collect();
    let encoders = pipeline::text_encoders(files, family, &parts, device, FloatDType::F32)?;
    let mut found: Vec<Option<(&Path, Tensor<2>)>> = vec![None; encoders.len()];
    for path in words.iter().map(AsRef::as_ref) {
        for (number, embeddings) in read(path, &parts, &encoders)? {
            if let Some((other, _)) = &found[number] {
                let other = other.display();
                let reason = format!("vectors for the same text encoder as those of {other}");
                return Err(Error::invalid_file(path, reason));
            }
            found[number] = Some((path, embeddings));
        }
    }
    let last = words.last().map_or(Path::new(""), AsRef::as_ref);
    let mut vectors: Vec<Tensor<2>> = Vec::new();
    for (found, encoder) in found.into_iter().zip(&encoders) {
        let Some((path, embeddings)) = found else {
            let reason = format!(
                "a {} has {} text encoders, and no vectors of width {} were given: diffusers saves a word in one file \
                 for each text encoder; give both",
                family.class,
                encoders.len(),
                encoder.hidden_size()
            );
            return Err(Error::invalid_file(last, reason));
        };
        let [count, before] =
            [&embeddings, vectors.first().unwrap_or(&embeddings)].map(|one| one.dims()[0]);
        if count != before {
            let reason = format!(
                "{count} vectors for one text encoder and {before} for another: expected equal numbers"
            );
            return Err(Error::invalid_file(path, reason));
        }
        let most = encoder.max_num_tokens();
        if count > most {
            let reason = format!("{count} vectors, and a prompt has room for at most {most}");
            return Err(Error::invalid_file(path, reason));
        }
        vectors.push(embeddings);
    }
    Ok((vectors, family.base(&encoders)))
}

/// The vectors of a file, [n, d], each with the number of its text encoder.
fn read(
    path: &Path,
    parts: &[&EncoderPart],
    encoders: &[TextEncoder],
) -> Result<Vec<(usize, Tensor<2>)>> {
    let extension = path.extension().unwrap_or_default();
    if PICKLED
        .iter()
        .any(|end| extension.eq_ignore_ascii_case(end))
    {
        return Err(Error::invalid_file(path, CONVERT));
    }
    let file = TensorFile::open(path)?;
    let widths = || {
        let widths = encoders.iter().map(|one| one.hidden_size().to_string());
        widths.collect::<Vec<_>>().join(" and ")
    };
    let mut found: Vec<(usize, Tensor<2>)> = Vec::new();
    let mut names = file.names();
    names.sort();
    if names.len() > MOST_TENSORS {
        let reason = format!(
            "not a textual inversion: there are {} tensors in it",
            names.len()
        );
        return Err(Error::invalid_file(path, reason));
    }
    for key in names {
        let Some((_, shape)) = file.info(&key) else {
            continue;
        };
        let [count, width] = match *shape {
            [width] => [1, width],
            [count, width] => [count, width],
            _ => [0, 0],
        };
        let last = key.rsplit('.').next().unwrap_or(&key);
        let named = NAMED.iter().find(|(name, ..)| *name == last);
        let number = match named {
            Some((_, kind, place, _)) => (0..encoders.len())
                .filter(|&number| parts[number].kind == *kind)
                .nth(*place),
            None => (0..encoders.len()).find(|&number| encoders[number].hidden_size() == width),
        };
        let fits = |number: &usize| encoders[*number].hidden_size() == width;
        let Some(number) = number.filter(fits).filter(|_| count > 0) else {
            let of_width = WIDTHS.iter().find(|(known, _)| *known == width);
            let kind = match (named, of_width) {
                _ if count == 0 => "not a textual inversion".to_owned(),
                (Some((.., models)), _) | (None, Some((_, models))) => {
                    format!("it was made for {models}")
                }
                _ => "it was made for another model".to_owned(),
            };
            let reason = format!(
                "expected vectors of width {} for the model's text encoders, found tensor `{key}` of shape {shape:?}: {kind}",
                widths()
            );
            return Err(Error::invalid_file(path, reason));
        };
        if found.iter().any(|(other, _)| *other == number) {
            let reason = format!(
                "more than one word in it, such as `{key}`: save each in a file of its own"
            );
            return Err(Error::invalid_file(path, reason));
        }
        let numbers = numbers(&file, &key)?;
        if !numbers.iter().all(|number| number.is_finite()) {
            let reason = format!("tensor `{key}` has numbers that are not finite");
            return Err(Error::invalid_file(path, reason));
        }
        let device = encoders[number].token_table().device();
        let data = TensorData::new(numbers, [count, width]);
        found.push((number, Tensor::from_data(data, (&device, DType::F32))));
    }
    match found.is_empty() {
        true => Err(Error::invalid_file(path, "no tensors in it")),
        false => Ok(found),
    }
}
