"""The judge: a small convolutional network that reads every attribute of a picture. It shares no
data, weights or code with the models that the method uses.

    python judge.py --work WORK                                     # trains; resumes by itself
    python judge.py --work WORK --export                            # ../demo/benchmark/judge.safetensors
    python judge.py --work WORK --evaluate ../demo/model/vae        # true pictures, and through the VAE
"""

import json
import pathlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
import data
from world import ATTRIBUTES, KINDS, render, sample_scene

SIZES = [len(v) for v in ATTRIBUTES.values()]


class Judge(torch.nn.Module):
    """Pictures [b, 3, 128, 128] in [-1, 1] to logits [b, sum of the attributes' values]."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.stages = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(i, o, 3, stride=2, padding=1), torch.nn.GroupNorm(8, o), torch.nn.SiLU(),
                                torch.nn.Conv2d(o, o, 3, padding=1), torch.nn.GroupNorm(8, o), torch.nn.SiLU())
            for i, o in zip(widths, widths[1:])
        )
        self.hidden = torch.nn.Linear(widths[-1] * 16, 256)
        self.out = torch.nn.Linear(256, sum(SIZES))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.out(F.silu(self.hidden(F.adaptive_avg_pool2d(x, 4).flatten(1))))


@torch.no_grad()
def predict(judge: Judge, x: torch.Tensor) -> np.ndarray:
    """Attribute indices [b, kinds]."""
    return np.stack([p.argmax(1).cpu().numpy() for p in judge(x).split(SIZES, dim=1)], axis=1)


WEIGHTS = pathlib.Path(__file__).parent.parent / "demo/benchmark/judge.safetensors"


def load() -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return judge.eval()


def corrupt(x: torch.Tensor, rng) -> torch.Tensor:
    """Small blur, noise and changes of light, so that soft pictures are judged as well as sharp ones."""
    if rng.random() < 0.5:
        k = float(rng.uniform(0, 0.25))
        side = (1 - k) / 2
        kernel = torch.tensor([side, k, side] if rng.random() < 0.5 else [k / 2, 1 - k, k / 2])
        kernel = (kernel[:, None] * kernel[None]).expand(3, 1, 3, 3).to(x.device)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = x + torch.randn_like(x) * float(rng.uniform(0, 0.08))
    return x * float(rng.uniform(0.92, 1.08)) + float(rng.uniform(-0.06, 0.06))


def main():
    parser = common.arguments(__doc__, steps=1000, batch=64, lr=3e-3, seed=50)
    parser.add_argument("--evaluate", type=pathlib.Path)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    if args.export:
        run = common.Run("judge", args, Judge(), ema=0.99)
        attributes = json.dumps([[name, list(values)] for name, values in ATTRIBUTES.items()])
        weights = {name: value.half().contiguous() for name, value in run.ema.state_dict().items()}
        save_file(weights, WEIGHTS, metadata={"attributes": attributes})
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return
    validation, scenes = data.load(args.work, "validation")
    truth = np.array([s.labels() for s in scenes])
    if args.evaluate:
        from diffusers import AutoencoderKL

        judge, vae = load(), AutoencoderKL.from_pretrained(args.evaluate, torch_dtype=torch.float32)
        right = {"true": [], "reconstructed": []}
        with torch.no_grad():
            for start in range(0, 512, 32):
                x = common.pictures_to_tensor(validation[start : start + 32])
                y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
                for name, pictures in (("true", x), ("reconstructed", y)):
                    right[name].append(predict(judge, pictures) == truth[start : start + 32])
        for name, rows in right.items():
            accuracy = np.concatenate(rows).mean(0)
            print(json.dumps({"pictures": name, "mean": round(float(accuracy.mean()), 4), **{k: round(float(a), 4) for k, a in zip(KINDS, accuracy)}}))
        return

    # Its own pictures, of every combination of attributes: it has to know the held-out ones too.
    rng = random.Random(args.seed)
    cache = args.work / "judge.npy"
    drawn = [sample_scene(rng) for _ in range(12288)]
    if not cache.exists():
        np.save(cache, np.stack([np.asarray(render(s)) for s in drawn]))
    pictures = np.load(cache, mmap_mode="r")
    labels = torch.tensor([s.labels() for s in drawn], device=args.device)
    judge = Judge().to(memory_format=torch.channels_last)
    run = common.Run("judge", args, judge, ema=0.99)
    for step in run.loop():
        rng = run.rng()
        index = rng.integers(len(pictures), size=args.batch)
        x = corrupt(common.pictures_to_tensor(pictures[index]).to(args.device), rng).contiguous(memory_format=torch.channels_last)
        with common.autocast(args.device):
            logits = judge(x).float()
        loss = sum(F.cross_entropy(p, labels[index, i]) for i, p in enumerate(logits.split(SIZES, dim=1))) / len(SIZES)
        run.update(loss)
        if run.step % 200 == 199:
            x = common.pictures_to_tensor(validation[:256]).to(args.device)
            print(json.dumps({"step": run.step + 1, "accuracy": float((predict(run.ema, x) == truth[:256]).mean())}), file=run.log)


if __name__ == "__main__":
    main()
