//! Known models besides those of the [families](crate::diffusion::family): the joint spaces of text
//! encoders, and the licences of models.

use std::path::Path;

use serde::Deserialize;

use crate::Result;
use crate::diffusion::family;
use crate::diffusion::model_files::ModelFiles;
use crate::hub::ModelId;
#[cfg(feature = "hub")]
use crate::weights::read_config;

/// The captioner for models from the Hub: BLIP, 1.9 GB. The paper's is BLIP-2, `Salesforce/blip2-opt-2.7b`, 15 GB.
pub const CAPTIONER: &str = "Salesforce/blip-image-captioning-large";

/// The joint spaces of the text encoders in use, each with the width, activation and depths that identify
/// the encoder. Diffusion models on ViT-H-14 leave out its last layer.
const JOINT_SPACES: [(&str, usize, &str, [usize; 2]); 3] = [
    ("openai/clip-vit-large-patch14", 768, "quick_gelu", [12, 12]),
    (
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        1024,
        "gelu",
        [23, 24],
    ),
    (
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        1280,
        "gelu",
        [32, 32],
    ),
];

/// Licences of joint spaces and captioners by repository, as the models' pages name them, for models whose
/// README was not downloaded or does not state one.
const LICENCES: [(&str, &str); 3] = [
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "mit"),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "mit"),
    (CAPTIONER, "bsd-3-clause"),
];

/// The known joint spaces of a model's text encoders. An encoder is identified by the width, depth and
/// activation in its configuration. Whether a joint space is really its own,
/// [`JointSpace::check_encoder`](crate::diffusion::joint_space::JointSpace::check_encoder) decides by the
/// weights.
///
/// # Errors
/// If a configuration is invalid.
pub fn joint_spaces(files: &ModelFiles) -> Result<Vec<ModelId>> {
    let found = (family::text_encoders().into_iter())
        .filter(|name| files.has(name))
        .map(|name| joint_space(&files.config(name)?));
    let found: Vec<Option<ModelId>> = found.collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// The joint space of a text encoder, from the file of its configuration.
#[cfg(feature = "hub")]
pub(super) fn joint_space_of(config: &Path) -> Result<Option<ModelId>> {
    joint_space(&read_config(config)?)
}

/// What distinguishes text encoders. Other architectures have other fields, and no joint space.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EncoderSize {
    hidden_size: usize,
    num_hidden_layers: usize,
    hidden_act: String,
}

/// The joint space of a text encoder.
fn joint_space(size: &EncoderSize) -> Result<Option<ModelId>> {
    let found = JOINT_SPACES.into_iter().find(|(_, width, act, layers)| {
        *width == size.hidden_size
            && *act == size.hidden_act
            && layers.contains(&size.num_hidden_layers)
    });
    found.map(|(name, ..)| name.parse()).transpose()
}

/// The name of a model's licence, from the front matter of the `README.md` in its folder, or else as known
/// for its repository.
pub fn licence(folder: Option<&Path>, repository: &str) -> Option<String> {
    let readme = folder.and_then(|folder| std::fs::read_to_string(folder.join("README.md")).ok());
    let known = || {
        let models = family::known_models().map(|model| (model.repository, model.licence));
        let mut all = models.chain(LICENCES);
        let found = all.find(|(name, _)| *name == repository);
        found.map(|(_, licence)| licence.to_owned())
    };
    readme.and_then(|text| licence_in(&text)).or_else(known)
}

/// The field `license_name` or `license` between the lines `---` at the beginning of a README.
fn licence_in(readme: &str) -> Option<String> {
    let front = readme.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let (front, _) = front.split_once("\n---")?;
    let field = |name: &str| {
        let value = front.lines().find_map(|line| line.strip_prefix(name))?;
        let value = value.trim().trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| value.to_owned())
    };
    field("license_name:").or_else(|| field("license:"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::model_files::FileOptions;

    #[test]
    fn every_known_name_is_a_name() {
        let names: Vec<_> = family::known_models()
            .map(|model| model.repository)
            .collect();
        let spaces = JOINT_SPACES.map(|space| space.0);
        let licences = LICENCES.map(|(name, _)| name);
        for name in names.iter().chain(&spaces).chain(&licences) {
            assert!(name.parse::<ModelId>().is_ok(), "{name}");
        }
        assert!(CAPTIONER.parse::<ModelId>().is_ok());
    }

    #[test]
    fn joint_spaces_are_told_by_the_text_encoders_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, width: usize, layers: usize, act: &str| {
            let text = format!(
                r#"{{"hidden_size": {width}, "num_hidden_layers": {layers}, "hidden_act": "{act}"}}"#
            );
            let folder = folder.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("config.json"), text).unwrap();
        };
        let spaces = || -> Vec<String> {
            let files = ModelFiles::open(folder.path(), &FileOptions::default()).unwrap();
            let spaces = joint_spaces(&files).unwrap();
            spaces.iter().map(ToString::to_string).collect()
        };
        assert!(spaces().is_empty());
        let large = "openai/clip-vit-large-patch14";
        write("text_encoder", 768, 12, "quick_gelu");
        assert_eq!(spaces(), [large]);
        write("text_encoder_2", 1280, 32, "gelu");
        assert_eq!(
            spaces(),
            [large, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"]
        );
        write("text_encoder", 1024, 23, "gelu");
        assert_eq!(spaces()[0], "laion/CLIP-ViT-H-14-laion2B-s32B-b79K");
        for (width, layers, act) in [
            (768, 12, "gelu"),
            (1024, 22, "gelu"),
            (512, 12, "quick_gelu"),
        ] {
            write("text_encoder", width, layers, act);
            assert_eq!(spaces().len(), 1);
        }
    }

    #[test]
    fn the_licence_is_read_from_the_front_matter() {
        let read = |text: &str| licence_in(text);
        let plain = "---\nlicense: openrail++\ntags:\n- x\n---\n# Model\nlicense: none\n";
        assert_eq!(read(plain).as_deref(), Some("openrail++"));
        let other = "---\r\nlicense: other\r\nlicense_name: \"my-licence\"\r\n---\r\n";
        assert_eq!(read(other).as_deref(), Some("my-licence"));
        for text in [
            "",
            "# Model\nlicense: mit",
            "---\ntags: x\n---\n",
            "---\nlicense: mit",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(licence(None, CAPTIONER).as_deref(), Some("bsd-3-clause"));
        assert_eq!(licence(None, "someone/something"), None);
    }
}
