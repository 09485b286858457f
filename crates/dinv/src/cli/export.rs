//! `dinv export`: a difference as a textual inversion of another program.
//!
//! The layouts were read in the sources of these programs: A1111 and Forge take a file by its name, ComfyUI a tensor by
//! the name of its text encoder, diffusers one word from each file, InvokeAI what kohya's scripts write.

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use clap::{Args, ValueEnum};
use difference_inversion::diffusion::family::{CHROMA, FLUX, STABLE_DIFFUSION, STABLE_DIFFUSION_3};
use difference_inversion::diffusion::text_encoder::Base;
use difference_inversion::method::difference::DifferenceTokens;
use difference_inversion::method::generate_config::GenerateConfig;
use difference_inversion::util::arrays::{Array, Arrays};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::output::Outputs;
use super::record::text_of;
use super::terminal::{self, Failure};

/// Widths of the token embeddings of Stable Diffusion 1 and FLUX.1, of Stable Diffusion 2, of SDXL's second text
/// encoder, and of Chroma.
const CLIP_L: usize = 768;
const CLIP_H: usize = 1024;
const CLIP_G: usize = 1280;
const T5_XXL: usize = 4096;
/// ComfyUI keeps the vectors of a word together up to this number.
const TOGETHER: usize = 7;

/// Export a difference for another program
///
/// Writes a textual inversion that the program loads, and says what to type there.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv export night.safetensors --format comfyui -o ComfyUI/models/embeddings
  dinv export night.safetensors --format diffusers --name night-sky -o exported
  dinv export night.safetensors --format a1111 --reverse -o embeddings")]
pub(crate) struct ExportArgs {
    /// The difference, as `dinv learn` or `dinv analogy` wrote it
    #[arg(value_name = "DIFFERENCE")]
    difference: PathBuf,
    /// The program
    #[arg(long, value_enum)]
    format: Format,
    /// The word that stands for the difference [default: dinv- and the file's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Export the reverse difference, from A′ to A
    #[arg(long)]
    reverse: bool,
    /// Folder for the files
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Replace files of the same name in that folder
    #[arg(long)]
    overwrite: bool,
    /// Print the results as one JSON object
    #[arg(long, hide_short_help = true)]
    json: bool,
}

/// The programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// AUTOMATIC1111's web UI, and Forge
    A1111,
    /// ComfyUI
    Comfyui,
    /// Hugging Face's library
    Diffusers,
    /// InvokeAI
    Invokeai,
}

impl Format {
    /// The name of the program.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::A1111 => "A1111",
            Self::Comfyui => "ComfyUI",
            Self::Diffusers => "diffusers",
            Self::Invokeai => "InvokeAI",
        }
    }
}

/// A file: its name, and its tensors.
type File = (String, Vec<(String, Tensor<2>)>);

/// A difference in the form that a program loads.
pub(crate) struct Exported {
    /// The files, by name.
    pub(crate) files: Vec<(String, Arrays)>,
    pub(crate) usage: Usage,
    /// What to know before using it.
    pub(crate) notes: Vec<String>,
}

/// What to type in the program; CAPTION stands for the caption of B.
#[derive(Debug, Serialize)]
pub(crate) struct Usage {
    /// Where the files go.
    place: &'static str,
    prompt: String,
    negative_prompt: &'static str,
    guidance_scale: f64,
    strength: String,
}

/// Writes the files.
pub(crate) fn run(args: &ExportArgs) -> anyhow::Result<()> {
    let tokens = DifferenceTokens::load(&args.difference, &Device::flex())?;
    let name = args.name()?;
    let tokens = match args.reverse {
        true => tokens.reversed(),
        false => tokens,
    };
    let exported = export(&tokens, args.format, &name)?;
    let names = exported.files.iter().map(|(name, _)| name.as_str());
    let output = Outputs::folder(&args.output, names, args.overwrite, &[&args.difference])?;
    output.check()?;
    let written = output.publish(None, |place| {
        for (name, arrays) in &exported.files {
            arrays.write(&place(name))?;
        }
        Ok(())
    })?;
    let Exported { usage, notes, .. } = exported;
    for note in &notes {
        terminal::message(format_args!("note: {note}"));
    }
    if args.json {
        return terminal::json(&json!({
            "files": written.iter().map(text_of).collect::<Vec<_>>(),
            "name": name,
            "prompt": usage.prompt,
            "negative_prompt": usage.negative_prompt,
            "guidance_scale": usage.guidance_scale,
            "strength": usage.strength,
            "notices": notes,
        }));
    }
    for path in written {
        terminal::line(path.display())?;
    }
    for (title, text) in [
        ("file", usage.place),
        ("prompt", usage.prompt.as_str()),
        ("negative", usage.negative_prompt),
        ("scale", &usage.guidance_scale.to_string()),
        ("strength", usage.strength.as_str()),
    ] {
        terminal::message(format_args!("{title:<9} {text}"));
    }
    terminal::message("CAPTION stands for the caption of B.");
    Ok(())
}

/// A difference for a program, under a name that [`is_name`].
pub(crate) fn export(
    tokens: &DifferenceTokens,
    format: Format,
    name: &str,
) -> anyhow::Result<Exported> {
    let files = files(tokens, format, name)?.into_iter();
    let files = files.map(|(name, tensors)| {
        let arrays = tensors.into_iter();
        let arrays = arrays.fold(Arrays::default(), |arrays, (key, tensor)| {
            arrays.with(key, Array::from_tensor(tensor))
        });
        (name, arrays)
    });
    let has_t5 = tokens.base().denoiser == FLUX.denoiser.title && format == Format::Diffusers;
    let mut notes = notes(format, name, tokens.num_tokens());
    notes.extend(conditions(tokens.base()));
    if has_t5 {
        notes.push("T5 does not know the word: give prompt_2=CAPTION".to_owned());
    }
    Ok(Exported {
        files: files.collect(),
        usage: usage(format, name),
        notes,
    })
}

/// Whether a text can be the word for a difference.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && text.chars().all(is_part)
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&c)
}

/// The word for the difference in a file of this name.
pub(crate) fn default_name(stem: &str, reverse: bool) -> String {
    let stem = stem.replace(|c: char| !is_part(c), "-");
    let end = if reverse { "-back" } else { "" };
    format!("dinv-{stem}{end}")
}

impl ExportArgs {
    /// The word: as given, or made of the file's name.
    fn name(&self) -> anyhow::Result<String> {
        let Some(name) = &self.name else {
            let stem = self.difference.file_stem().unwrap_or_default();
            return Ok(default_name(&stem.to_string_lossy(), self.reverse));
        };
        if is_name(name) {
            return Ok(name.clone());
        }
        let message = format!(
            "--name: expected letters, digits, `.`, `_` and `-`, not a dot first, found `{name}`"
        );
        Err(Failure::usage(message).into())
    }
}

/// The files of a program for a difference.
fn files(tokens: &DifferenceTokens, format: Format, name: &str) -> anyhow::Result<Vec<File>> {
    let embeddings = tokens.embeddings();
    let widths: Vec<usize> = embeddings.iter().map(|one| one.dims()[1]).collect();
    let denoiser = tokens.base().denoiser.as_str();
    let is = |title: &str| denoiser == title;
    let is_unet = is(STABLE_DIFFUSION.denoiser.title);
    let is_known = match (format, widths.as_slice()) {
        // Any model whose pipeline has `load_textual_inversion`: that of Stable Diffusion 3 has not.
        (Format::Diffusers, [_] | [_, _]) => is_unet || is(FLUX.denoiser.title),
        (Format::Comfyui, [CLIP_L]) => is_unet || is(FLUX.denoiser.title),
        (Format::Comfyui, [T5_XXL]) => is(CHROMA.denoiser.title),
        (Format::Comfyui, [CLIP_L, CLIP_G]) => is_unet || is(STABLE_DIFFUSION_3.denoiser.title),
        (_, [CLIP_L | CLIP_H] | [CLIP_L, CLIP_G]) => is_unet,
        _ => false,
    };
    if !is_known {
        let message = format!(
            "the difference was learned on a {denoiser} with token embeddings of width {widths:?}, for which {} reads no \
             textual inversions",
            format.title()
        );
        let hint = "Stable Diffusion 1, 2 and XL work everywhere, FLUX.1 with comfyui and diffusers, Chroma and \
                    Stable Diffusion 3 with comfyui, the demo model with diffusers";
        return Err(Failure::input(message).hint(hint).into());
    }
    let file = |name: &str| format!("{name}.safetensors");
    let pair = ["clip_l", "clip_g"];
    Ok(match (format, embeddings) {
        (Format::Diffusers, [one]) => {
            vec![(file(name), vec![(format!("<{name}>"), one.clone())])]
        }
        (Format::Diffusers, both) => (both.iter().zip(pair))
            .map(|(one, key)| {
                let tensors = vec![(format!("<{name}>"), one.clone())];
                (file(&format!("{name}.{key}")), tensors)
            })
            .collect(),
        (_, [one]) => {
            let key = match (format, widths[0]) {
                (Format::Comfyui, CLIP_H) => "clip_h",
                (Format::Comfyui, T5_XXL) => "t5xxl",
                (Format::Comfyui, _) => "clip_l",
                _ => "emb_params",
            };
            vec![(file(name), vec![(key.to_owned(), one.clone())])]
        }
        (_, both) => {
            let keys = pair.into_iter().map(str::to_owned);
            vec![(file(name), keys.zip(both.iter().cloned()).collect())]
        }
    })
}

/// What to type in a program.
fn usage(format: Format, name: &str) -> Usage {
    let (place, word, strength) = match format {
        Format::A1111 => (
            "the folder `embeddings`",
            name.to_owned(),
            "all or nothing: a weight such as (word:0.6) is something else".to_owned(),
        ),
        Format::Comfyui => (
            "the folder `models/embeddings`",
            format!("embedding:{name}"),
            format!(
                "the node ConditioningAverage from CAPTION to CAPTION embedding:{name}; a weight in the prompt is \
                 something else"
            ),
        ),
        Format::Diffusers => (
            "pipe.load_textual_inversion(FILE), of two files each with its text_encoder and tokenizer",
            format!("<{name}>"),
            "prompt_embeds between those of CAPTION and those of the prompt".to_owned(),
        ),
        Format::Invokeai => (
            "the model manager",
            format!("<{name}>"),
            format!("(\"CAPTION\", \"CAPTION <{name}>\").blend(0.4, 0.6) for 0.6"),
        ),
    };
    Usage {
        place,
        prompt: format!("CAPTION {word}"),
        negative_prompt: "CAPTION",
        guidance_scale: GenerateConfig::default().guidance_scale(),
        strength,
    }
}

/// How the text encoder has to be set up in the program.
fn conditions(base: &Base) -> Vec<String> {
    let loras = base
        .encoders
        .iter()
        .filter_map(|encoder| encoder.adapters.as_ref());
    let loras: BTreeSet<&str> = loras
        .flat_map(|lora| lora.names.iter().map(String::as_str))
        .collect();
    let skipped = base
        .encoders
        .iter()
        .map(|encoder| encoder.clip_skip)
        .max()
        .unwrap_or(0);
    let of_loras = (!loras.is_empty()).then(|| {
        let loras: Vec<&str> = loras.into_iter().collect();
        format!(
            "it was learned with the LoRA {}: load it there, too",
            loras.join(" and ")
        )
    });
    let of_skip = (skipped > 0).then(|| {
        format!(
            "it was learned with CLIP skip {}, as most programs count",
            skipped + 1
        )
    });
    of_loras.into_iter().chain(of_skip).collect()
}

/// What goes wrong in a program.
fn notes(format: Format, name: &str, num_tokens: usize) -> Vec<String> {
    let is_word = name.chars().all(|c| c.is_ascii_alphabetic());
    let hijacks = (format == Format::A1111 && is_word).then(|| {
        format!(
            "A1111 puts the difference wherever the word `{name}` stands in a prompt; choose a name that is not \
             a word, such as `dinv-{name}`"
        )
    });
    let is_split = (format == Format::Comfyui && num_tokens > TOGETHER).then(|| {
        format!(
            "ComfyUI may split {num_tokens} vectors over two chunks of a long prompt; up to {TOGETHER} stay together"
        )
    });
    hijacks.into_iter().chain(is_split).collect()
}

#[cfg(test)]
mod tests {
    use difference_inversion::diffusion::text_encoder::{EncoderAdapters, EncoderBase};

    use super::*;

    const ALL: [Format; 4] = [
        Format::A1111,
        Format::Comfyui,
        Format::Diffusers,
        Format::Invokeai,
    ];

    fn tokens(denoiser: &str, widths: &[usize]) -> DifferenceTokens {
        let encoders = widths.iter().map(|&hidden_size| EncoderBase {
            vocab_size: 7,
            hidden_size,
            table: "00".repeat(32),
            adapters: None,
            clip_skip: 0,
        });
        let base = Base {
            denoiser: denoiser.to_owned(),
            encoders: encoders.collect(),
        };
        DifferenceTokens::zeros(3, &base, &Device::flex())
    }

    /// The files with their keys and widths.
    fn layout(denoiser: &str, widths: &[usize], format: Format) -> Vec<String> {
        let files = files(&tokens(denoiser, widths), format, "x");
        let Ok(files) = files else {
            return vec!["refused".to_owned()];
        };
        let of_file = |(name, tensors): File| {
            let keys = tensors.iter();
            let keys = keys.map(|(key, tensor)| format!("{key} {:?}", tensor.dims()));
            format!("{name}: {}", keys.collect::<Vec<_>>().join(", "))
        };
        files.into_iter().map(of_file).collect()
    }

    #[test]
    fn every_program_finds_the_keys_that_it_looks_for() {
        let sd1 = |format| layout("U-Net", &[768], format).concat();
        assert_eq!(sd1(Format::A1111), "x.safetensors: emb_params [3, 768]");
        assert_eq!(sd1(Format::Comfyui), "x.safetensors: clip_l [3, 768]");
        assert_eq!(sd1(Format::Diffusers), "x.safetensors: <x> [3, 768]");
        assert_eq!(sd1(Format::Invokeai), "x.safetensors: emb_params [3, 768]");
        let sd2 = layout("U-Net", &[1024], Format::Comfyui).concat();
        assert_eq!(sd2, "x.safetensors: clip_h [3, 1024]");
        let chroma = layout(CHROMA.denoiser.title, &[4096], Format::Comfyui).concat();
        assert_eq!(chroma, "x.safetensors: t5xxl [3, 4096]");
        for format in [Format::A1111, Format::Comfyui, Format::Invokeai] {
            let sdxl = layout("U-Net", &[768, 1280], format).concat();
            assert_eq!(sdxl, "x.safetensors: clip_l [3, 768], clip_g [3, 1280]");
        }
        assert_eq!(
            layout("U-Net", &[768, 1280], Format::Diffusers),
            [
                "x.clip_l.safetensors: <x> [3, 768]",
                "x.clip_g.safetensors: <x> [3, 1280]"
            ]
        );
    }

    #[test]
    fn what_a_program_does_not_read_is_refused() {
        let refused = |denoiser: &str, widths: &[usize]| -> Vec<Format> {
            let is_refused = |format: &Format| layout(denoiser, widths, *format) == ["refused"];
            ALL.into_iter().filter(is_refused).collect()
        };
        let others = [Format::A1111, Format::Invokeai];
        assert_eq!(
            refused(STABLE_DIFFUSION_3.denoiser.title, &[768, 1280]),
            [Format::A1111, Format::Diffusers, Format::Invokeai]
        );
        assert_eq!(refused(FLUX.denoiser.title, &[768]), others);
        assert_eq!(refused("Z-Image transformer", &[2560]), ALL);
        assert_eq!(
            refused(CHROMA.denoiser.title, &[4096]),
            [Format::A1111, Format::Diffusers, Format::Invokeai]
        );
        // The demo model, which only diffusers opens.
        assert_eq!(
            refused("U-Net", &[192]),
            [Format::A1111, Format::Comfyui, Format::Invokeai]
        );
    }

    #[test]
    fn a_text_encoder_that_was_changed_is_noted() {
        let mut base = tokens("U-Net", &[768]).base().clone();
        assert_eq!(conditions(&base), [""; 0]);
        base.encoders[0].clip_skip = 1;
        base.encoders[0].adapters = Some(EncoderAdapters {
            digest: String::new(),
            names: vec!["ink.safetensors".to_owned()],
        });
        let expected = [
            "it was learned with the LoRA ink.safetensors: load it there, too",
            "it was learned with CLIP skip 2, as most programs count",
        ];
        assert_eq!(conditions(&base), expected);
    }

    #[test]
    fn words_that_would_be_hijacked_are_noted() {
        assert_eq!(notes(Format::A1111, "dinv-night", 4), [""; 0]);
        assert!(notes(Format::A1111, "night", 4)[0].contains("the word `night`"));
        assert!(notes(Format::Comfyui, "night", 8)[0].contains("8 vectors"));
    }
}
