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
def latents(work: pathlib.Path, vae: AutoencoderKL, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior of the first `count` pictures, scaled."""
    path = work / "latents.pt"
    if not path.exists():
        train, _ = data.load(work, "train")
        means, stds = [], []
        vae = vae.to(memory_format=torch.channels_last)
        for start in range(0, count, 32):
            x = common.pictures_to_tensor(train[start : start + 32]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(x).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        torch.save((torch.cat(means) * vae.config.scaling_factor, torch.cat(stds) * vae.config.scaling_factor), path)
    return torch.load(path)


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
    vae = AutoencoderKL.from_pretrained(args.model / "vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.model / "text_encoder", torch_dtype=torch.float32)
    if args.export:
        StableDiffusionPipeline(
            vae=vae.half(), text_encoder=text_encoder.half(), tokenizer=tokenizer, unet=run.ema.half(), scheduler=scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(args.model)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return

    _, scenes = data.load(args.work, "train")
    mean, std = latents(args.work, vae, args.pictures)
    noise_scheduler = scheduler()
    alphas_cumprod = noise_scheduler.alphas_cumprod
    for step in run.loop():
        rng = run.rng()
        words = random.Random(args.seed * 1_000_003 + step)
        index = rng.integers(len(mean), size=args.batch)
        captions = ["" if words.random() < EMPTY_PROMPT else random_caption(words, scenes[i])[0] for i in index]
        strata = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch  # every batch sees the whole schedule
        x = mean[index] + std[index] * torch.randn(args.batch, *mean.shape[1:])
        noise = torch.randn_like(x)
        x, noise, strata, captions = map(run.share, (x, noise, strata, captions))
        ids = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        t = (strata * 1000).long().clamp(max=999)
        noisy = noise_scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        target = noise_scheduler.get_velocity(x, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = text_encoder(ids).last_hidden_state
            predicted = unet(noisy, t, encoder_hidden_states=states).sample
        snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
        weight = snr.clamp(max=5) / (snr + 1)
        weight = (weight + 0.25) / 1.25  # never forget the last step, where snr is 0
        error = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
        run.update((weight * error).mean(), mse=error.mean().item(), late=error[-len(error) // 8 :].mean().item())


if __name__ == "__main__":
    main()
