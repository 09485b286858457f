//! The parts of a first run: each opens what it needs, and notes what it finds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use difference_inversion::Error;
use difference_inversion::diffusion::draw::TextToImage;
use difference_inversion::diffusion::frozen::{ModelPaths, Models};
use difference_inversion::diffusion::sample::Noising;
use difference_inversion::diffusion::words::{FullPrompt, Prompt};
use difference_inversion::hub::model_of;
use difference_inversion::image::{RgbImage, fit, load_image, save_png};
use difference_inversion::job::{ApplyJob, GenerateJob, Job, LearnJob, PairFiles, TargetFile};
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::learn::Records;
use difference_inversion::util::digest::sha256_of_file;
use difference_inversion::util::vector::cosine;
use dinv_eval::metrics::mse;
use dinv_eval::suite::Entry;
use dinv_eval::{Analogy, EvalModelPaths, EvalModels, METRICS, MeasurePaths, Measures, Question};
use serde_json::json;

use super::facts::{self, Facts};
use super::photos::Photos;
use super::report::{Check, FileFound, Found, Score, Shown, Strip};
use crate::cli::apply;
use crate::cli::checkpoint;
use crate::cli::flags::ModelSettings;
use crate::cli::models::check::{self, Checker};
use crate::cli::plot;
use crate::cli::record::{self, Recipe, text_of};
use crate::cli::terminal::Failure;
use crate::cli::watch::Watcher;

/// A step of learning has two rows, and its backward pass costs about two forward passes.
const CALLS_OF_LEARNING: f64 = 6.0;
/// Calls of the denoiser for a step of drawing B′: one to invert, two to draw.
const CALLS_OF_APPLYING: f64 = 3.0;
/// Evaluations of the text encoder in a step on the CLIP loss, with its backward pass.
const CALLS_OF_CLIP: f64 = 12.0;
/// Where learned differences are.
pub(super) const LEARNED: &str = "learned";
/// Where pictures are.
pub(super) const PICTURES: &str = "pictures";
/// The smallest share of captions that a CLIP should find.
const LEAST_FOUND: f64 = 0.8;

/// One part of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Files,
    Networks,
    Tokenizer,
    Autoencoder,
    Captions,
    Drawing,
    Speed,
    Learn(String),
    Apply(String),
}

impl Step {
    /// All parts for these kinds of edits, in their order.
    pub(super) fn all(kinds: &[&str]) -> Vec<Self> {
        let first = [
            Self::Files,
            Self::Networks,
            Self::Tokenizer,
            Self::Autoencoder,
            Self::Captions,
            Self::Drawing,
            Self::Speed,
        ];
        let edits = kinds.iter().map(|kind| (*kind).to_owned());
        let edits = edits.flat_map(|kind| [Self::Learn(kind.clone()), Self::Apply(kind)]);
        first.into_iter().chain(edits).collect()
    }

    /// Its name in the report.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Files => "files".to_owned(),
            Self::Networks => "networks".to_owned(),
            Self::Tokenizer => "tokenizer".to_owned(),
            Self::Autoencoder => "autoencoder".to_owned(),
            Self::Captions => "captions".to_owned(),
            Self::Drawing => "drawing".to_owned(),
            Self::Speed => "speed".to_owned(),
            Self::Learn(kind) => format!("learn-{kind}"),
            Self::Apply(kind) => format!("apply-{kind}"),
        }
    }

    /// Its title for people.
    pub(super) fn title(&self) -> String {
        match self {
            Self::Files => "The model's files".to_owned(),
            Self::Networks => "Every network computes".to_owned(),
            Self::Tokenizer => "Words become the right numbers".to_owned(),
            Self::Autoencoder => "Photographs survive the autoencoder".to_owned(),
            Self::Captions => "CLIP tells the photographs apart".to_owned(),
            Self::Drawing => "A picture from words".to_owned(),
            Self::Speed => "Speed".to_owned(),
            Self::Learn(kind) => format!("Learning {kind}"),
            Self::Apply(kind) => format!("Applying {kind}"),
        }
    }
}

/// What all parts share.
pub(super) struct Trial<'a> {
    pub(super) folder: &'a Path,
    pub(super) photos: &'a Photos,
    pub(super) settings: &'a ModelSettings,
    pub(super) paths: &'a ModelPaths,
    pub(super) config: AnalogyConfig,
    pub(super) drawing: TextToImage,
    pub(super) measures: MeasurePaths,
    pub(super) facts: Option<&'static Facts>,
    pub(super) recipe: Recipe,
    /// The estimated seconds of learning and applying everything.
    pub(super) estimate: Option<f64>,
    /// The models, once a part needed them.
    pub(super) open: Option<(EvalModels, Arc<Models>)>,
    /// The networks of metrics, once a part needed them.
    pub(super) opened_measures: Option<Measures>,
}

impl Trial<'_> {
    /// Does one part.
    pub(super) fn work(
        &mut self,
        step: &Step,
        found: &mut Found,
        watcher: &mut Watcher,
    ) -> anyhow::Result<()> {
        match step {
            Step::Files => self.files(found),
            Step::Networks => self.networks(found),
            Step::Tokenizer => self.tokenizer(found),
            Step::Autoencoder => self.autoencoder(found),
            Step::Captions => self.captions(found),
            Step::Drawing => self.draw(found, watcher),
            Step::Speed => self.speed(found, watcher),
            Step::Learn(kind) => self.learn(kind, found, watcher),
            Step::Apply(kind) => self.apply(kind, found, watcher),
        }
    }

    /// The models, opened on first use.
    fn models(&mut self) -> anyhow::Result<Arc<Models>> {
        if let Some((_, models)) = &self.open {
            return Ok(models.clone());
        }
        let paths = EvalModelPaths {
            text_to_image: self.paths.clone(),
            ..EvalModelPaths::default()
        };
        let models = EvalModels::new(
            paths,
            self.config.clone(),
            &self.settings.device()?,
            self.settings.dtype()?,
        );
        let opened = models.text_to_image()?;
        self.open = Some((models, opened.clone()));
        Ok(opened)
    }

    /// Sizes and digests.
    fn files(&self, found: &mut Found) -> anyhow::Result<()> {
        for (part, path) in record::weight_files(self.paths)? {
            let bytes = fs::metadata(&path).map_err(Error::io(&path))?.len();
            let sha256 = sha256_of_file(&path)?;
            let blob = path.canonicalize().unwrap_or_else(|_| path.clone());
            let blob = blob
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            // The Hub's cache names a file of weights by its digest.
            let known = blob.filter(|name| {
                name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
            if let Some(known) = known {
                let ok = known == sha256;
                let check = Check::shown(format!("{part}: SHA-256"), sha256.as_str());
                found.checks.push(check.against(known, ok, "the Hub"));
            }
            found.files.push(FileFound {
                part,
                path: text_of(&path),
                bytes,
                sha256,
            });
        }
        Ok(())
    }

    /// `dinv models check`, and the numbers of parameters.
    fn networks(&self, found: &mut Found) -> anyhow::Result<()> {
        let checker = Checker {
            device: self.settings.device()?,
            dtype: self.settings.dtype()?,
            silent: true,
        };
        let mut checks = checker.all(self.paths)?;
        for folder in self.paths.clip_folders() {
            if folder.is_dir() && !folder.starts_with(&self.paths.model) {
                checks.extend(checker.joint_space(&folder)?);
            }
        }
        let mut failures = Vec::new();
        for check::Check {
            part,
            outcome,
            seconds,
            parameters,
        } in checks
        {
            match outcome {
                Ok(outcome) => {
                    let text = format!("{outcome} ({seconds:.2} s)");
                    found.checks.push(Check::shown(part, text));
                }
                Err(reason) => failures.push(format!("{part}: {reason}")),
            }
            if let Some(parameters) = parameters {
                found
                    .checks
                    .push(Facts::parameters(self.facts, part, parameters));
            }
        }
        match failures.is_empty() {
            true => Ok(()),
            false => Err(Failure::new(failures.join("; "))
                .hint("`dinv models pull` downloads what is missing of a model of the Hub")
                .into()),
        }
    }

    /// The ids of known sentences, and the schedule.
    fn tokenizer(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let models = self.models()?;
        let pipeline = models.pipeline();
        let encoders = pipeline.text_encoders();
        for (number, encoder) in encoders.iter().enumerate() {
            let is_clip = encoder.tokenizer().base_vocab_size() >= facts::CLIP_ENTRIES
                && encoder.frame().before == [facts::CLIP_FRAME[0]];
            let name = match encoders.len() {
                1 => String::new(),
                _ => format!("text encoder {}: ", number + 1),
            };
            for (sentence, expected) in facts::SENTENCES {
                let ids = pipeline.prompt(sentence)?.ids(number);
                let check = Check::shown(format!("{name}“{sentence}”"), ids.clone());
                found.checks.push(match is_clip {
                    true => check.against(expected, ids == expected, facts::TOKENIZER),
                    false => check,
                });
            }
        }
        if let Noising::Discrete(schedule) = pipeline.noising() {
            found
                .checks
                .extend(Facts::alphas(self.facts, schedule.alphas_cumprod()));
        }
        Ok(())
    }

    /// Photographs encoded and decoded.
    fn autoencoder(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let models = self.models()?;
        let pipeline = models.pipeline();
        let [height, width] = pipeline.resolution();
        let mut sum = 0.0;
        let mut worst: Option<(f64, &str, RgbImage)> = None;
        for (name, path, _) in &self.photos.plain {
            let photo = fit(&load_image(path)?, width, height);
            let back = pipeline.decode(pipeline.encode_image(&photo))?;
            let decibels = -10.0 * mse(&photo, &back).max(1e-10).log10();
            sum += decibels;
            if worst.as_ref().is_none_or(|(least, ..)| decibels < *least) {
                worst = Some((decibels, name, back));
            }
        }
        let count = self.photos.plain.len();
        let mean = sum / count as f64;
        let what = format!("mean peak signal-to-noise ratio of {count} photographs, in dB");
        let check = Check::shown(what, (mean * 100.0).round() / 100.0);
        let is_known = self.facts.is_some() && height.min(width) >= facts::LEAST_SIDE;
        found.checks.push(match is_known {
            true => {
                let expected = format!("at least {}", facts::LEAST_PSNR);
                check.against(expected, mean >= facts::LEAST_PSNR, facts::AUTOENCODER)
            }
            false => check,
        });
        if let Some((decibels, name, back)) = worst {
            let file = self.save("autoencoder.png", &back)?;
            found.strips.push(Strip {
                title: format!("The worst of them: {name}, {decibels:.1} dB"),
                pictures: vec![
                    self.photos.shown("as it is", self.photos.plain_of(name)),
                    Shown::made("encoded and decoded", file),
                ],
                scores: Vec::new(),
            });
        }
        Ok(())
    }

    /// Which caption CLIP finds for each photograph.
    fn captions(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let models = self.models()?;
        let joint = &models.joints()?[0];
        let tokenizer = joint.text_encoder().tokenizer();
        let texts = self
            .photos
            .plain
            .iter()
            .map(|(_, _, caption)| joint.text_features(&Prompt::new(caption, &[tokenizer])?));
        let texts = texts.collect::<Result<Vec<_>, Error>>()?;
        let mut right = 0;
        for (place, (name, path, _)) in self.photos.plain.iter().enumerate() {
            let picture = joint.image_features(&load_image(path)?)?;
            let nearest = nearest(&picture, &texts);
            right += usize::from(nearest == place);
            if nearest != place {
                let taken = &self.photos.plain[nearest].2;
                let taken = Check::shown(format!("{name} is taken for"), taken.as_str());
                found.checks.push(taken);
            }
        }
        let count = self.photos.plain.len();
        let check = Check::shown(format!("captions found, of {count}"), right);
        found.checks.insert(
            0,
            match self.facts {
                Some(_) => {
                    let ok = right as f64 >= LEAST_FOUND * count as f64;
                    check.against("all, or nearly all", ok, facts::CAPTIONS)
                }
                None => check,
            },
        );
        Ok(())
    }

    /// A picture from words, and pixels that are known of one model.
    fn draw(&mut self, found: &mut Found, watcher: &mut Watcher) -> anyhow::Result<()> {
        let models = self.models()?;
        let pipeline = models.pipeline();
        let mut pictures = Vec::new();
        if pipeline.family().class == "StableDiffusionPipeline"
            && pipeline.latent_shape() == [1, 4, 64, 64]
        {
            let job = GenerateJob {
                settings: TextToImage {
                    prompt: facts::ASTRONAUT.to_owned(),
                    num_inference_steps: 3,
                    guidance_scale: Some(7.5),
                    scheduler: Some("ddim".to_owned()),
                    ..TextToImage::default()
                },
                init_latents: Some(self.photos.noise()),
                ..GenerateJob::default()
            };
            let picture = job.answer(&models, &mut |progress| watcher.observe(progress))?;
            found.checks.push(self.last_pixels(&picture));
            let file = self.save("three-steps.png", &picture)?;
            pictures.push(Shown::made("three steps of DDIM from known noise", file));
        }
        let job = GenerateJob {
            settings: TextToImage {
                prompt: facts::ASTRONAUT.to_owned(),
                ..self.drawing.clone()
            },
            ..GenerateJob::default()
        };
        let picture = job.answer(&models, &mut |progress| watcher.observe(progress))?;
        let file = self.save("drawn.png", &picture)?;
        let label = format!("{} steps", self.drawing.num_inference_steps);
        pictures.push(Shown::made(&label, file));
        found.strips.push(Strip {
            title: format!("“{}”", facts::ASTRONAUT),
            pictures,
            scores: Vec::new(),
        });
        Ok(())
    }

    /// The lower right pixels of the picture that diffusers' tests draw, too.
    fn last_pixels(&self, picture: &RgbImage) -> Check {
        let (width, height) = picture.dimensions();
        let places = (height - 3..height).flat_map(|y| (width - 3..width).map(move |x| (x, y)));
        let found: Vec<f64> = places
            .map(|(x, y)| f64::from(picture.get_pixel(x, y)[2]) / 255.0)
            .collect();
        let near = found.iter().zip(facts::LAST_PIXELS);
        let near = near.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max) <= facts::PIXEL_TOLERANCE;
        let what = "the lower right 3 × 3 pixels, blue, from 0 to 1";
        let check = Check::shown(what, facts::rounded(&found, 5));
        let id = model_of(&self.paths.model)
            .map(|id| id.to_string())
            .unwrap_or_default();
        match id.split('@').next() == Some(facts::PIXELS_OF) {
            true => check.against(json!(facts::LAST_PIXELS), near, facts::PIXELS),
            false => check,
        }
    }

    /// The time of one call, from which the rest is estimated.
    fn speed(&mut self, found: &mut Found, watcher: &mut Watcher) -> anyhow::Result<()> {
        let models = self.models()?;
        let pipeline = models.pipeline();
        let device = self.settings.device()?;
        let words = pipeline.read(&pipeline.prompt(facts::ASTRONAUT)?, 0)?;
        let encode = || pipeline.encode_prompts(&[FullPrompt::plain(&words)]);
        let conditions = encode()?;
        let latents = || check::latents(pipeline.latent_shape(), &device);
        let predict = || {
            let prediction = pipeline.predict(latents(), &[check::TIMESTEP], &conditions);
            check::finite("prediction", prediction)
        };
        predict()?; // compiles kernels
        let started = Instant::now();
        predict()?;
        let call = started.elapsed().as_secs_f64();
        let started = Instant::now();
        check::finite("hidden states", encode()?.context)?;
        let encoding = started.elapsed().as_secs_f64();
        let seconds = |value: f64| (value * 1e4).round() / 1e4;
        let [height, width] = pipeline.resolution();
        let what = format!("one call of the denoiser at {width} × {height} pixels, in seconds");
        found.checks.push(Check::shown(what, seconds(call)));
        let what = "one call of the text encoders, in seconds";
        found.checks.push(Check::shown(what, seconds(encoding)));
        let estimate = self.estimated(call, encoding);
        let what = "estimated time of learning and applying three differences, in minutes";
        found
            .checks
            .push(Check::shown(what, (estimate / 6.0).round() / 10.0));
        self.estimate = Some(estimate);
        watcher.say(&format!(
            "learning and applying three differences takes about {}, estimated from one call of the denoiser",
            duration(estimate)
        ));
        Ok(())
    }

    /// Seconds of learning and applying everything, from those of a call of the denoiser and of the text encoders.
    fn estimated(&self, call: f64, encoding: f64) -> f64 {
        let learn = &self.config.learn;
        let kinds = self.photos.edits.len() as f64;
        let drawn: usize = (self.photos.edits.iter())
            .map(|(_, entries)| 2 * entries.len())
            .sum();
        let of_learning = learn.steps as f64 * CALLS_OF_LEARNING * call
            + (learn.steps + learn.clip_first) as f64 * CALLS_OF_CLIP * encoding;
        let of_drawing = self.config.generate.num_inference_steps as f64 * CALLS_OF_APPLYING * call;
        kinds * of_learning + drawn as f64 * of_drawing
    }

    /// Learns a difference, or continues from a checkpoint.
    fn learn(
        &mut self,
        kind: &str,
        found: &mut Found,
        watcher: &mut Watcher,
    ) -> anyhow::Result<()> {
        let models = self.models()?;
        let entry = &self.photos.of(kind)[0];
        let [a, a_prime, _] = &entry.pictures;
        let captions = entry.captions.clone().unwrap_or_default();
        let difference = self.difference(kind)?;
        let checkpoint = checkpoint::beside(&difference);
        let job = LearnJob {
            pairs: vec![PairFiles {
                a: a.clone(),
                a_prime: a_prime.clone(),
                caption_a: captions.a,
                caption_a_prime: captions.a_prime,
            }],
            settings: self.config.clone(),
            records: Records {
                resume: checkpoint.is_file().then(|| checkpoint.clone()),
                checkpoint: Some(checkpoint.clone()),
                ..Records::default()
            },
        };
        let learned = job.answer(&models, &mut |progress| watcher.observe(progress))?;
        learned.tokens.save(&difference)?;
        let _ = fs::remove_file(&checkpoint); // it is spent
        let plot = plot::draw(&plot::of_learning(&learned.history, learned.best_step))?;
        let file = self.save(&format!("{kind}-loss.png"), &plot)?;
        found.losses = learned.history.iter().map(|terms| terms.total).collect();
        if let (Some(first), Some(last)) = (learned.history.first(), learned.history.last()) {
            found
                .checks
                .push(Check::shown("loss of the first step", first.total));
            found
                .checks
                .push(Check::shown("loss of the last step", last.total));
        }
        found
            .checks
            .push(Check::shown("kept from step", learned.best_step));
        found.strips.push(Strip {
            title: "What is learned from".to_owned(),
            pictures: vec![
                self.photos.shown("A", a),
                self.photos.shown("A′", a_prime),
                Shown::made("the loss", file),
            ],
            scores: Vec::new(),
        });
        Ok(())
    }

    /// Applies a difference to two photographs, and undoes it on their true B′.
    fn apply(
        &mut self,
        kind: &str,
        found: &mut Found,
        watcher: &mut Watcher,
    ) -> anyhow::Result<()> {
        let difference = self.difference(kind)?;
        if !difference.is_file() {
            let failure = Failure::new("there is no difference to apply");
            return Err(failure.hint(format!("see “Learning {kind}”")).into());
        }
        for entry in self.photos.of(kind) {
            let analogy = entry.read()?;
            for reverse in [false, true] {
                found
                    .strips
                    .push(self.applied(entry, &analogy, reverse, watcher)?);
            }
        }
        Ok(())
    }

    /// B′ of an analogy, or B of its true B′.
    fn applied(
        &mut self,
        entry: &Entry,
        analogy: &Analogy,
        reverse: bool,
        watcher: &mut Watcher,
    ) -> anyhow::Result<Strip> {
        let models = self.models()?;
        let analogy = match reverse {
            true => reversed(analogy),
            false => analogy.clone(),
        };
        let truth = entry.b_prime.as_ref().unwrap_or(&entry.pictures[2]);
        let (from, to) = match reverse {
            true => (truth, &entry.pictures[2]),
            false => (&entry.pictures[2], truth),
        };
        let mut settings = self.config.clone();
        settings.generate.reverse = reverse;
        let captions = analogy.captions.clone().unwrap_or_default();
        let job = ApplyJob {
            difference: self.difference(&entry.kind)?,
            target: TargetFile {
                b: from.clone(),
                caption_b: captions.b,
            },
            settings,
        };
        let applied = job.answer(&models, &mut |progress| watcher.observe(progress))?;
        let way = if reverse { "undone" } else { "done" };
        let name = format!("{}-{way}.png", entry.name);
        apply::write(&applied, from, self.recipe.clone(), &self.picture(&name)?)?;
        let [before, after, made] = match reverse {
            true => ["true B′", "B", "undone"],
            false => ["B", "true B′", "made B′"],
        };
        let verb = if reverse { "Undone on" } else { "Applied to" };
        Ok(Strip {
            title: format!("{verb} “{}”", applied.caption_b),
            pictures: vec![
                self.photos.shown(before, from),
                self.photos.shown(after, to),
                Shown::made(made, format!("{PICTURES}/{name}")),
            ],
            scores: self.scores(&analogy, &applied.b_prime, watcher),
        })
    }

    /// The metrics that hold a picture against the truth, each also of the picture unchanged. Without a joint space
    /// there are none.
    fn scores(&mut self, analogy: &Analogy, made: &RgbImage, watcher: &mut Watcher) -> Vec<Score> {
        let scores = (self.measures()).and_then(|measures| {
            let of_made = measures.measure(analogy, made)?;
            let unchanged = fit(&analogy.b, made.width(), made.height());
            Ok((of_made, measures.measure(analogy, &unchanged)?))
        });
        let (of_made, unchanged) = match scores {
            Ok(scores) => scores,
            Err(error) => {
                watcher.notice(&format!("not measured: {error:#}"));
                return Vec::new();
            }
        };
        let is_shown = |question| matches!(question, Question::Truth | Question::Edit);
        let metrics = METRICS.iter().filter(|metric| is_shown(metric.question));
        let scores = metrics.filter_map(|metric| {
            Some(Score {
                metric: metric.name.to_owned(),
                title: metric.title.to_owned(),
                higher_is_better: metric.better == dinv_eval::Better::Higher,
                made: *of_made.get(metric.name)?,
                unchanged: unchanged.get(metric.name).copied(),
            })
        });
        scores.collect()
    }

    fn measures(&mut self) -> anyhow::Result<&Measures> {
        self.models()?;
        if self.opened_measures.is_none() {
            let Some((models, _)) = &self.open else {
                anyhow::bail!("the models are not open");
            };
            let device = self.settings.device()?;
            self.opened_measures = Some(Measures::open(&self.measures, models, &device)?);
        }
        (self.opened_measures.as_ref()).ok_or_else(|| anyhow::anyhow!("no metrics"))
    }

    /// The file of a learned difference.
    fn difference(&self, kind: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(LEARNED);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(folder.join(format!("{kind}.safetensors")))
    }

    /// The path of a picture.
    fn picture(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(PICTURES);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(folder.join(name))
    }

    /// Saves a picture with the run's recipe; returns its path in the folder of the run.
    fn save(&self, name: &str, picture: &RgbImage) -> anyhow::Result<String> {
        let recipe = self.recipe.to_line()?;
        let text = [
            ("Software", self.recipe.program.as_str()),
            ("dinv", &recipe),
        ];
        save_png(&self.picture(name)?, picture, &text)?;
        Ok(format!("{PICTURES}/{name}"))
    }
}

/// The analogy backwards: from the true B′ to B.
fn reversed(analogy: &Analogy) -> Analogy {
    let forwards = analogy.captions.clone().unwrap_or_default();
    Analogy {
        a: analogy.a_prime.clone(),
        a_prime: analogy.a.clone(),
        b: analogy.b_prime.clone().unwrap_or_else(|| analogy.b.clone()),
        b_prime: Some(analogy.b.clone()),
        captions: Some(dinv_eval::Captions {
            a: forwards.a_prime,
            a_prime: forwards.a,
            b: forwards.b_prime,
            b_prime: forwards.b,
        }),
        ..analogy.clone()
    }
}

/// The place of the features that are most like a picture's.
fn nearest(picture: &[f32], texts: &[Vec<f32>]) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (place, text) in texts.iter().enumerate() {
        let like = cosine(picture, text);
        if like > best.1 {
            best = (place, like);
        }
    }
    best.0
}

/// A time for people.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        _ if seconds < 90.0 => format!("{seconds:.0} seconds"),
        _ if seconds < 5400.0 => format!("{:.0} minutes", seconds / 60.0),
        _ => format!("{:.1} hours", seconds / 3600.0),
    }
}

/// Stage times by name.
pub(super) fn by_name(times: crate::cli::watch::StageTimes) -> BTreeMap<String, f64> {
    let times = times.into_iter();
    times
        .map(|(stage, time)| (stage.to_string(), record::in_seconds(time)))
        .collect()
}

/// Whether the pipeline's class and width make it one of which something is known.
pub(super) fn facts_of(paths: &ModelPaths) -> Option<&'static Facts> {
    let files = paths.files().ok()?;
    let family = difference_inversion::diffusion::family::Family::of(&files).ok()?;
    let config: serde_json::Value = files.config(family.text_encoders.first()?.part).ok()?;
    Facts::of(family.class, config.get("hidden_size")?.as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_put_for_people() {
        assert_eq!(duration(42.3), "42 seconds");
        assert_eq!(duration(600.0), "10 minutes");
        assert_eq!(duration(9000.0), "2.5 hours");
    }

    #[test]
    fn the_nearest_text_is_found() {
        let texts = [vec![0.0, 1.0], vec![0.6, 0.8], vec![1.0, 0.0]];
        assert_eq!(nearest(&[1.0, 0.1], &texts), 2);
        assert_eq!(nearest(&[0.5, 0.8], &texts), 1);
    }
}
