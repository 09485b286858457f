"""Trains the decoder of an autoencoder alone. The latents stay as they are, and with them every network
that was trained on them.

    python train_decoder.py --work WORK --vae ../demo/model/vae                 # resumes by itself
    python train_decoder.py --work WORK --vae ../demo/model/vae --export ../demo/model/vae

The loss is that of train_vae.py. After `--adversarial-from` of the run a discriminator of patches joins it
(hinge loss, weighted by the gradients at the last layer: Esser et al. 2021, arXiv 2012.09841), since
what the latents do not tell would otherwise be drawn as a blur.

Half of what it sees are 2x2 grids of four pictures. The group norms and the attention of the middle block
read the whole picture, and a decoder that only knows one size draws another one worse.
"""

import copy
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.nn.utils.parametrizations import spectral_norm

import common
import data
from train_vae import encoded, psnr, reconstruction_loss, round_trip

ADVERSARIAL_RAMP, ADVERSARIAL_WEIGHT = 0.08, 0.3


class Decoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z):
        return self.decoder(self.post_quant_conv(z))


class Discriminator(torch.nn.Module):
    """Pictures [b, 3, h, w] to a score for every patch [b, 1, h / 4, w / 4]; a patch is 26 pixels wide."""

    def __init__(self):
        super().__init__()
        shapes = ((3, 32, 3, 1), (32, 48, 4, 2), (48, 96, 4, 2), (96, 128, 3, 1), (128, 1, 3, 1))
        self.layers = torch.nn.ModuleList(spectral_norm(torch.nn.Conv2d(i, o, k, stride, padding=1)) for i, o, k, stride in shapes)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


def sharpness(pictures: np.ndarray | torch.Tensor) -> np.ndarray:
    """Variance of the Laplacian of the luma of uint8 pictures [n, h, w, 3]: [n]"""
    luma = torch.as_tensor(np.asarray(pictures)).float() @ torch.tensor([0.299, 0.587, 0.114])
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma[:, None], laplacian).var(dim=(1, 2, 3)).numpy()


def quality(vae: AutoencoderKL, pictures: np.ndarray, scenes) -> dict:
    """PSNR in dB, the same of 2x2 grids of a quarter of the pictures, and the sharpness of reconstructions over
    that of the pictures: the mean, and the mean for the worst value of each attribute."""
    made = round_trip(vae, pictures)
    ratio = sharpness(made) / sharpness(pictures)
    worst = {}
    for attribute in ("object", "ground", "extra", "style"):
        values = np.array([getattr(scene, attribute) for scene in scenes])
        means = {value: float(ratio[values == value].mean()) for value in sorted(set(values))}
        worst[attribute] = min(means.items(), key=lambda item: item[1])
    grids = in_grids(torch.from_numpy(pictures[: len(pictures) // 16 * 4]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    return {"psnr": float(psnr(made, pictures).mean()), "psnr_of_grids": float(psnr(round_trip(vae, grids), grids).mean()), "sharpness": float(ratio.mean()), "worst": worst}


def assembled(vae: AutoencoderKL, decoder: Decoder) -> AutoencoderKL:
    """A copy of `vae` with this decoder."""
    copied = copy.deepcopy(vae)
    copied.load_state_dict(vae.state_dict() | decoder.state_dict())
    return copied


def in_grids(pictures: torch.Tensor) -> torch.Tensor:
    """[4 n, c, h, w] as 2x2 grids [n, c, 2 h, 2 w]"""
    n, c, h, w = pictures.shape
    return pictures.view(n // 4, 2, 2, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(n // 4, c, 2 * h, 2 * w)


def gradient_norm(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()


def main():
    parser = common.arguments(__doc__, steps=6000, batch=16, lr=1e-3, seed=11)
    parser.add_argument("--vae", type=pathlib.Path, required=True, help="the autoencoder whose encoder stays")
    parser.add_argument("--adversarial-from", type=float, default=0.45, help="share of the run; 1 is never")
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(args.device, memory_format=torch.channels_last)
    decoder = Decoder(vae)
    discriminator = Discriminator().to(args.device, memory_format=torch.channels_last)
    judge = torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=(0.5, 0.9))
    run = common.Run(f"decoder{vae.config.latent_channels}", args, decoder, ema=0.999, extras={"discriminator": discriminator, "judge": judge})
    validation, scenes = data.load(args.work, "validation")
    if args.export:
        assembled(vae, run.ema).half().save_pretrained(args.export)
        stored = AutoencoderKL.from_pretrained(args.export, torch_dtype=torch.float32).to(args.device)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, **quality(stored, validation, scenes)}))
        return

    encode, decode = common.compiled(lambda x: encoded(vae, x), args), common.compiled(decoder, args)
    train, _ = data.load(args.work, "train", args.device)
    for _ in run.loop():
        drawn = common.pictures_to_tensor(train[torch.from_numpy(np.sort(run.rng().integers(len(train), size=args.batch))).to(train.device)])
        drawn = drawn[torch.randperm(args.batch, device=drawn.device)]
        half = args.batch // 8 * 4
        pairs = []
        for x in (drawn[half:], in_grids(drawn[:half])):
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), common.autocast(args.device):
                mean, logvar = (part.float() for part in encode(x))
            with common.autocast(args.device):
                y = decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
            pairs.append((x, y.float()))
        (loss, terms), (grid_loss, grid_terms) = (reconstruction_loss(y, x) for x, y in pairs)
        loss = (loss + grid_loss) / 2
        terms |= {f"grid_{name}": value for name, value in grid_terms.items()}
        x, y = pairs[run.step % 2]  # the discriminator sees one or the other
        adversarial = run.progress() >= args.adversarial_from
        if adversarial:
            with common.autocast(args.device):
                fooled = -discriminator(y).float().mean()
            last = decoder.decoder.conv_out.weight
            scale = (gradient_norm(loss, last) / (gradient_norm(fooled, last) + 1e-6)).clamp(max=1e3)
            share = min(1.0, (run.progress() - args.adversarial_from) / ADVERSARIAL_RAMP)
            loss = loss + ADVERSARIAL_WEIGHT * share * scale * fooled
        run.update(loss, **terms)
        if adversarial:
            with common.autocast(args.device):
                true, false = discriminator(torch.cat([x, y.detach()])).float().chunk(2)
            told_apart = F.relu(1 - true).mean() + F.relu(1 + false).mean()
            judge.zero_grad()
            told_apart.backward()
            judge.step()
            run.note(discriminator=told_apart)
        if run.step % 500 == 499:
            print(json.dumps({"step": run.step + 1, **quality(assembled(vae, run.ema), validation[:64], scenes[:64])}), file=run.log)


if __name__ == "__main__":
    main()
