"""Trains the demo model's U-Net on stored latents, conditioned on the frozen CLIP text encoder.

    python train_unet.py --work WORK --model ../demo/model            # resumes by itself
    python train_unet.py --work WORK --model ../demo/model --warm     # starts from ../demo/model/unet
    python train_unet.py --work WORK --model ../demo/model --export   # unet/, scheduler/, model_index.json

v-prediction with zero terminal SNR and trailing timesteps (Lin et al. 2023, arXiv 2305.08891), so
that the prompt decides the global look; the loss is weighted by min-SNR (Hang et al. 2023,
gamma 5, its v-prediction form).
"""

import json
import pathlib
import random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import common
import data
from text import MAX_LENGTH
from world import random_caption

EMPTY_PROMPT = 0.1  # share of captions replaced by the empty one, for guidance


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 128, 160),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior of uint8 pictures [n, h, w, 3], both scaled."""
    means, stds = [], []
    vae = vae.to(memory_format=torch.channels_last)
    for start in range(0, len(pictures), 32):
        x = common.pictures_to_tensor(pictures[start : start + 32]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    return torch.cat(means) * vae.config.scaling_factor, torch.cat(stds) * vae.config.scaling_factor


def latents(work: pathlib.Path, vae: AutoencoderKL, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The posteriors of the first `count` training pictures, computed once."""
    path = work / "latents.pt"
    if not path.exists():
        train, _ = data.load(work, "train")
        torch.save(encode(vae, train[:count]), path)
    return torch.load(path)


class Frozen:
    """The parts of the model that are not trained here."""

    def __init__(self, model: pathlib.Path):
        self.vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32)
        self.scheduler = scheduler()

    @torch.no_grad()
    def states(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            return self.text_encoder(ids).last_hidden_state


def draw_timesteps(batch: int) -> torch.Tensor:
    """One from each of `batch` equal strata, so that every batch sees the whole schedule."""
    strata = (torch.arange(batch) + torch.rand(batch)) / batch
    return (strata * 1000).long().clamp(max=999)


def velocity_loss(unet, frozen: Frozen, x, noise, t, texts: list[str], given=(), where=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss and the plain error of each latent. `given` are more channels for the U-Net,
    `where` [b, 1, h, w] says how much each place counts."""
    noisy = torch.cat([frozen.scheduler.add_noise(x, noise, t), *given], 1).contiguous(memory_format=torch.channels_last)
    target = frozen.scheduler.get_velocity(x, noise, t)
    states = frozen.states(texts)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, t, encoder_hidden_states=states).sample
    squares = (predicted.float() - target).pow(2)
    if where is not None:
        squares = squares * where / where.mean(dim=(1, 2, 3), keepdim=True)
    error = squares.mean(dim=(1, 2, 3))
    alphas_cumprod = frozen.scheduler.alphas_cumprod[t]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(max=5) / (snr + 1)
    weight = (weight + 0.25) / 1.25  # never forget the last step, where snr is 0
    return (weight * error).mean(), error.detach()


def main():
    parser = common.arguments(__doc__, steps=3000, batch=32, lr=3e-3, seed=30)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--pictures", type=int, default=16384, help="how many training pictures to store latents of")
    parser.add_argument("--warm", action="store_true", help="start from the model's own weights instead of from random ones")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    unet = build()
    if args.warm:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    print("parameters:", sum(p.numel() for p in unet.parameters()), flush=True)
    run = common.Run("unet", args, unet, ema=0.997)
    frozen = Frozen(args.model)
    if args.export:
        StableDiffusionPipeline(
            vae=frozen.vae.half(), text_encoder=frozen.text_encoder.half(), tokenizer=frozen.tokenizer, unet=run.ema.half(), scheduler=frozen.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(args.model)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return

    _, scenes = data.load(args.work, "train")
    mean, std = latents(args.work, frozen.vae, args.pictures)
    for step in run.loop():
        rng = run.rng()
        words = random.Random(args.seed * 1_000_003 + step)
        index = rng.integers(len(mean), size=args.batch)
        captions = ["" if words.random() < EMPTY_PROMPT else random_caption(words, scenes[i])[0] for i in index]
        t = draw_timesteps(args.batch)
        x = mean[index] + std[index] * torch.randn(args.batch, *mean.shape[1:])
        noise = torch.randn_like(x)
        loss, error = velocity_loss(unet, frozen, *map(run.share, (x, noise, t, captions)))
        run.update(loss, mse=error.mean().item(), late=error[-len(error) // 8 :].mean().item())


if __name__ == "__main__":
    main()
