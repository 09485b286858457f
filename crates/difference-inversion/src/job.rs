//! Requests, which may come as JSON, and their answers: shared by the program, a server and other languages.
//!
//! [`Job::open`] checks a job and reads its files, before a model is needed; [`Job::run`] runs it. The observer
//! receives its progress and stops it with [`ControlFlow::Break`](std::ops::ControlFlow::Break).

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::Result;
use crate::diffusion::draw::InitNoise;
use crate::diffusion::draw::TextToImage;
use crate::diffusion::frozen::Models;
use crate::image::{Mask, load_image, load_mask};
use crate::method::analogy;
use crate::method::analogy::Applied;
use crate::method::analogy::Example;
use crate::method::analogy::Learned;
use crate::method::analogy::Target;
use crate::method::difference::DifferenceTokens;
use crate::method::generate;
use crate::method::generate::Inputs;
use crate::method::generate_config::AnalogyConfig;
use crate::method::learn::Records;
use crate::util::progress::{self, Observer};
use crate::util::settings::Checks;

/// A request that models answer.
pub trait Job {
    /// The contents of its files.
    type Inputs;
    /// Its result.
    type Answer;

    /// Reads and checks the files; tensors are put on `device`.
    ///
    /// # Errors
    /// [`Error::Missing`] if a required input is absent, and any error in a file, naming it.
    fn open(&self, device: &Device) -> Result<Self::Inputs>;

    /// Runs the job.
    ///
    /// # Errors
    /// [`Error::Setting`] for an invalid setting, [`Error::Stopped`] if the observer asks to stop,
    /// and as the function of [`analogy`] that the job is named after.
    fn run(
        &self,
        models: &Models,
        inputs: &Self::Inputs,
        observer: Observer<'_>,
    ) -> Result<Self::Answer>;

    /// Opens and runs the job.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`run`](Self::run).
    fn answer(&self, models: &Models, observer: Observer<'_>) -> Result<Self::Answer> {
        let inputs = self.open(models.pipeline().device())?;
        self.run(models, &inputs, observer)
    }
}

/// The files of one pair of pictures (A, A′), with their captions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFiles {
    /// The picture before.
    pub a: PathBuf,
    /// The picture after.
    pub a_prime: PathBuf,
    /// A's caption; if absent, the captioner's.
    #[serde(default)]
    pub caption_a: Option<String>,
    /// The same for A′.
    #[serde(default)]
    pub caption_a_prime: Option<String>,
}

impl PairFiles {
    /// Whether both captions are given.
    pub fn has_captions(&self) -> bool {
        self.caption_a.is_some() && self.caption_a_prime.is_some()
    }
}

/// Reads pictures, and tells all that is wrong with them at once.
#[derive(Debug, Default)]
struct Reader {
    total: usize,
    wrong: Vec<Error>,
}

impl Reader {
    /// The picture, or an empty one if [`end`](Self::end) refuses it.
    fn picture(&mut self, path: &Path) -> RgbImage {
        self.total += 1;
        load_image(path).unwrap_or_else(|error| {
            self.wrong.push(error);
            RgbImage::default()
        })
    }

    fn pairs(&mut self, pairs: &[PairFiles]) -> Result<Vec<Example>> {
        if pairs.is_empty() {
            return Err(Error::Missing {
                what: "a pair of pictures".to_owned(),
                reason: "a difference is learned from at least one pair (A, A′)".to_owned(),
            });
        }
        let read = pairs.iter().map(|pair| Example {
            a: self.picture(&pair.a),
            a_prime: self.picture(&pair.a_prime),
            caption_a: pair.caption_a.clone(),
            caption_a_prime: pair.caption_a_prime.clone(),
        });
        Ok(read.collect())
    }

    fn target(&mut self, target: &TargetFile) -> Target {
        Target {
            b: self.picture(&target.b),
            caption_b: target.caption_b.clone(),
        }
    }

    fn end<T>(self, read: T) -> Result<T> {
        Error::of_pictures(self.total, self.wrong)?;
        Ok(read)
    }
}

/// The file of B, with its caption.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetFile {
    /// The picture.
    pub b: PathBuf,
    /// Its caption; if absent, the captioner's.
    #[serde(default)]
    pub caption_b: Option<String>,
}

/// Learns the difference that pairs show: [`analogy::learn`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnJob {
    /// The pairs, at least one.
    pub pairs: Vec<PairFiles>,
    /// How prompts are made and the difference is learned.
    #[serde(default)]
    pub settings: AnalogyConfig,
    /// Files of the run.
    #[serde(default)]
    pub records: Records,
}

impl Job for LearnJob {
    type Inputs = Vec<Example>;
    type Answer = Learned;

    fn open(&self, _: &Device) -> Result<Vec<Example>> {
        let mut reader = Reader::default();
        let examples = reader.pairs(&self.pairs)?;
        reader.end(examples)
    }

    fn run(
        &self,
        models: &Models,
        examples: &Vec<Example>,
        observer: Observer<'_>,
    ) -> Result<Learned> {
        analogy::learn(models, examples, &self.settings, &self.records, observer)
    }
}

/// Applies a learned difference to a picture: [`analogy::apply`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyJob {
    /// The file of the difference.
    pub difference: PathBuf,
    /// The picture.
    pub target: TargetFile,
    /// How prompts and B′ are made.
    #[serde(default)]
    pub settings: AnalogyConfig,
}

impl Job for ApplyJob {
    type Inputs = (DifferenceTokens, Target);
    type Answer = Applied;

    fn open(&self, device: &Device) -> Result<Self::Inputs> {
        let tokens = DifferenceTokens::load(&self.difference, device)?;
        let mut reader = Reader::default();
        let target = reader.target(&self.target);
        reader.end((tokens, target))
    }

    fn run(
        &self,
        models: &Models,
        (tokens, target): &Self::Inputs,
        observer: Observer<'_>,
    ) -> Result<Applied> {
        analogy::apply(models, tokens, target, &self.settings, observer)
    }
}

/// Solves A : A′ :: B : B′: [`analogy::solve`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnalogyJob {
    /// The pairs, at least one.
    pub pairs: Vec<PairFiles>,
    /// The picture to change.
    pub target: TargetFile,
    /// How prompts are made, the difference is learned, and B′ is made.
    #[serde(default)]
    pub settings: AnalogyConfig,
    /// Files of the run.
    #[serde(default)]
    pub records: Records,
}

impl Job for AnalogyJob {
    type Inputs = (Vec<Example>, Target);
    type Answer = (Learned, Applied);

    fn open(&self, _: &Device) -> Result<Self::Inputs> {
        let mut reader = Reader::default();
        let examples = reader.pairs(&self.pairs)?;
        let target = reader.target(&self.target);
        reader.end((examples, target))
    }

    fn run(
        &self,
        models: &Models,
        (examples, target): &Self::Inputs,
        observer: Observer<'_>,
    ) -> Result<Self::Answer> {
        let Self {
            settings, records, ..
        } = self;
        analogy::solve(models, examples, target, settings, records, observer)
    }
}

/// Draws a picture from words and other inputs that the model takes: [`generate::generate`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateJob {
    /// The words, and how the picture is drawn.
    pub settings: TextToImage,
    /// The file of the difference tokens appended to the prompt.
    pub difference: Option<PathBuf>,
    /// The file of the noise to start from, see [`InitNoise::read`].
    pub init_latents: Option<PathBuf>,
    /// The picture that InstructPix2Pix or an inpainting model changes.
    pub image: Option<PathBuf>,
    /// The area that an inpainting model redraws.
    pub mask: Option<PathBuf>,
}

/// The contents of the files of a [`GenerateJob`].
#[derive(Debug, Clone)]
pub struct GenerateInputs {
    /// Difference tokens.
    pub tokens: Option<DifferenceTokens>,
    /// The noise to start from.
    pub init: Option<InitNoise>,
    /// The picture to change.
    pub image: Option<RgbImage>,
    /// The mask.
    pub mask: Option<Mask>,
}

impl Job for GenerateJob {
    type Inputs = GenerateInputs;
    type Answer = RgbImage;

    fn open(&self, device: &Device) -> Result<GenerateInputs> {
        let picture = |path: &Option<PathBuf>| path.as_deref().map(load_image).transpose();
        let tokens = |path| DifferenceTokens::load(path, device);
        let init = |path| InitNoise::read(path, device);
        Ok(GenerateInputs {
            tokens: self.difference.as_deref().map(tokens).transpose()?,
            init: self.init_latents.as_deref().map(init).transpose()?,
            image: picture(&self.image)?,
            mask: self.mask.as_deref().map(load_mask).transpose()?,
        })
    }

    fn run(
        &self,
        models: &Models,
        inputs: &GenerateInputs,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        Checks::default()
            .finite(
                "guidance_scale",
                self.settings.guidance_scale.unwrap_or(0.0),
            )
            .finite("image_guidance_scale", self.settings.image_guidance_scale)
            .finite("strength", self.settings.strength)
            .result()?;
        if let Some(notice) = inputs.mask.as_ref().and_then(|mask| mask.notice.clone()) {
            progress::notice(&mut *observer, notice);
        }
        let inputs = Inputs {
            tokens: inputs.tokens.as_ref(),
            init: inputs.init.clone(),
            image: inputs.image.as_ref(),
            mask: inputs.mask.as_ref().map(|mask| &mask.image),
        };
        generate::generate(models, &self.settings, inputs, observer)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use burn::tensor::FloatDType;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;
    use crate::diffusion::frozen::ModelPaths;
    use crate::util::progress::Progress;
    use crate::util::progress::Stage;

    fn golden(name: &str) -> PathBuf {
        (Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden")).join(name)
    }

    fn models() -> Models {
        let paths = ModelPaths {
            model: golden("learning"),
            ..ModelPaths::default()
        };
        Models::open(&paths, &Device::flex(), FloatDType::F32).unwrap()
    }

    fn read<T: DeserializeOwned>(request: Value) -> T {
        serde_json::from_value(request).unwrap()
    }

    #[test]
    fn all_pictures_that_cannot_be_read_are_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let there = golden("learning/a.png");
        std::fs::write(path("text.png"), "no picture").unwrap();
        let pairs = vec![
            PairFiles {
                a: there.clone(),
                a_prime: path("gone.png"),
                ..PairFiles::default()
            },
            PairFiles {
                a: path("text.png"),
                a_prime: there,
                ..PairFiles::default()
            },
        ];
        let learn = LearnJob {
            pairs: pairs.clone(),
            ..LearnJob::default()
        };
        let message = learn.open(&Device::flex()).unwrap_err().to_string();
        assert!(
            message.starts_with("2 of 4 pictures cannot be read:\n"),
            "{message}"
        );
        let analogy = AnalogyJob {
            target: TargetFile {
                b: path("b.png"),
                ..TargetFile::default()
            },
            pairs,
            ..AnalogyJob::default()
        };
        let error = analogy.open(&Device::flex()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.starts_with("3 of 5 pictures cannot be read:\n"),
            "{message}"
        );
        for name in ["gone.png: ", "text.png: not a picture", "b.png: "] {
            assert!(message.contains(name), "{message}");
        }
        assert_eq!(error.class(), crate::util::error::ErrorClass::Input);
    }

    fn silent(_: &Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn pair() -> Value {
        let [a, a_prime] = ["a", "a_prime"].map(|name| golden("learning").join(name));
        json!({
            "a": a.with_extension("png"), "a_prime": a_prime.with_extension("png"),
            "caption_a": "a house by day", "caption_a_prime": "a house by night",
        })
    }

    fn settings() -> Value {
        json!({
            "learn": { "steps": 2, "num_tokens": 2, "select_every": 0 },
            "generate": { "num_inference_steps": 3 },
        })
    }

    /// Learning in one request and applying in another gives the result of both in one.
    #[test]
    fn requests_in_json_are_answered() {
        let models = models();
        let folder = tempfile::tempdir().unwrap();
        let difference = folder.path().join("difference.safetensors");
        let target = json!({ "b": golden("learning").join("a.png"), "caption_b": "a barn" });
        let learn: LearnJob = read(json!({ "pairs": [pair()], "settings": settings() }));
        let learned = learn.answer(&models, &mut silent).unwrap();
        assert_eq!(learned.history.len(), 2);
        learned.tokens.save(&difference).unwrap();
        let apply: ApplyJob = read(json!({
            "difference": difference, "target": target, "settings": settings(),
        }));
        let applied = apply.answer(&models, &mut silent).unwrap();
        assert_eq!(applied.caption_b, "a barn");
        let both: AnalogyJob = read(json!({
            "pairs": [pair()], "target": target, "settings": settings(),
        }));
        let (_, solved) = both.answer(&models, &mut silent).unwrap();
        assert_eq!(solved.b_prime, applied.b_prime);

        let draw = |more: Value| {
            let mut request = json!({
                "settings": { "prompt": "a barn", "num_inference_steps": 3 },
            });
            let fields = request.as_object_mut().unwrap();
            fields.extend(more.as_object().unwrap().clone());
            let job: GenerateJob = read(request);
            job.answer(&models, &mut silent).unwrap()
        };
        let plain = draw(json!({}));
        assert_eq!(plain, draw(json!({})));
        assert_ne!(plain, draw(json!({ "difference": difference })));
    }

    /// A preview is reported after every step, with a pixel for every latent, and the picture stays the same.
    #[test]
    fn previews_change_nothing() {
        let models = models();
        let mut job: GenerateJob = read(json!({
            "settings": { "prompt": "a barn", "num_inference_steps": 5 },
        }));
        let plain = job.answer(&models, &mut silent).unwrap();
        job.settings.previews = true;
        let mut sizes = Vec::new();
        let mut observe = |progress: &Progress| {
            if let Progress::Preview { picture } = progress {
                sizes.push(picture.dimensions());
            }
            ControlFlow::Continue(())
        };
        assert_eq!(job.answer(&models, &mut observe).unwrap(), plain);
        let [_, _, h, w] = models.pipeline().latent_shape();
        assert_eq!(sizes, vec![(w as u32, h as u32); 5]);
    }

    #[test]
    fn what_is_wrong_with_a_request_is_told_before_a_model_is_needed() {
        let device = Device::flex();
        let message = |job: &LearnJob| job.open(&device).unwrap_err().to_string();
        let none: LearnJob = read(json!({ "pairs": [] }));
        assert_eq!(
            message(&none),
            "a pair of pictures is missing: a difference is learned from at least one pair (A, A′)"
        );
        let there = golden("learning/a.png");
        let gone: LearnJob = read(json!({ "pairs": [{ "a": "gone.png", "a_prime": there }] }));
        assert!(message(&gone).starts_with("gone.png: No such file"));
        let generate: GenerateJob = read(json!({ "difference": "gone.safetensors" }));
        let gone = generate.open(&device).unwrap_err().to_string();
        assert!(gone.starts_with("gone.safetensors: No such file"), "{gone}");
        let unknown = serde_json::from_value::<GenerateJob>(json!({ "prompt": "x" }));
        let unknown = unknown.unwrap_err().to_string();
        assert!(unknown.starts_with("unknown field `prompt`"), "{unknown}");
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        let mut job = GenerateJob::default();
        job.settings.strength = f64::NAN;
        let error = job.answer(&models(), &mut silent).unwrap_err();
        assert_eq!(
            error.to_string(),
            "setting `strength`: expected a number, found NaN"
        );
    }

    #[test]
    fn the_observer_stops_a_job() {
        let job: GenerateJob = read(json!({ "settings": { "num_inference_steps": 3 } }));
        let mut stop = |progress: &Progress| match progress {
            Progress::Step { done: 1, .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let stopped = job.answer(&models(), &mut stop);
        assert!(matches!(
            stopped,
            Err(Error::Stopped {
                stage: Stage::Generate,
                done: 1,
                total: 3,
                ..
            })
        ));
    }
}
