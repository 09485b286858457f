"""What the flow-matching backbones share: the schedule, the loss, the latents they are trained on.

The networks predict the velocity ε − x₀ at x = (1 − σ) x₀ + σ ε (Liu et al. 2022, arXiv 2209.03003), with σ spread
over its range as the schedule spreads it (Esser et al. 2024, arXiv 2403.03206).
"""

import argparse
import pathlib

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

import common
import data
from train_unet import captions, encode, once

SHIFT = 2.0  # of the schedule: σ = SHIFT u / (1 + (SHIFT − 1) u)
VARIANTS = 8  # captions of a scene


def arguments(description: str, **defaults) -> argparse.ArgumentParser:
    parser = common.arguments(description, **defaults)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the demo model, whose autoencoder is taken")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the model's folder, with its text encoders")
    parser.add_argument("--pictures", type=int, default=data.COUNTS["train"], help="train on the first so many")
    parser.add_argument("--export", action="store_true")
    return parser


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def autoencoder(args) -> AutoencoderKL:
    """The demo model's. Flow-matching pipelines add a shift to latents; this one has none."""
    vae = AutoencoderKL.from_pretrained(args.model / "vae", torch_dtype=torch.float32).to(args.device, memory_format=torch.channels_last)
    vae.register_to_config(shift_factor=0.0)
    return vae


class Latents:
    """The training pictures as posteriors, with the captions of their scenes."""

    def __init__(self, args):
        pictures, scenes = data.load(args.work, "train")
        self.part = f"-{args.pictures}" if args.pictures < len(scenes) else ""
        self.scenes = scenes[: args.pictures]
        self.mean, self.std = once(args.work / f"latents{self.part}.pt", args.device, lambda: encode(autoencoder(args), pictures[: args.pictures]))

    def captions(self) -> list[list[str]]:
        return [captions(scene, VARIANTS) for scene in self.scenes]

    def draw(self, index: torch.Tensor) -> torch.Tensor:
        return self.mean[index] + self.std[index] * torch.randn_like(self.mean[index])


def noised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, their σ [b], from the least noisy to the noisiest, and the velocity to predict."""
    noise, batch = torch.randn_like(x), len(x)
    u = (torch.arange(batch, device=x.device) + torch.rand(batch, device=x.device)) / batch
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    at = sigma[:, None, None, None]
    return (1 - at) * x + at * noise, sigma, noise - x


def update(run: common.Run, predicted: torch.Tensor, target: torch.Tensor):
    """A step of training; `late` and `early` are the errors near the noise and near the picture."""
    error = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
    eighth = len(error) // 8
    run.update(error.mean(), late=error[-eighth:].mean(), early=error[:eighth].mean())
