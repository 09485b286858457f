//! Optimised prompts by PEZ, "hard prompts made easy" (Wen et al. 2023).

use burn::tensor::{DType, Int, Tensor, TensorData};
use rand::Rng;

use crate::diffusion::joint_space::JointSpace;
use crate::diffusion::text_encoder::TextEncoder;
use crate::diffusion::words::Prompt;
use crate::method::learn::{AdamW, Moments};
use crate::method::prompt::PromptConfig;
use crate::util::progress::{self, Observer, Stage};
use crate::util::random::{Purpose, rng};
use crate::util::tensors::{cosine, host};
use crate::{Error, Result};

/// The words that, after `prefix`, make the prompt closest to a picture in the joint space.
///
/// A soft prompt of `pez_tokens` embeddings is optimised by AdamW. At each step it is projected to
/// the nearest entries of the vocabulary (by cosine); the loss `1 − cos(E_I(image), E_T(prompt))`
/// and its gradient are taken there, and the gradient is applied to the soft prompt. The best
/// projection is kept. `number` distinguishes the pictures of one run, so that each starts from its
/// own random words.
///
/// # Shapes
/// `image`: unit-norm features `[e]`.
///
/// # Errors
/// [`Error::Setting`] for invalid settings, and for more words than fit into the text encoder;
/// [`Error::Stopped`] if the observer asks to stop.
pub fn optimise(
    joint: &JointSpace,
    image: &[f32],
    prefix: &Prompt,
    config: &PromptConfig,
    number: usize,
    observer: Observer<'_>,
) -> Result<Prompt> {
    config.validate()?;
    let encoder = joint.text_encoder();
    room(std::slice::from_ref(encoder), config, 0)?;
    let device = encoder.token_table().device();
    let vocabulary = words(encoder);
    let table = encoder.embed_tokens(&vocabulary)?.cast(DType::F32); // [v, d]
    let directions = unit_rows(table.clone());
    let target = TensorData::new(image.to_vec(), [1, image.len()]);
    let target = Tensor::<2>::from_data(target, (&device, DType::F32));

    let mut rng = rng(config.seed, Purpose::Pez, number);
    let first: Vec<i64> = (0..config.pez_tokens)
        .map(|_| i64::try_from(rng.random_range(0..vocabulary.len())).unwrap_or(0))
        .collect();
    let mut soft = table
        .clone()
        .select(0, Tensor::<1, Int>::from_ints(first.as_slice(), &device));
    let mut moments = Moments::zeros_like(&soft);
    let optimiser = AdamW::new(config.pez_learning_rate, config.pez_weight_decay);
    let mut best: Option<(f32, Vec<u32>)> = None;
    for step in 0..config.pez_steps {
        progress::step(
            &mut *observer,
            Stage::OptimisePrompt,
            step,
            config.pez_steps,
        )?;
        let similarity = unit_rows(soft.clone()).matmul(directions.clone().transpose()); // [n, v]
        let nearest: Tensor<1, Int> = similarity.argmax(1).squeeze_dim(1);
        let hard = table
            .clone()
            .select(0, nearest.clone())
            .autodiff()
            .require_grad();
        let features = joint.prompt_features(prefix, Some(&hard))?.cast(DType::F32);
        let loss = cosine(features, target.clone()).neg().add_scalar(1.0);
        let value = host(loss.clone().inner())[0];
        if best.as_ref().is_none_or(|(lowest, _)| value < *lowest) {
            let places = nearest.into_data().iter::<i64>().collect::<Vec<_>>();
            let ids = places
                .into_iter()
                .filter_map(|place| usize::try_from(place).ok());
            best = Some((value, ids.map(|place| vocabulary[place]).collect()));
        }
        let mut gradients = loss.backward();
        if let Some(gradient) = hard.grad_remove(&mut gradients) {
            soft = optimiser.step(soft, gradient, &mut moments, step);
        }
    }
    progress::step(
        observer,
        Stage::OptimisePrompt,
        config.pez_steps,
        config.pez_steps,
    )?;
    let ids = best.map_or_else(Vec::new, |(_, ids)| ids);
    Ok(prefix
        .clone()
        .followed_by(&Prompt::from_ids(&ids, encoder.tokenizer())?))
}

/// The number of places in text encoders for a caption before the words that [`optimise`] finds and
/// `num_tokens` difference tokens.
///
/// # Errors
/// [`Error::Setting`] if even the words and the difference tokens do not fit.
pub(crate) fn room(
    encoders: &[TextEncoder],
    config: &PromptConfig,
    num_tokens: usize,
) -> Result<usize> {
    let places = encoders.iter().map(TextEncoder::max_num_tokens).min();
    let most = places.unwrap_or(0).saturating_sub(num_tokens);
    let room = most.checked_sub(config.pez_tokens);
    room.ok_or_else(|| Error::Setting {
        name: "pez_tokens",
        expected: format!(
            "at most {most}, which is what the text encoder has room for besides {num_tokens} \
             difference tokens"
        ),
        found: config.pez_tokens.to_string(),
    })
}

/// The entries of the vocabulary that a prompt may use: all except those of the frame and words added for
/// one text encoder.
fn words(encoder: &TextEncoder) -> Vec<u32> {
    let special: Vec<u32> = encoder.frame().ids().collect();
    (0..u32::try_from(encoder.tokenizer().base_vocab_size()).unwrap_or(u32::MAX))
        .filter(|id| !special.contains(id))
        .collect()
}

fn unit_rows(x: Tensor<2>) -> Tensor<2> {
    let norm = x.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(1e-8);
    x / norm
}
