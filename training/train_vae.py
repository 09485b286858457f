"""Trains the demo model's autoencoders: factor 8, with Stable Diffusion's 4 latent channels or with
the 16 of Stable Diffusion 3 and FLUX.

    python train_vae.py --work WORK                                              # resumes by itself
    python train_vae.py --work WORK --export ../demo/model/vae
    python train_vae.py --work WORK --latent-channels 16 --start ../demo/model/vae
    python train_vae.py --work WORK --latent-channels 16 --export ../demo/vae16

The loss is L1 + squared error + L1 of the picture's gradients, with a very small KL term. `--start`
takes every weight that fits from another autoencoder.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKL

import common
import data

KL_WEIGHT = 1e-4
GRADIENT_WEIGHT = 1.0


def build(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 112),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=128,
    )


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def encoded(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and logarithm of the variance of the posterior."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and its terms for the log."""
    l1, l2 = (y - x).abs().mean(), (y - x).pow(2).mean()
    return l1 + 2 * l2 + GRADIENT_WEIGHT * gradient_loss(y, x), {"l1": l1, "l2": l2}


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] through the posterior's mean, clamped and rounded to bytes as a saved picture is."""
    made = []
    for chunk in np.array_split(pictures, max(1, len(pictures) // 32)):
        x = common.pictures_to_tensor(chunk).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        made.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(made)


def psnr(made: torch.Tensor, pictures: np.ndarray) -> np.ndarray:
    """Of each picture, in dB."""
    error = (made.numpy().astype(np.float64) - pictures) / 255
    return -10 * np.log10((error**2).mean(axis=(1, 2, 3)))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, pictures: np.ndarray) -> dict:
    """Of the posterior: the standard deviation over all channels, whose inverse becomes
    `scaling_factor`, and for each channel the mean, the standard deviation, the kurtosis (3 for a
    normal distribution) and the posterior's own standard deviation."""
    posteriors = [vae.encode(common.pictures_to_tensor(chunk).to(vae.device)).latent_dist for chunk in np.array_split(pictures, max(1, len(pictures) // 32))]
    z, own = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    axes = (0, 2, 3)
    mean, std = z.mean(axes, keepdim=True), z.std(axes, keepdim=True)
    by_channel = {"mean": mean, "std": std, "kurtosis": ((z - mean) / std).pow(4).mean(axes), "posterior_std": own.mean(axes)}
    return {"whole_std": float(z.std()), **{name: [round(v, 4) for v in value.flatten().tolist()] for name, value in by_channel.items()}}


def main():
    parser = common.arguments(__doc__, steps=20000, batch=64, lr=2.5e-3, seed=10)
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--start", type=pathlib.Path, help="an autoencoder to start from")
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build(args.latent_channels)
    if args.start:
        own = vae.state_dict()
        given = AutoencoderKL.from_pretrained(args.start, torch_dtype=torch.float32).state_dict()
        vae.load_state_dict({name: given[name] if name in given and given[name].shape == value.shape else value for name, value in own.items()})
    vae = vae.to(memory_format=torch.channels_last)
    run = common.Run(f"vae{args.latent_channels}", args, vae, ema=0.999)
    validation, _ = data.load(args.work, "validation")
    if args.export:
        run.ema.register_to_config(scaling_factor=round(1 / latent_statistics(run.ema, validation[:256])["whole_std"], 5))
        run.ema.half().save_pretrained(args.export)
        stored = AutoencoderKL.from_pretrained(args.export, torch_dtype=torch.float32).to(args.device)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, "psnr": float(psnr(round_trip(stored, validation), validation).mean()), "scaling_factor": stored.config.scaling_factor, "latents": latent_statistics(stored, validation[:256])}))
        return

    def forward(x, noise):
        mean, logvar = encoded(vae, x)
        return vae.decoder(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise)), mean, logvar

    forward = common.compiled(forward, args)
    train, _ = data.load(args.work, "train", args.device)
    side = data.SIZE // 8

    def step():
        x = common.pictures_to_tensor(train[torch.randint(len(train), (args.batch,), device=train.device)])
        noise = torch.randn(args.batch, args.latent_channels, side, side, device=args.device)
        with common.autocast(args.device):
            y, mean, logvar = forward(x, noise)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        loss, terms = reconstruction_loss(y, x)
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return loss + KL_WEIGHT * kl, {"kl": kl, **terms}

    for _ in run.loop(step):
        if run.step % 1000 == 999:
            print(json.dumps({"step": run.step + 1, "psnr": float(psnr(round_trip(run.ema, validation[:64]), validation[:64]).mean())}), file=run.log)


if __name__ == "__main__":
    main()
