"""Teaches the demo model's U-Net to look at a picture, from its own weights with new channels.

    python train_conditioned.py instruct --work WORK --model ../demo/model             # resumes by itself
    python train_conditioned.py inpaint  --work WORK --model ../demo/model
    python train_conditioned.py instruct --work WORK --model ../demo/model --export    # unet_instruct_pix2pix/
    python train_conditioned.py inpaint  --work WORK --model ../demo/model --export    # unet_inpaint/

`instruct` is InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): four more channels hold the
picture before, the text asks for a change. `inpaint` has five more, the mask and the picture
without what it covers; it is trained on single pictures and on 2x2 grids A, A' above B, B' with one
cell covered. Channels are in the order and scaling of diffusers' pipelines. The loss and the
schedule are those of train_unet.py; the text encoder stays as it was trained on captions.
"""

import json
import pathlib
import random

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import common
from train_unet import EMPTY_PROMPT, Frozen, draw_timesteps, encode, velocity_loss
from world import KINDS, SIZE, Scene, analogy, instruction, random_caption, render, sample_scene

FOLDERS = {"instruct": "unet_instruct_pix2pix", "inpaint": "unet_inpaint"}
CHANNELS = {"instruct": 8, "inpaint": 9}
LATENTS = {"instruct": SIZE // 8, "inpaint": 2 * SIZE // 8}  # what is drawn if nobody says a size: a grid
GRID = ("a", "a_prime", "b", "b_prime")  # left to right, top to bottom
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))


def build(model: pathlib.Path, task: str) -> UNet2DConditionModel:
    """The model's U-Net with more input channels, which count for nothing yet."""
    plain = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    changes = {"in_channels": CHANNELS[task], "sample_size": LATENTS[task]}
    unet = UNet2DConditionModel.from_config({**plain.config, **changes})
    weights = plain.state_dict()
    kernel = torch.zeros_like(unet.conv_in.weight)
    kernel[:, :4] = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": kernel})
    return unet.to(memory_format=torch.channels_last)


def pictures(scenes: list[Scene]) -> np.ndarray:
    return np.stack([np.asarray(render(scene)) for scene in scenes])


def once(path: pathlib.Path, make):
    """What `make` returns, kept in a file."""
    if not path.exists():
        torch.save(make(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return torch.load(path)


# ---------------------------------------------------------------------------------------------
# Following an instruction
# ---------------------------------------------------------------------------------------------


def quads(count: int, seed: int) -> list[list[Scene]]:
    """Four scenes of one seed: a scene, two edits of one attribute each, and both edits together.
    Any two of them are a pair that differs in one or in two attributes."""
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        first, second = rng.sample(KINDS, 2)
        scene, other = sample_scene(rng, "train"), sample_scene(rng)
        if getattr(scene, first) == getattr(other, first) or getattr(scene, second) == getattr(other, second):
            continue
        quad = [scene, scene.but(first, getattr(other, first))]
        quad += [s.but(second, getattr(other, second)) for s in quad]
        if all(s.split() == "train" for s in quad):
            found.append(quad)
    return found


class Instruct:
    def __init__(self, args, frozen: Frozen):
        self.scenes = quads(args.scenes or 2000, args.seed)
        flat = [scene for quad in self.scenes for scene in quad]
        self.mean, self.std = once(args.work / "quads.pt", lambda: encode(frozen.vae, pictures(flat)))
        self.scale = frozen.vae.config.scaling_factor
        self.batch = args.batch

    def draw(self, rng: np.random.Generator, words: random.Random):
        """Latents to draw, texts, more channels, and how much each place counts."""
        quad = rng.integers(len(self.scenes), size=self.batch)
        before = rng.integers(4, size=self.batch)
        after = (before + rng.integers(1, 4, size=self.batch)) % 4
        texts = [instruction(words, self.scenes[q][i], self.scenes[q][j]) for q, i, j in zip(quad, before, after)]
        image = self.mean[4 * quad + before] / self.scale  # as diffusers gives it: the mode, not scaled
        for n in range(self.batch):  # 5 % without the text, 5 % without the picture, 5 % without both
            dice = words.random()
            if dice < 0.10:
                texts[n] = ""
            if 0.05 <= dice < 0.15:
                image[n] = 0
        target = 4 * quad + after
        yield self.mean[target] + self.std[target] * torch.randn_like(image), texts, [image], None


# ---------------------------------------------------------------------------------------------
# Filling what is covered
# ---------------------------------------------------------------------------------------------


def rectangle(rng: random.Random) -> np.ndarray:
    """A mask [128, 128]: one rectangle, now and then the whole picture."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    width, height = (SIZE, SIZE) if rng.random() < 0.15 else (rng.randint(24, SIZE), rng.randint(24, SIZE))
    left, top = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
    mask[top : top + height, left : left + width] = 1
    return mask


def cell(number: int) -> np.ndarray:
    """A mask [256, 256] of one of the four cells."""
    mask = np.zeros((2, SIZE, 2, SIZE), np.uint8)
    row, column = CELLS[number]
    mask[row, :, column] = 1
    return mask.reshape(2 * SIZE, 2 * SIZE)


def grid(scenes: dict[str, Scene]) -> np.ndarray:
    a, a_prime, b, b_prime = pictures([scenes[name] for name in GRID])
    return np.concatenate([np.concatenate([a, a_prime], 1), np.concatenate([b, b_prime], 1)], 0)


def covered(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey (zero, in [-1, 1]) where the mask is."""
    return np.where(mask[..., None] == 1, np.uint8(128), picture)


class Pool:
    """Pictures, the same covered, their masks, all as latents, and who is in them."""

    def __init__(self, path: pathlib.Path, vae, draw, scenes: list, masks: list[np.ndarray]):
        def make():
            whole = [draw(scene) for scene in scenes]
            return encode(vae, np.stack(whole)), encode(vae, np.stack([covered(p, m) for p, m in zip(whole, masks)]))

        self.whole, self.covered = once(path, make)
        self.masks = torch.from_numpy(np.stack(masks)[:, None, ::8, ::8].copy()).float()  # "nearest", as diffusers does

    def draw(self, index):
        x, given = (mean[index] + std[index] * torch.randn_like(mean[index]) for mean, std in (self.whole, self.covered))
        mask = self.masks[index]
        return x, [mask, given], 0.1 + 0.9 * mask


class Inpaint:
    def __init__(self, args, frozen: Frozen):
        rng = random.Random(args.seed)
        self.singles = [sample_scene(rng, "train") for _ in range(args.scenes or 2400)]
        self.grids = [analogy(rng, tuple(rng.sample(KINDS, rng.choice((1, 1, 2)))), "train") for _ in range((args.scenes or 2400) // 2)]
        self.cells = [3 if rng.random() < 0.75 else rng.randrange(3) for _ in self.grids]
        masks = [rectangle(rng) for _ in self.singles]
        self.pools = (
            Pool(args.work / "singles.pt", frozen.vae, lambda scene: np.asarray(render(scene)), self.singles, masks),
            Pool(args.work / "grids.pt", frozen.vae, grid, self.grids, [cell(c) for c in self.cells]),
        )
        self.batch = args.batch

    def prompt(self, words: random.Random, number: int) -> str:
        """A caption of what is covered, a few words on what changes, or nothing."""
        names = GRID[self.cells[number]]
        scene, dice = self.grids[number][names], words.random()
        if dice < 0.2:
            return ""
        if dice < 0.4:
            partner = self.grids[number][names.removesuffix("_prime") if names.endswith("_prime") else f"{names}_prime"]
            return instruction(words, partner, scene)
        return random_caption(words, scene)[0]

    def draw(self, rng: np.random.Generator, words: random.Random):
        """A quarter of the batch are single pictures, the rest are the cells of grids."""
        index = rng.integers(len(self.singles), size=self.batch // 4)
        texts = ["" if words.random() < EMPTY_PROMPT else random_caption(words, self.singles[i])[0] for i in index]
        x, given, where = self.pools[0].draw(index)
        yield x, texts, given, where
        index = rng.integers(len(self.grids), size=3 * self.batch // 16)
        x, given, where = self.pools[1].draw(index)
        yield x, [self.prompt(words, i) for i in index], given, where


def main():
    parser = common.arguments(__doc__, steps=2200, batch=16, lr=1.5e-3, seed=31)
    parser.add_argument("task", choices=tuple(FOLDERS))
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--scenes", type=int, default=0, help="size of the pool of latents")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    unet = build(args.model, args.task)
    print("parameters:", sum(p.numel() for p in unet.parameters()), flush=True)
    run = common.Run(args.task, args, unet, ema=0.997)
    if args.export:
        run.ema.half().save_pretrained(args.model / FOLDERS[args.task])
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return
    frozen = Frozen(args.model)
    task = {"instruct": Instruct, "inpaint": Inpaint}[args.task](args, frozen)
    for step in run.loop():
        rng, words = run.rng(), random.Random(args.seed * 1_000_003 + step)
        losses, terms = [], {}
        for x, texts, given, where in task.draw(rng, words):
            t = draw_timesteps(len(x))
            loss, error = velocity_loss(unet, frozen, x, torch.randn_like(x), t, texts, given, where)
            losses.append(loss)
            terms[f"mse{x.shape[-1]}"] = error.mean().item()
        run.update(sum(losses) / len(losses), **terms)


if __name__ == "__main__":
    main()
