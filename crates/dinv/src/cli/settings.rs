//! Settings from all sources, in order of precedence: flags, the `--config` file, the model's `dinv.json`, the built-in
//! defaults. What `draft` stands for comes right after the flags or the file that sets it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use difference_inversion::Unread;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::method::generate_config::{AnalogyConfig, GenerateConfig};
use difference_inversion::method::learn::LearnConfig;
use difference_inversion::method::prompt::PromptConfig;
use difference_inversion::weights::read_config;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::flags::ModelSettings;
use super::locate::{known, relative_to};
use super::terminal::Failure;

/// The file in a model's folder with the settings recommended for it.
pub(crate) const RECOMMENDED: &str = "dinv.json";
/// The settings among a model's recommended ones that say how the model is opened.
const OPENING: [&str; 2] = ["resolution", "max_sequence_length"];
/// The setting that replaces others by those of a draft.
const DRAFT: &str = "draft";

/// The settings that the model in `folder` recommends.
pub(crate) fn recommended(folder: &Path) -> anyhow::Result<Map<String, Value>> {
    let path = folder.join(RECOMMENDED);
    if path.is_file() {
        Ok(read_config(&path)?)
    } else {
        Ok(Map::new())
    }
}

/// What the model in `folder` recommends about how it is opened.
pub(crate) fn recommended_opening(folder: &Path) -> anyhow::Result<ModelSettings> {
    let mut values = recommended(folder)?;
    values.retain(|name, _| OPENING.contains(&name.as_str()));
    let layer = Layer {
        origin: Origin::Model(folder.join(RECOMMENDED)),
        values,
    };
    let layers = vec![layer];
    Settings { layers }.resolve()
}

/// Settings from one place, by name.
#[derive(Debug, Clone)]
struct Layer {
    origin: Origin,
    values: Map<String, Value>,
}

#[derive(Debug, Clone)]
enum Origin {
    Flags,
    /// The file that the user named.
    Config(PathBuf),
    /// The model's own file.
    Model(PathBuf),
    /// The program, of a model that it knows by name.
    Known(&'static str),
    /// The flag `--draft`.
    Draft,
    /// A line of a batch.
    Line(String),
}

/// All given settings, lowest precedence first.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    layers: Vec<Layer>,
}

impl Settings {
    /// Takes the flags and reads the `--config` file.
    pub(crate) fn new(config: Option<&Path>, flags: &[&dyn ErasedFlags]) -> anyhow::Result<Self> {
        let mut layers = Vec::new();
        if let Some(path) = config {
            layers.push(read_toml(path)?);
        }
        let mut values = Map::new();
        for group in flags {
            values.extend(group.values()?);
        }
        layers.push(Layer {
            origin: Origin::Flags,
            values,
        });
        // What a draft stands for gives way to what is set beside it.
        let mut below = None;
        for (place, layer) in layers.iter().enumerate() {
            if let Some(value) = layer.values.get(DRAFT) {
                let is_draft = (value.as_bool())
                    .ok_or_else(|| layer.failure("`draft`: expected true or false"))?;
                below = is_draft.then_some(place);
            }
        }
        if let Some(place) = below {
            layers.insert(place, Layer::draft());
        }
        Ok(Self { layers })
    }

    /// The same for a command that has no draft, although a file that several commands read asks for one.
    pub(crate) fn without_draft(mut self) -> Self {
        (self.layers).retain(|layer| !matches!(layer.origin, Origin::Draft));
        self
    }

    /// Adds the settings that the model in `folder` recommends, with the lowest precedence.
    pub(crate) fn with_model(mut self, folder: &Path) -> anyhow::Result<Self> {
        let values = recommended(folder)?;
        if !values.is_empty() {
            let mut names = names::<AnalogyConfig>()?;
            names.extend(OPENING.map(str::to_owned));
            let layer = Layer {
                origin: Origin::Model(folder.join(RECOMMENDED)),
                values,
            };
            layer.check_names(&names)?;
            self.layers.insert(0, layer);
        }
        Ok(self)
    }

    /// Puts the settings of a line of a batch, which `place` names, above all others.
    pub(crate) fn with_line(
        mut self,
        place: &str,
        values: &Map<String, Value>,
    ) -> anyhow::Result<Self> {
        let layer = Layer {
            origin: Origin::Line(place.to_owned()),
            values: values.clone(),
        };
        let mut of_all = names::<ModelSettings>()?;
        of_all.push(DRAFT.to_owned());
        if let Some(name) = values.keys().find(|name| of_all.contains(name)) {
            let failure = layer.failure(&format!("`{name}` is the same for all jobs"));
            return Err(failure.hint("give it on the command line").into());
        }
        layer.check_names(&names::<AnalogyConfig>()?)?;
        self.layers.push(layer);
        Ok(self)
    }

    /// Puts what a model that is known by name is drawn with below all others.
    pub(crate) fn with_drawing_of(mut self, model: Option<&Path>) -> Self {
        let Some(known) = model.and_then(known) else {
            return self;
        };
        if let Some(drawing) = known.drawing {
            let values = [
                ("num_inference_steps", json!(drawing.steps)),
                ("guidance_scale", json!(drawing.guidance_scale)),
            ];
            let values = values.map(|(name, value)| (name.to_owned(), value));
            let layer = Layer {
                origin: Origin::Known(known.name),
                values: values.into_iter().collect(),
            };
            self.layers.insert(0, layer);
        }
        self
    }

    /// All settings of an analogy, checked.
    pub(crate) fn analogy(&self) -> anyhow::Result<AnalogyConfig> {
        let config = AnalogyConfig {
            prompt: self.resolve::<PromptConfig>()?,
            learn: self.resolve::<LearnConfig>()?,
            generate: self.resolve::<GenerateConfig>()?,
        };
        config.learn.validate()?;
        config.generate.validate()?;
        Ok(config)
    }

    /// Notes about given settings without effect. Those that a model recommends are for all cases and get no note.
    pub(crate) fn without_effect(&self, unread: Vec<Unread>) -> impl Iterator<Item = String> {
        let of_user = |layer: &&Layer| matches!(layer.origin, Origin::Flags | Origin::Config(_));
        let given = move |name| {
            (self.layers.iter().filter(of_user)).any(|layer| layer.values.contains_key(name))
        };
        let told = unread
            .into_iter()
            .filter(move |unread| given(unread.setting));
        told.map(|unread| unread.to_string())
    }

    /// One group of settings: the defaults, overridden by the layers.
    pub(crate) fn resolve<T: Default + Serialize + DeserializeOwned>(&self) -> anyhow::Result<T> {
        let mut fields = object(&T::default())?;
        let mut resolved = T::default();
        for layer in &self.layers {
            for (name, value) in &layer.values {
                if let Some(field) = fields.get_mut(name) {
                    field.clone_from(value);
                }
            }
            resolved = serde_path_to_error::deserialize(Value::Object(fields.clone()))
                .map_err(|error| layer.complain(&error.path().to_string(), error.inner()))?;
        }
        Ok(resolved)
    }
}

impl Layer {
    /// The settings of a draft: the CLIP loss alone, which needs no denoiser, and few steps of drawing without guidance
    /// (`docs/study.md`).
    fn draft() -> Self {
        let values = [
            ("lambda_mse", json!(0.0)),
            ("clip_first", json!(0)),
            ("steps", json!(60)),
            ("learning_rate_schedule", json!("linear")),
            ("num_inference_steps", json!(4)),
            ("skip", json!(0.0)),
            ("guidance_scale", json!(1.0)),
        ];
        let values = values.map(|(name, value)| (name.to_owned(), value));
        Self {
            origin: Origin::Draft,
            values: values.into_iter().collect(),
        }
    }

    /// Refuses unknown names, with the nearest known one.
    fn check_names(&self, known: &[String]) -> anyhow::Result<()> {
        let Some(unknown) = self.values.keys().find(|name| !known.contains(name)) else {
            return Ok(());
        };
        let nearest = known
            .iter()
            .map(|name| (strsim::jaro_winkler(name, unknown), name))
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        let failure = self.failure(&format!("there is no setting `{unknown}`"));
        Err(match nearest {
            Some((_, name)) => failure.hint(format!("did you mean `{name}`?")),
            None => failure,
        }
        .into())
    }

    fn complain(&self, name: &str, reason: &serde_json::Error) -> anyhow::Error {
        let name = match self.origin {
            Origin::Flags => format!("--{}", name.replace('_', "-")),
            _ => format!("`{name}`"),
        };
        self.failure(&format!("{name}: {reason}")).into()
    }

    fn failure(&self, message: &str) -> Failure {
        match &self.origin {
            Origin::Flags => Failure::usage(message),
            Origin::Config(path) => Failure::input(format!("{}: {message}", path.display())),
            Origin::Model(path) => Failure::input(format!("{}: {message}", path.display())),
            Origin::Known(name) => Failure::input(format!("{name}: {message}")),
            Origin::Draft => Failure::new(format!("--draft: {message}")),
            Origin::Line(place) => Failure::input(format!("{place}: {message}")),
        }
    }
}

/// The given flags of one kind.
pub(crate) trait ErasedFlags {
    /// The value of every given flag, by setting.
    fn values(&self) -> anyhow::Result<Map<String, Value>>;
}

impl<T: Serialize> ErasedFlags for T {
    fn values(&self) -> anyhow::Result<Map<String, Value>> {
        let mut values = object(self)?;
        values.retain(|_, value| !value.is_null());
        Ok(values)
    }
}

/// Reads a settings file, whose names may belong to any subcommand; its paths are relative to it.
fn read_toml(path: &Path) -> anyhow::Result<Layer> {
    let text = fs::read_to_string(path).map_err(difference_inversion::Error::io(path))?;
    let text = text.trim_start_matches('\u{feff}'); // Windows editors add it
    let mut values: Map<String, Value> = toml::from_str(text).map_err(|error| {
        Failure::input(format!(
            "{}: {}",
            path.display(),
            error.to_string().trim_end()
        ))
    })?;
    // The flag has two names.
    if let Some(path) = values.remove("transformer") {
        values.insert("unet".to_owned(), path);
    }
    let paths = names::<ModelSettings>()?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for name in paths
        .iter()
        .filter(|name| ["model", "tokenizer", "clip", "captioner"].contains(&name.as_str()))
    {
        for path in several(&mut values, name) {
            if let Value::String(value) = path {
                *value = relative_to(folder, value).to_string_lossy().into_owned();
            }
        }
    }
    for name in [
        "lora",
        "vae",
        "preview_vae",
        "embedding",
        "unet",
        "text_encoder",
    ] {
        for file in several(&mut values, name) {
            if let Value::String(text) = file {
                let (before, path) = match text.split_once('=') {
                    Some((word, path)) if name == "embedding" => (format!("{word}="), path),
                    _ => (String::new(), text.as_str()),
                };
                *text = format!("{before}{}", folder.join(path).display());
            }
        }
    }
    let layer = Layer {
        origin: Origin::Config(path.to_owned()),
        values,
    };
    let mut known = names::<AnalogyConfig>()?;
    known.push(DRAFT.to_owned());
    known.extend(paths);
    known.extend(names::<TextToImage>()?);
    layer.check_names(&known)?;
    Ok(layer)
}

/// The values of a setting that may be a single value or a list.
fn several<'a>(values: &'a mut Map<String, Value>, name: &str) -> &'a mut [Value] {
    match values.get_mut(name) {
        Some(Value::Array(values)) => values.as_mut_slice(),
        Some(value) => std::slice::from_mut(value),
        None => &mut [],
    }
}

/// The names of a group's settings; of a group of groups, the names of all.
fn names<T: Default + Serialize>() -> anyhow::Result<Vec<String>> {
    Ok(values(&T::default())?
        .into_iter()
        .map(|(name, _)| name)
        .collect())
}

/// A group's settings by name; of a group of groups, those of all.
pub(crate) fn values(settings: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    let mut values = Map::new();
    for (name, value) in object(settings)? {
        match value {
            Value::Object(group) => values.extend(group),
            _ => {
                values.insert(name, value);
            }
        }
    }
    Ok(values)
}

fn object(value: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    match serde_json::to_value(value).context("settings cannot be written as JSON")? {
        Value::Object(map) => Ok(map),
        _ => Err(Failure::new("settings are not a list of names and values").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_above_the_file_and_below_flags() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("draft.toml");
        let read = |text: &str, flags: Value| {
            fs::write(&path, text).unwrap();
            Settings::new(Some(&path), &[&flags])?.analogy()
        };
        let whole = "steps = 7\nnum_tokens = 5\n";
        let config = read(whole, json!({})).unwrap();
        assert_eq!((config.learn.steps, config.learn.lambda_mse), (7, 4.0));
        let config = read(whole, json!({ "draft": true, "num_inference_steps": 8 })).unwrap();
        let learned = (
            config.learn.steps,
            config.learn.num_tokens,
            config.learn.lambda_mse,
        );
        assert_eq!(learned, (60, 5, 0.0));
        let drawn = (
            config.generate.num_inference_steps,
            config.generate.guidance_scale,
        );
        assert_eq!(drawn, (8, Some(1.0)));
        let config = read("draft = true\nnum_inference_steps = 6\n", json!({})).unwrap();
        assert_eq!(
            (config.learn.steps, config.generate.num_inference_steps),
            (60, 6)
        );
        let text = "draft = true\n";
        fs::write(&path, text).unwrap();
        let settings = Settings::new(Some(&path), &[]).unwrap().without_draft();
        let drawn: TextToImage = settings.resolve().unwrap();
        assert_eq!(drawn.num_inference_steps, 50);
        let error = read("draft = 'yes'\n", json!({})).unwrap_err().to_string();
        assert!(
            error.ends_with("`draft`: expected true or false"),
            "{error}"
        );
    }

    #[test]
    fn models_with_a_name_are_drawn_with_what_their_pages_recommend() {
        let drawn = |model: &str, flags: Value| {
            let settings = Settings::new(None, &[&flags]).unwrap();
            let settings = settings.with_drawing_of(Some(Path::new(model)));
            let drawn: TextToImage = settings.resolve().unwrap();
            (drawn.num_inference_steps, drawn.guidance_scale)
        };
        let none = || json!({});
        assert_eq!(drawn("z-image-turbo", none()), (8, Some(1.0)));
        assert_eq!(drawn("Tongyi-MAI/Z-Image@main", none()), (50, Some(5.0)));
        assert_eq!(drawn("flux-schnell@v1", none()), (4, Some(1.0)));
        for model in ["sd15", "demo", "owner/name"] {
            assert_eq!(drawn(model, none()), (50, None), "{model}");
        }
        let flags = json!({ "num_inference_steps": 9 });
        assert_eq!(drawn("klein-base", flags), (9, Some(4.0)));
    }
}
