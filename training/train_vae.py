"""Trains the demo model's VAE: factor 8, 4 latent channels, as Stable Diffusion's.

    python train_vae.py --work WORK                       # resumes by itself
    python train_vae.py --work WORK --export ../demo/model/vae

It sees random 64-pixel crops (it is convolutional); the loss is L1 + squared error + L1 of the
picture's gradients, with a very small KL term.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKL

import common
import data

KL_WEIGHT = 1e-4
CROP = 64


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over the pictures, in dB, of reconstructions from the posterior's mean, clamped and
    rounded to bytes as a saved picture is."""
    values = []
    for chunk in np.array_split(pictures, max(1, len(pictures) // 32)):
        x = common.pictures_to_tensor(chunk)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((y + 1) * 127.5).round() / 255 - (x + 1) / 2
        values += (-10 * torch.log10(error.pow(2).mean(dim=(1, 2, 3)))).tolist()
    return float(np.mean(values))


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """1 / standard deviation of the latents, which becomes `scaling_factor`."""
    return 1 / float(vae.encode(common.pictures_to_tensor(pictures)).latent_dist.mode().std())


def main():
    parser = common.arguments(__doc__, steps=3000, batch=16, lr=2.5e-3, seed=10)
    parser.add_argument("--export", type=pathlib.Path)
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder (latents stay what they are)")
    args = parser.parse_args()
    vae = build().to(memory_format=torch.channels_last)
    if args.decoder_only:
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    run = common.Run("vae", args, vae, ema=0.995)
    validation, _ = data.load(args.work, "validation")
    if args.export:
        run.ema.register_to_config(scaling_factor=round(latent_scale(run.ema, validation[:256]), 5))
        run.ema.half().save_pretrained(args.export)
        stored = AutoencoderKL.from_pretrained(args.export, torch_dtype=torch.float32)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, "psnr": psnr(stored, validation), "scaling_factor": stored.config.scaling_factor}))
        return

    train, _ = data.load(args.work, "train")
    for step in run.loop():
        rng = run.rng()
        index = rng.integers(len(train), size=args.batch)
        corners = rng.integers((128 - CROP) // 8 + 1, size=(args.batch, 2)) * 8
        x = common.pictures_to_tensor(np.stack([train[i, r : r + CROP, c : c + CROP] for i, (r, c) in zip(index, corners)]))
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y, mean, logvar = y.float(), posterior.mean.float(), posterior.logvar.float()
        l1, l2 = (y - x).abs().mean(), (y - x).pow(2).mean()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        run.update(l1 + 2 * l2 + 0.5 * gradient_loss(y, x) + KL_WEIGHT * kl, l1=l1.item(), l2=l2.item(), kl=kl.item())
        if run.step % 300 == 299:
            print(json.dumps({"step": run.step + 1, "psnr": psnr(run.ema, validation[:64])}), file=run.log)


if __name__ == "__main__":
    main()
