//! Inversion of pictures to prompts and noise, and drawing them from these.

use burn::tensor::{DType, Device, Tensor, TensorData};
use difference_inversion::diffusion::guide;
use difference_inversion::diffusion::guide::{Guide, Start};
use difference_inversion::diffusion::pipeline::{Conditions, Pipeline};
use difference_inversion::diffusion::sample::{Ddim, Solver};
use difference_inversion::image::{Filter, resize};
use difference_inversion::method::generate_config::GenerateConfig;
use difference_inversion::method::learn::{AdamW, LossScale, Moments};
use difference_inversion::method::loss::finite;
use difference_inversion::method::regenerate;
use difference_inversion::util::progress::{self, Observer, Stage};
use difference_inversion::util::random::{Purpose, normal, rng, shuffled};
use difference_inversion::util::tensors::host;
use difference_inversion::{Error, Result};
use image::{GenericImageView, RgbImage, imageops};
use rand::Rng;

use super::{DiaConfig, DiaInversion};
use crate::lbfgs::{Evaluation, Lbfgs};

/// Streams of random numbers per picture.
const STREAMS: usize = 1 << 20;

/// Inverts pictures to prompts and noise, and draws them from these.
pub(super) struct Inversion<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) config: &'a DiaConfig,
    pub(super) seed: u64,
}

/// The batch on which a picture's prompt is optimised.
pub(super) struct Views {
    /// Latents of the picture, of its mirror image and of its crops, `[views, c, h, w]`.
    pub(super) latents: Tensor<4>,
    /// One timestep per view.
    pub(super) timesteps: Vec<f64>,
}

impl Inversion<'_> {
    /// The text encoder's output for the token embeddings that explain picture `number`.
    pub(super) fn prompt(
        &self,
        picture: &RgbImage,
        number: usize,
        observer: Observer<'_>,
    ) -> Result<Conditions> {
        let config = self.config;
        let Some(encoder) = self.pipeline.text_encoders().first() else {
            return Err(Error::invalid_input("the model has no text encoder"));
        };
        let empty = encoder.empty_embeds()?.cast(DType::F32);
        let [n, _] = empty.dims();
        let learned = config.num_tokens.min(n);
        let mut tokens = empty.clone().narrow(0, 0, learned);
        let rest = (learned < n).then(|| empty.narrow(0, learned, n - learned));
        let whole =
            |tokens: Tensor<2>| Tensor::cat([tokens].into_iter().chain(rest.clone()).collect(), 0);
        let views = self.views(picture, number)?;
        let optimiser = AdamW::new(config.token_learning_rate, config.token_weight_decay);
        let mut moments = Moments::zeros_like(&tokens);
        let mut loss_scale = LossScale::new(self.pipeline.dtype());
        for step in 0..config.token_iterations {
            progress::step(&mut *observer, Stage::Learn, step, config.token_iterations)?;
            let mut value = 0.0;
            let gradients = loss_scale.gradients(&[tokens.clone()], |tokens| {
                let conditions = self.pipeline.encode_embeds(whole(tokens[0].clone()))?;
                let loss = self.explains(&conditions, &views, number * STREAMS + step);
                value = finite(&loss, step)?;
                Ok(loss)
            })?;
            if value < config.sufficient_loss {
                break;
            }
            for gradient in gradients {
                tokens = optimiser.step(tokens, gradient, &mut moments, step);
            }
        }
        progress::step(
            observer,
            Stage::Learn,
            config.token_iterations,
            config.token_iterations,
        )?;
        self.pipeline.encode_embeds(whole(tokens))
    }

    /// The views of the picture in the batch, with their timesteps.
    pub(super) fn views(&self, picture: &RgbImage, number: usize) -> Result<Views> {
        let mut views = vec![picture.clone(), imageops::flip_horizontal(picture)];
        let mut draws = rng(self.seed, Purpose::Augment, number);
        let [height, width] = self.pipeline.resolution();
        let whole = resize(picture, width, height, Filter::Lanczos);
        for _ in 0..self.config.crops {
            let share = draws
                .random_range(self.config.least_crop..=self.config.largest_crop)
                .sqrt();
            let (right, down) = (draws.random::<f64>(), draws.random::<f64>());
            let [w, h] = [width, height].map(|side| part(share, side).max(1));
            let (x, y) = (part(right, width - w), part(down, height - h));
            views.push(whole.view(x, y, w, h).to_image());
        }
        let mut least_noisy = self
            .pipeline
            .noising()
            .times(self.config.num_inference_steps)?;
        least_noisy.reverse();
        least_noisy.truncate(views.len());
        let order = shuffled(
            &mut rng(self.seed, Purpose::Order, number),
            least_noisy.len(),
        );
        let timesteps = order.iter().cycle().map(|&place| least_noisy[place]);
        let latents = views.iter().map(|view| self.pipeline.encode_image(view));
        Ok(Views {
            latents: Tensor::cat(latents.collect(), 0),
            timesteps: timesteps.take(views.len()).collect(),
        })
    }

    /// The loss of a prompt on the views under the noise of a stream, `[1]`.
    pub(super) fn explains(
        &self,
        conditions: &Conditions,
        views: &Views,
        stream: usize,
    ) -> Tensor<1> {
        let Views { latents, timesteps } = views;
        let noising = self.pipeline.noising();
        let mut draws = rng(self.seed, Purpose::Learn, stream);
        let noise = normal(&mut draws, latents.dims(), self.pipeline.device());
        let noisy = noising.add_noise(latents.clone(), noise.clone(), timesteps);
        let target = noising.target(latents.clone(), noise, timesteps);
        let conditions = conditions.clone().repeat_each(timesteps.len());
        let prediction = self.pipeline.predict(noisy, timesteps, &conditions);
        (prediction - target).powi_scalar(2).mean()
    }

    /// The noise that becomes B under its prompt.
    pub(super) fn noise(
        &self,
        b: &RgbImage,
        prompt: &Conditions,
        observer: Observer<'_>,
    ) -> Result<Tensor<4>> {
        let (pipeline, config) = (self.pipeline, self.config);
        let latents = pipeline.encode_image(b);
        if config.inversion == DiaInversion::Ddim {
            let settings = GenerateConfig {
                num_inference_steps: config.num_inference_steps,
                ..GenerateConfig::default()
            };
            let source = Guide::plain(prompt.clone());
            let start =
                regenerate::ddim_inversion(pipeline, latents, &source, &settings, observer)?;
            return Ok(start.latents);
        }
        let solver = Ddim::new(pipeline.noising(), config.num_inference_steps, 0.0)?;
        let mut draws = rng(self.seed, Purpose::Generate, 0);
        let fresh = normal(&mut draws, latents.dims(), pipeline.device());
        let first = solver.add_noise(0, latents.clone(), fresh);
        let target = Target {
            pixels: pipeline.pixels(b),
            latents,
        };
        let device = pipeline.device();
        let shape = first.dims();
        let mut x: Vec<f64> = host(first).into_iter().map(f64::from).collect();
        let mut loss_scale = LossScale::new(pipeline.dtype());
        let mut optimiser = Lbfgs::new(config.noise_learning_rate, config.noise_inner_iterations);
        for step in 0..config.noise_iterations {
            progress::step(&mut *observer, Stage::Invert, step, config.noise_iterations)?;
            let mut evaluate = |x: &[f64]| {
                let noise = tensor(x, shape, device);
                self.evaluate(noise, prompt, &target, step, &mut loss_scale)
            };
            let start = evaluate(&x)?;
            if start.0 < config.sufficient_loss {
                break;
            }
            optimiser.step(&mut x, start, evaluate)?;
        }
        progress::step(
            observer,
            Stage::Invert,
            config.noise_iterations,
            config.noise_iterations,
        )?;
        Ok(tensor(&x, shape, device))
    }

    /// The loss of the picture that `noise` becomes, and its gradient.
    pub(super) fn evaluate(
        &self,
        noise: Tensor<4>,
        prompt: &Conditions,
        target: &Target,
        step: usize,
        loss_scale: &mut LossScale,
    ) -> Result<Evaluation> {
        let (mut value, mut gradient) = (0.0, Vec::new());
        let gradients = loss_scale.gradients(&[noise], |noise| {
            let loss = self.reconstruction_loss(noise[0].clone(), prompt, target)?;
            value = finite(&loss, step)?;
            Ok(loss)
        })?;
        for one in gradients {
            gradient.extend(host(one).into_iter().map(f64::from));
        }
        Ok((value, gradient))
    }

    /// The squared error of latents plus the weighted one of pixels, `[1]`.
    pub(super) fn reconstruction_loss(
        &self,
        noise: Tensor<4>,
        prompt: &Conditions,
        target: &Target,
    ) -> Result<Tensor<1>> {
        let mut solver = Ddim::new(
            self.pipeline.noising(),
            self.config.num_inference_steps,
            0.0,
        )?;
        let mut x = noise;
        for (i, timestep) in solver.timesteps().to_vec().into_iter().enumerate() {
            let output = self.pipeline.predict(x.clone(), &[timestep], prompt);
            x = solver.step(i, output, x, None);
        }
        let mut loss = (x.clone() - target.latents.clone()).powi_scalar(2).mean();
        if self.config.noise_pixel_weight > 0.0 {
            let pixels = self.pipeline.decode_pixels(x) - target.pixels.clone();
            loss = loss + pixels.powi_scalar(2).mean() * self.config.noise_pixel_weight;
        }
        Ok(loss)
    }

    /// The picture drawn from `noise` under `prompt`.
    pub(super) fn draw(
        &self,
        prompt: Conditions,
        scale: f64,
        noise: Tensor<4>,
        observer: Observer<'_>,
    ) -> Result<RgbImage> {
        let negative = self.pipeline.encode_negative_prompt("")?;
        let guide = Guide::new(prompt, negative, scale);
        let mut solver = Ddim::new(
            self.pipeline.noising(),
            self.config.num_inference_steps,
            0.0,
        )?;
        let start = Start {
            latents: noise,
            step: 0,
            residuals: Vec::new(),
            previews: false,
            noise: None,
        };
        let latents = guide::denoise(
            self.pipeline,
            &guide,
            &mut solver,
            start,
            self.seed,
            observer,
        )?;
        self.pipeline.decode(latents)
    }
}

/// The target that the noise has to become.
pub(super) struct Target {
    pub(super) latents: Tensor<4>,
    pub(super) pixels: Tensor<4>,
}

/// A share of a side in whole pixels, rounded.
fn part(share: f64, side: u32) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share from 0 to 1 of a picture's side"
    )]
    let part = (share * f64::from(side)).round() as u32;
    part.min(side)
}

pub(super) fn tensor(values: &[f64], shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), shape),
        (device, DType::F32),
    )
}
