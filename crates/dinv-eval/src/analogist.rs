//! Analogist: B′ as the missing picture of a grid, filled in by an inpainting model.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Int, Tensor, activation};
use difference_inversion::diffusion::family;
use difference_inversion::diffusion::frozen::Models;
use difference_inversion::diffusion::guide;
use difference_inversion::diffusion::guide::Guide;
use difference_inversion::diffusion::pipeline::Pipeline;
use difference_inversion::diffusion::sample::Ddim;
use difference_inversion::diffusion::words::FullPrompt;
use difference_inversion::image::{Filter, fit, resize};
use difference_inversion::method::generate_config::GenerateConfig;
use difference_inversion::method::regenerate;
use difference_inversion::models::denoiser::attention_control::{
    AttentionControl, AttentionKind, AttentionPlace,
};
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::progress::{self, Observer, Stage};
use difference_inversion::util::settings::Checks;
use difference_inversion::{Error, Result};
use image::{Rgb, RgbImage, imageops};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::settings::{recorded, with_settings};
use super::{Analogy, Captions, EvalModels, Method, Told};

/// Transformer blocks of Stable Diffusion 1, by which layers are numbered.
const LAYERS: usize = 16;

/// Analogist (Gu et al. 2024, [arXiv 2405.10316](https://arxiv.org/abs/2405.10316)). It sees A, A′ and B.
///
/// A and A′ stand above B and a copy of B; the copy's cell is drawn again. In some layers, the
/// self-attention scores between A′ and B′ are replaced, in both directions, by those between A and B,
/// times a scale (self-attention cloning). In some layers, only B′ reads the prompt in cross-attention
/// (cross-attention masking).
///
/// **From the paper**: the grid, cloning, masking, GPT-4V as the author of the prompt.
/// **From its code**: the copy of B, the layers, cloning of scores before the softmax and in every
/// step, strength, guidance, the words after the prompt, the negative prompt, 50 DDIM steps.
/// **Our reading**: its code shows GPT-4V the three pictures and asks for at most five words about B′.
/// Here, the prompt is the first five words of A′'s caption that are not in A's, or the first five of
/// all of them if none is new. The captions are the captioner's, so the method is given nothing more.
/// The pictures touch each other; its code leaves a line of two pixels between cells of 256. The latents of B′'s cell are
/// decoded alone, since an autoencoder may know pictures of one size only; its code decodes the grid. B′ is
/// enlarged to the size of the model's pictures. Layers are numbered among Stable Diffusion 1's 16
/// transformer blocks and scaled to the model's number of blocks (3 to 10 of 16 are 1 to 4 of 7). One
/// B′ is made; its code makes eight.
///
/// The grid to tune on validation: `quality` and `negative_prompt` both at their defaults, both empty ×
/// `guidance_scale` 3, 7.5, 15; then, with the best of these, `strength` .8, .98 × `scale` 1, 1.3. Extend
/// the grid where the best lies at an edge. (Words that a model's text encoder was not trained on lead
/// it astray, as the defaults do on the demo model.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AnalogistConfig {
    /// Height and width of the grid in pixels; defaults to those of the model's pictures.
    pub resolution: Option<u32>,
    /// How much noise is added to B's copy, 0 to 1.
    pub strength: f64,
    /// Strength of guidance by the prompt.
    pub guidance_scale: f64,
    /// Steps of the sampling schedule.
    pub num_inference_steps: usize,
    /// Factor of cloned scores.
    pub scale: f64,
    /// The layers whose scores are cloned, among 16: the first, and one past the last.
    pub clone_layers: [usize; 2],
    /// The layers in which only B′ reads the prompt, among 16: the first, and one past the last.
    pub mask_layers: [usize; 2],
    /// The source of the captions of A and A′ that make the prompt.
    pub prompt: Captioned,
    /// The largest number of words in the prompt.
    pub words: usize,
    /// Words appended to the prompt.
    pub quality: String,
    /// The negative prompt.
    pub negative_prompt: String,
}

/// Who describes A and A′.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Captioned {
    /// The captioner next to the model.
    #[default]
    Captioner,
    /// The suite.
    Suite,
}

impl Default for AnalogistConfig {
    fn default() -> Self {
        Self {
            resolution: None,
            strength: 0.98,
            guidance_scale: 15.0,
            num_inference_steps: 50,
            scale: 1.3,
            clone_layers: [3, 11],
            mask_layers: [3, 11],
            prompt: Captioned::Captioner,
            words: 5,
            quality: "best quality, extremely detailed".to_owned(),
            negative_prompt:
                "Messy,Disordered,Chaotic,Cluttered,Haphazard,Unkempt,Scattered,Disheveled,\
                              Tangled,Random"
                    .to_owned(),
        }
    }
}

impl AnalogistConfig {
    fn validate(&self) -> Result<()> {
        let layers = format!("the first of {LAYERS} layers, and that after the last");
        let there = |[first, end]: [usize; 2]| first <= end && end <= LAYERS;
        let strength = self.strength > 0.0 && self.strength <= 1.0;
        let (clone, mask) = (self.clone_layers, self.mask_layers);
        Checks::default()
            .that(
                "strength",
                strength,
                "more than 0, at most 1",
                self.strength,
            )
            .that("clone_layers", there(clone), &layers, format!("{clone:?}"))
            .that("mask_layers", there(mask), &layers, format!("{mask:?}"))
            .result()
    }
}

struct Analogist {
    models: Arc<Models>,
    /// The model at the resolution of the grid.
    pipeline: Pipeline,
    control: Arc<GridControl>,
    config: AnalogistConfig,
}

pub(super) fn analogist(
    models: &EvalModels,
    values: &Map<String, Value>,
) -> Result<Box<dyn Method>> {
    let config = with_settings(&AnalogistConfig::default(), values)?;
    config.validate()?;
    let models = models.inpainting()?;
    let pipeline = models.pipeline().clone();
    pipeline.check_family(&family::INPAINT)?;
    let size = config
        .resolution
        .map_or(pipeline.resolution(), |side| [side; 2]);
    // Half a grid must also be a valid size for the model.
    let half = size.map(|side| side.div_euclid(2));
    if let Err(error) = pipeline.clone().with_resolution(half) {
        return Err(match config.resolution {
            Some(_) => error,
            None => Error::WrongModel {
                reason: format!("the model's pictures cannot be halved: {error}"),
            },
        });
    }
    let control = Arc::new(GridControl::new(
        &config,
        pipeline.denoiser().attention_layers(),
    ));
    Ok(Box::new(Analogist {
        models,
        pipeline: pipeline.with_resolution(size)?,
        control,
        config,
    }))
}

impl Method for Analogist {
    fn settings(&self) -> Value {
        recorded(&self.config)
    }

    fn told(&self) -> Told {
        match self.config.prompt {
            Captioned::Captioner => Told::Nothing,
            Captioned::Suite => Told::Captions,
        }
    }

    fn is_told(&self, captions: &Captions, _: Option<&str>) -> bool {
        self.config.prompt == Captioned::Captioner || captions.of_a().is_some()
    }

    fn draw(
        &self,
        analogy: &Analogy,
        _: &Arrays,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let (pipeline, config) = (&self.pipeline, &self.config);
        let text = self.prompt(analogy, &mut *observer)?;
        let words = pipeline.read(&pipeline.prompt(&text)?, 0)?;
        let [height, width] = pipeline.resolution();
        let picture = grid(analogy, [height, width]);
        let shown = pipeline.show(Some(&picture), Some(&mask([height, width])))?;
        let Some(shown) = shown else {
            return Err(Error::invalid_input("the model is shown no picture"));
        };
        let prompt = pipeline.encode_prompts(&[FullPrompt::plain(&words)])?;
        let negative = pipeline.encode_negative_prompt(&config.negative_prompt)?;
        let [prompt, negative] = [prompt, negative].map(|one| one.with_image(shown.clone()));
        let guide =
            Guide::new(prompt, negative, config.guidance_scale).controlled(self.control.clone());
        let mut solver = Ddim::new(pipeline.noising(), config.num_inference_steps, 0.0)?;
        let noised = GenerateConfig {
            sdedit_strength: config.strength,
            seed,
            ..GenerateConfig::default()
        };
        let start = regenerate::sdedit(pipeline, pipeline.encode_image(&picture), &solver, &noised);
        let latents = guide::denoise(pipeline, &guide, &mut solver, start, seed, observer)?;
        let cell = pipeline.decode(cell_of_b_prime(latents))?;
        // The size of the model's pictures whatever the size of B, as in other methods.
        let [height, width] = self.models.pipeline().resolution();
        Ok(resize(&cell, width, height, Filter::Bicubic))
    }
}

impl Analogist {
    /// The prompt about B′.
    fn prompt(&self, analogy: &Analogy, observer: Observer<'_>) -> Result<String> {
        let [before, after] = match self.config.prompt {
            Captioned::Suite => analogy.captions_of_a()?.map(str::to_owned),
            Captioned::Captioner => {
                progress::step(&mut *observer, Stage::Caption, 0, 2)?;
                let captions = self.models.caption_pair(&analogy.a, &analogy.a_prime)?;
                progress::step(observer, Stage::Caption, 2, 2)?;
                captions
            }
        };
        let mut prompt = new_words(&before, &after, self.config.words);
        if !self.config.quality.is_empty() {
            prompt = format!("{prompt}, {}", self.config.quality);
        }
        Ok(prompt)
    }
}

/// The first `most` words of `after` that are not in `before`, ignoring case and punctuation; the
/// first `most` words of all if none is new.
fn new_words(before: &str, after: &str, most: usize) -> String {
    let bare = |word: &str| {
        word.trim_matches(|c: char| !c.is_alphanumeric())
            .to_lowercase()
    };
    let known: Vec<String> = before.split_whitespace().map(bare).collect();
    let words = || after.split_whitespace();
    let mut found: Vec<&str> = words()
        .filter(|word| !known.contains(&bare(word)))
        .take(most)
        .collect();
    if found.is_empty() {
        found = words().take(most).collect();
    }
    let punctuation = |c: char| !c.is_alphanumeric();
    found.join(" ").trim_end_matches(punctuation).to_owned()
}

/// The last quarter of a grid's latents [1, c, h, w]: [1, c, h/2, w/2].
fn cell_of_b_prime(latents: Tensor<4>) -> Tensor<4> {
    let [_, channels, h, w] = latents.dims();
    latents.slice([0..1, 0..channels, h / 2..h, w / 2..w])
}

/// A and A′ above B and B.
fn grid(analogy: &Analogy, [height, width]: [u32; 2]) -> RgbImage {
    let mut grid = RgbImage::new(width, height);
    let (x, y) = (width.div_euclid(2), height.div_euclid(2));
    let cells = [
        (&analogy.a, 0, 0),
        (&analogy.a_prime, x, 0),
        (&analogy.b, 0, y),
        (&analogy.b, x, y),
    ];
    for (picture, x_0, y_0) in cells {
        imageops::replace(&mut grid, &fit(picture, x, y), x_0.into(), y_0.into());
    }
    grid
}

/// White in the cell of B′.
fn mask([height, width]: [u32; 2]) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let drawn_anew = x >= width.div_euclid(2) && y >= height.div_euclid(2);
        Rgb([if drawn_anew { 255 } else { 0 }; 3])
    })
}

/// Self-attention cloning and cross-attention masking.
#[derive(Debug)]
struct GridControl {
    cloned: Range<usize>,
    masked: Range<usize>,
    scale: f64,
}

impl GridControl {
    /// For a U-Net with this many transformer blocks.
    fn new(config: &AnalogistConfig, blocks: usize) -> Self {
        // The nearest whole number of layers.
        let scaled = |layer: usize| (2 * layer * blocks + LAYERS).div_euclid(2 * LAYERS);
        let range = |[first, end]: [usize; 2]| scaled(first)..scaled(end);
        Self {
            cloned: range(config.clone_layers),
            masked: range(config.mask_layers),
            scale: config.scale,
        }
    }

    /// The scores with those between A′ and B′ replaced by those between A and B, in both directions.
    fn clone_scores(&self, scores: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        let device = scores.device().without_autodiff();
        let order = Cell::ALL.map(|cell| cell.positions(size)).concat();
        let mut back = vec![0; order.len()];
        for (place, &position) in order.iter().enumerate() {
            back[position] = place;
        }
        let ints = |numbers: &[usize]| {
            let numbers: Vec<i64> = numbers
                .iter()
                .filter_map(|&n| i64::try_from(n).ok())
                .collect();
            Tensor::<1, Int>::from_ints(numbers.as_slice(), &device)
        };
        let (order, back) = (ints(&order), ints(&back));
        // Cell by cell, so that the scores between two cells are one block.
        let scores = scores.select(2, order.clone()).select(3, order);
        let [b, heads, n, _] = scores.dims();
        let quarter = n.div_euclid(4);
        let block = |queries: Cell, keys: Cell| {
            let place = |cell: Cell| cell as usize * quarter..(cell as usize + 1) * quarter;
            [0..b, 0..heads, place(queries), place(keys)]
        };
        let mut cloned = scores.clone();
        for (from, to) in [
            ((Cell::A, Cell::B), (Cell::APrime, Cell::BPrime)),
            ((Cell::B, Cell::A), (Cell::BPrime, Cell::APrime)),
        ] {
            let values = scores.clone().slice(block(from.0, from.1)) * self.scale;
            cloned = cloned.slice_assign(block(to.0, to.1), values);
        }
        cloned.select(2, back.clone()).select(3, back)
    }

    /// The weights with zeros in the rows of all positions outside B′.
    fn mask_weights(weights: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        let device = weights.device().without_autodiff();
        let mut kept = vec![0.0f32; size[0] * size[1]];
        for position in Cell::BPrime.positions(size) {
            kept[position] = 1.0;
        }
        let kept = Tensor::<1>::from_floats(kept.as_slice(), &device);
        let rows = kept.dims()[0];
        let kept = kept.cast(weights.dtype());
        weights * kept.reshape([1, 1, rows, 1])
    }
}

impl AttentionControl for GridControl {
    fn changes(&self, place: &AttentionPlace) -> bool {
        match place.kind {
            AttentionKind::ToItself => self.cloned.contains(&place.layer),
            AttentionKind::ToPrompt => self.masked.contains(&place.layer),
        }
    }

    fn weights(&self, place: &AttentionPlace, scores: Tensor<4>) -> Tensor<4> {
        match place.kind {
            AttentionKind::ToItself => {
                activation::softmax(self.clone_scores(scores, place.size), 3)
            }
            AttentionKind::ToPrompt => {
                Self::mask_weights(activation::softmax(scores, 3), place.size)
            }
        }
    }
}

/// A picture of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    A,
    APrime,
    B,
    BPrime,
}

impl Cell {
    const ALL: [Self; 4] = [Self::A, Self::APrime, Self::B, Self::BPrime];

    /// Its positions in a feature map of this height and width, row by row.
    fn positions(self, [height, width]: [usize; 2]) -> Vec<usize> {
        let (h, w) = (height.div_euclid(2), width.div_euclid(2));
        let (top, left) = match self {
            Self::A => (0, 0),
            Self::APrime => (0, w),
            Self::B => (h, 0),
            Self::BPrime => (h, w),
        };
        (top..top + h)
            .flat_map(|y| (left..left + w).map(move |x| y * width + x))
            .collect()
    }
}

#[cfg(test)]
mod tests;
