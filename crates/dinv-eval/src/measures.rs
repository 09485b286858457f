//! All metrics of one B′, with the networks that they need.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, FloatDType};
use difference_inversion::Result;
use difference_inversion::diffusion::joint_space::JointSpace;
use difference_inversion::diffusion::words::Prompt;
use difference_inversion::image::{ImagePreprocessor, fit, to_tensor};
use difference_inversion::models::vision::dinov2::Dinov2Model;
use difference_inversion::models::vision::lpips::Lpips;
use difference_inversion::util::digest::sha256;
use difference_inversion::util::tensors::host;
use difference_inversion::util::vector::cosine;
use difference_inversion::util::vector::unit;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::judge::{Judge, Judged};
use super::metrics::{
    derive, direction, edit_shown, mse, others_kept, rescaled, ssim, stage_distance,
};
use super::{Analogy, EvalModels};

/// The scores of one B′ by the name of the [`Metric`].
pub type Scores = BTreeMap<String, f64>;

/// Which direction of a metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Higher is better.
    Higher,
    /// Lower is better.
    Lower,
}

/// The question that a metric answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Is the change that A and A′ show made?
    Edit,
    /// Is everything else as it was in B?
    Preservation,
    /// Is B′ the true one?
    Truth,
    /// One of these, computed as in other work.
    Further,
}

/// A metric, as shown in tables.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name in files.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// Which direction is better.
    pub better: Better,
    /// The question that it answers.
    pub question: Question,
}

const fn metric(
    question: Question,
    better: Better,
    name: &'static str,
    title: &'static str,
) -> Metric {
    Metric {
        name,
        title,
        better,
        question,
    }
}

/// Every metric, in the order of the tables. Titles state what the judge stands in for.
pub const METRICS: &[Metric] = {
    use Better::{Higher, Lower};
    use Question::{Edit, Further, Preservation, Truth};
    &[
        metric(Edit, Higher, "edit", "edit shown (judge)"),
        metric(Edit, Higher, "clip_direction", "CLIP direction"),
        metric(Edit, Higher, "dino_direction", "DINO-v2 direction"),
        metric(
            Edit,
            Higher,
            "judge_direction",
            "judge direction (for DINO)",
        ),
        metric(Edit, Higher, "text_direction", "CLIP text direction"),
        metric(Preservation, Higher, "kept", "others kept (judge)"),
        metric(Preservation, Higher, "clip_i_b", "CLIP-I to B"),
        metric(Preservation, Lower, "lpips_b", "LPIPS to B"),
        metric(
            Preservation,
            Lower,
            "judge_distance_b",
            "judge distance to B (for LPIPS)",
        ),
        metric(Preservation, Higher, "ssim_b", "SSIM to B"),
        metric(Truth, Higher, "right", "all attributes right (judge)"),
        metric(Truth, Higher, "clip_i_truth", "CLIP-I to truth"),
        metric(Truth, Lower, "lpips_truth", "LPIPS to truth"),
        metric(
            Truth,
            Lower,
            "judge_distance_truth",
            "judge distance to truth (for LPIPS)",
        ),
        metric(Truth, Higher, "ssim_truth", "SSIM to truth"),
        metric(Truth, Lower, "mse_truth", "MSE to truth"),
        metric(
            Further,
            Higher,
            "clip_direction_raw",
            "CLIP direction, raw features",
        ),
        metric(
            Further,
            Higher,
            "dino_direction_raw",
            "DINO-v2 direction, raw features",
        ),
        metric(
            Further,
            Higher,
            "dino_direction_rescaled",
            "DINO-v2 direction, (1 + cos)/2",
        ),
        metric(
            Further,
            Higher,
            "judge_direction_raw",
            "judge direction, raw features",
        ),
        metric(
            Further,
            Higher,
            "judge_direction_rescaled",
            "judge direction, (1 + cos)/2",
        ),
    ]
};

/// Paths of the networks of metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasurePaths {
    /// CLIP: a transformers `CLIPModel` folder with its tokenizer and `preprocessor_config.json`. If there is none,
    /// the joint space of the text-to-image model's text encoder, of the first if there are two.
    pub clip: Option<PathBuf>,
    /// The judge of the demo world.
    pub judge: Option<PathBuf>,
    /// DINO-v2: a transformers `Dinov2Model` folder with its `preprocessor_config.json`.
    pub dino: Option<PathBuf>,
    /// LPIPS over VGG16: the `lpips` package's `state_dict()`, saved as safetensors.
    pub lpips: Option<PathBuf>,
}

/// The networks of all metrics.
#[derive(Debug)]
pub struct Measures {
    clip: Option<JointSpace>,
    /// CLIP's features of the last pictures, by the digest of their pixels: results of one analogy share all but B′.
    looked_at: Mutex<HashMap<String, Vec<f32>>>,
    judge: Option<Judge>,
    dino: Option<Dino>,
    lpips: Option<Lpips>,
}

/// DINO-v2 with its image processor.
#[derive(Debug)]
struct Dino {
    model: Dinov2Model,
    preprocessor: ImagePreprocessor,
    device: Device,
}

/// The networks of metrics, named like their fields of [`MeasurePaths`].
const NETWORKS: [&str; 4] = ["clip", "judge", "dino", "lpips"];

/// The one of [`NETWORKS`] that measures a metric, if any does.
pub(super) fn network_of(metric: &str) -> Option<&'static str> {
    match metric {
        "edit" | "kept" | "right" => Some("judge"),
        "text_direction" => Some("clip"),
        _ => (NETWORKS.into_iter()).find(|network| metric.starts_with(network)),
    }
}

/// The features of A, A′, B and B′ in one network.
type Features = [Vec<f32>; 4];

impl Measures {
    /// Opens the networks. There is no CLIP if none is given and the text-to-image model has none.
    ///
    /// # Errors
    /// If a file is invalid (the error names it), and [`Error::Missing`](difference_inversion::Error::Missing) if
    /// the text-to-image model should have a CLIP and its folder is missing.
    pub fn open(paths: &MeasurePaths, models: &EvalModels, device: &Device) -> Result<Self> {
        let clip = match &paths.clip {
            Some(folder) => Some(JointSpace::open(folder, device, FloatDType::F32)?),
            None => {
                // The rest of that model stays open only while a method uses it.
                let models = models.text_to_image()?;
                let has_clip = models.pipeline().family().has_joint_space();
                has_clip
                    .then(|| Ok(models.joints()?[0].clone()))
                    .transpose()?
            }
        };
        let judge = paths.judge.as_deref();
        let dino = paths.dino.as_deref();
        let lpips = paths.lpips.as_deref();
        Ok(Self {
            clip,
            looked_at: Mutex::default(),
            judge: judge.map(|path| Judge::open(path, device)).transpose()?,
            dino: dino.map(|path| Dino::open(path, device)).transpose()?,
            lpips: lpips.map(|path| Lpips::open(path, device)).transpose()?,
        })
    }

    /// The scores of a B′. B and the true B′ are fitted to its size. Metrics for which the suite lacks
    /// data or no network was given are omitted.
    ///
    /// # Errors
    /// [`Error::InvalidInput`](difference_inversion::Error::InvalidInput) if a preprocessor and its network do
    /// not match, or the picture is too small for a network.
    pub fn measure(&self, analogy: &Analogy, b_prime: &RgbImage) -> Result<Scores> {
        let analogy = &fitted(analogy, b_prime);
        let mut scores = Scores::new();
        self.measure_by_networks(&NETWORKS.into(), analogy, b_prime, &mut scores)?;
        let mut put = |name: &str, score: f64| {
            scores.insert(name.to_owned(), score);
        };
        if let Some(ssim) = ssim(&analogy.b, b_prime) {
            put("ssim_b", ssim);
        }
        if let Some(truth) = &analogy.b_prime {
            put("mse_truth", mse(truth, b_prime));
            if let Some(ssim) = ssim(truth, b_prime) {
                put("ssim_truth", ssim);
            }
        }
        Ok(scores)
    }

    /// The scores that `networks` measure, named like the fields of [`MeasurePaths`].
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn measure_by(
        &self,
        networks: &BTreeSet<&str>,
        analogy: &Analogy,
        b_prime: &RgbImage,
    ) -> Result<Scores> {
        let mut scores = Scores::new();
        let analogy = &fitted(analogy, b_prime);
        self.measure_by_networks(networks, analogy, b_prime, &mut scores)?;
        Ok(scores)
    }

    /// For an analogy already fitted to the B′.
    fn measure_by_networks(
        &self,
        networks: &BTreeSet<&str>,
        analogy: &Analogy,
        b_prime: &RgbImage,
        scores: &mut Scores,
    ) -> Result<()> {
        let pictures = [&analogy.a, &analogy.a_prime, &analogy.b, b_prime];
        let truth = analogy.b_prime.as_ref();
        if let Some(clip) = self.clip.as_ref().filter(|_| networks.contains("clip")) {
            self.measure_by_clip(clip, analogy, b_prime, scores)?;
        }
        if let Some(judge) = self.judge.as_ref().filter(|_| networks.contains("judge")) {
            let judged = pictures.map(|picture| judge.look(picture));
            let truth = truth.map(|truth| judge.look(truth));
            judged_scores(analogy, judged, truth.as_ref(), scores);
        }
        if let Some(dino) = self.dino.as_ref().filter(|_| networks.contains("dino")) {
            let [a, a_prime, b, made] = pictures.map(|picture| dino.look(picture));
            directions("dino", &[a?, a_prime?, b?, made?], scores);
        }
        if let Some(lpips) = self.lpips.as_ref().filter(|_| networks.contains("lpips")) {
            let others = [("lpips_b", Some(&analogy.b)), ("lpips_truth", truth)];
            for (name, other) in others {
                let Some(other) = other else { continue };
                scores.insert(name.to_owned(), lpips_distance(lpips, other, b_prime)?);
            }
        }
        Ok(())
    }

    fn measure_by_clip(
        &self,
        clip: &JointSpace,
        analogy: &Analogy,
        b_prime: &RgbImage,
        scores: &mut Scores,
    ) -> Result<()> {
        let look = |picture| self.look(clip, picture);
        let features = [
            look(&analogy.a)?,
            look(&analogy.a_prime)?,
            look(&analogy.b)?,
            look(b_prime)?,
        ];
        directions("clip", &features, scores);
        let [.., b, made] = &features;
        scores.insert("clip_i_b".to_owned(), cosine(b, made));
        if let Some(truth) = &analogy.b_prime {
            scores.insert("clip_i_truth".to_owned(), cosine(&look(truth)?, made));
        }
        if let Ok(captions) = analogy.captions_of_b() {
            let [before, after] = captions.map(|caption| text_features(clip, caption));
            let change = [&unit(b)[..], &unit(made)];
            let score = direction(change, [&before?, &after?]);
            scores.insert("text_direction".to_owned(), score);
        }
        Ok(())
    }

    /// CLIP's features of a picture.
    fn look(&self, clip: &JointSpace, image: &RgbImage) -> Result<Vec<f32>> {
        let mut kept = (self.looked_at.lock()).unwrap_or_else(PoisonError::into_inner);
        let key = format!("{} {}", image.width(), sha256(image.as_raw()));
        if let Some(features) = kept.get(&key) {
            return Ok(features.clone());
        }
        let features = host(clip.picture_features(image)?.cast(DType::F32));
        if kept.len() == KEPT {
            kept.clear();
        }
        kept.insert(key, features.clone());
        Ok(features)
    }
}

/// The most pictures whose features are kept.
const KEPT: usize = 64;

/// The analogy with B and the true B′ resized to the B′ that was made.
fn fitted(analogy: &Analogy, b_prime: &RgbImage) -> Analogy {
    let fitted = |image: &RgbImage| fit(image, b_prime.width(), b_prime.height());
    Analogy {
        b: fitted(&analogy.b),
        b_prime: analogy.b_prime.as_ref().map(fitted),
        ..analogy.clone()
    }
}

impl Dino {
    fn open(folder: &Path, device: &Device) -> Result<Self> {
        Ok(Self {
            model: Dinov2Model::open(folder, device, FloatDType::F32)?,
            preprocessor: ImagePreprocessor::open(folder)?,
            device: device.clone(),
        })
    }

    /// The class token's features of a picture.
    fn look(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let pixels = self.preprocessor.apply(image, &self.device);
        Ok(host(self.model.pooled(pixels)?))
    }
}

/// LPIPS (see [`stage_distance`]) of two pictures of the same size.
fn lpips_distance(lpips: &Lpips, one: &RgbImage, other: &RgbImage) -> Result<f64> {
    let features = |image: &RgbImage| {
        let size = [image.height(), image.width()];
        lpips.features(to_tensor(image, size, lpips.device()))
    };
    let stages = features(one)?.into_iter().zip(features(other)?);
    let distances = stages
        .zip(lpips.channel_weights())
        .map(|((one, other), weights)| {
            stage_distance(&host(one), &host(other), weights.len(), Some(weights))
        });
    Ok(distances.sum())
}

fn text_features(joint: &JointSpace, text: &str) -> Result<Vec<f32>> {
    joint.text_features(&Prompt::new(text, &[joint.text_encoder().tokenizer()])?)
}

/// The directional similarity of (A, A′) and (B, B′) in one network.
fn directions(network: &str, features: &Features, scores: &mut Scores) {
    let of = |[a, a_prime, b, b_prime]: &Features| direction([a, a_prime], [b, b_prime]);
    let units = features.each_ref().map(|features| unit(features));
    let cosine = of(&units);
    scores.insert(format!("{network}_direction"), cosine);
    scores.insert(format!("{network}_direction_raw"), of(features));
    if network != "clip" {
        scores.insert(format!("{network}_direction_rescaled"), rescaled(cosine));
    }
}

/// The judge's scores for A, A′, B and B′.
fn judged_scores(
    analogy: &Analogy,
    [a, a_prime, b, b_prime]: [Judged; 4],
    truth: Option<&Judged>,
    scores: &mut Scores,
) {
    let distance = |other: &Judged| -> f64 {
        let stages = b_prime.stages.iter().zip(&other.stages);
        stages
            .map(|((made, channels), (other, _))| stage_distance(made, other, *channels, None))
            .sum()
    };
    scores.insert("judge_distance_b".to_owned(), distance(&b));
    if let Some(truth) = truth {
        scores.insert("judge_distance_truth".to_owned(), distance(truth));
    }
    if let Some(told) = &analogy.attributes {
        let shown = &b_prime.attributes;
        let shares = [
            ("edit", edit_shown(&told.b, &told.b_prime, shown)),
            ("kept", others_kept(&told.b, &told.b_prime, shown)),
        ];
        let known = shares
            .into_iter()
            .filter_map(|(name, share)| Some((name.to_owned(), share?)));
        scores.extend(known);
        derive(scores);
    }
    let features = [a, a_prime, b, b_prime].map(|judged| judged.features);
    directions("judge", &features, scores);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::{analogy, eval_models, eval_models_without_clip, golden};

    #[test]
    fn every_metric_of_a_network_is_told_from_those_of_others() {
        let of = |network| {
            let names = METRICS.iter().map(|metric| metric.name);
            names.filter(|name| network_of(name) == network).count()
        };
        let networks = ["clip", "judge", "dino", "lpips"].map(Some);
        assert_eq!(networks.map(of), [5, 8, 3, 2]);
        assert_eq!(of(None), 3);
        assert_eq!(network_of("right"), Some("judge"));
    }

    #[test]
    fn a_clip_beside_the_model_measures_like_the_model_s_own() {
        let (with, without, analogy) = (eval_models(), eval_models_without_clip(), analogy());
        let made = &analogy.a;
        let scores = |clip: Option<&str>, models| {
            let paths = MeasurePaths {
                clip: clip.map(golden),
                ..MeasurePaths::default()
            };
            let measures = Measures::open(&paths, models, &Device::flex())?;
            measures.measure(&analogy, made)
        };
        let own = scores(None, &with).unwrap();
        let of_clip = |(name, _): &(&String, &f64)| network_of(name) == Some("clip");
        assert!(own.iter().any(|score| of_clip(&score)));
        assert_eq!(scores(Some("learning/clip"), &without).unwrap(), own);
        let none = scores(None, &without).unwrap();
        assert!(own.iter().filter(|score| !of_clip(score)).eq(&none));
        let missing = scores(Some("learning/no-clip"), &without).unwrap_err();
        assert!(missing.to_string().contains("no-clip"), "{missing}");
    }

    #[test]
    fn all_networks_see_b_and_the_truth_in_the_size_of_what_was_made() {
        let paths = MeasurePaths {
            dino: Some(golden("dinov2/mlp")),
            lpips: Some(golden("lpips/model.safetensors")),
            ..MeasurePaths::default()
        };
        let measures = Measures::open(&paths, &eval_models(), &Device::flex()).unwrap();
        let small = analogy();
        let wide = fit(&small.b, 200, 96);
        let wide = Analogy {
            b: wide.clone(),
            b_prime: Some(wide),
            ..small
        };
        // The output of a method that changes nothing.
        let made = fit(&wide.b, 40, 40);
        let scores = measures.measure(&wide, &made).unwrap();
        for metric in ["clip_direction", "dino_direction", "lpips_b", "lpips_truth"] {
            assert_eq!(scores[metric], 0.0, "{metric}");
        }
        for metric in ["clip_i_b", "clip_i_truth"] {
            assert!((scores[metric] - 1.0).abs() < 1e-9, "{metric}");
        }
    }
}
