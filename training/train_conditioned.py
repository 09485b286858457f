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
import data
from train_unet import EMPTY_PROMPT, Frozen, Texts, captions, drawn_once, encode, once, velocity_loss
from world import KINDS, SIZE, Scene, analogy, instruction, sample_scene

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


def instructions(quad: list[Scene], variants: int = 2) -> list[list[str]]:
    """Ways to say each change of the `i`-th scene into the `(i + n) % 4`-th, in the order `3 * i + n - 1`."""
    rng = random.Random(quad[0].seed)
    return [[instruction(rng, quad[i], quad[(i + n) % 4]) for _ in range(variants)] for i in range(4) for n in (1, 2, 3)]


class Instruct:
    def __init__(self, args):
        self.scenes = quads(args.scenes or 16384, args.seed)
        flat = [scene for quad in self.scenes for scene in quad]
        self.pictures = drawn_once(args.work / "quads.npy", lambda: data.pictures(flat))
        self.latents, self.batch, self.device = args.work / "quads.pt", args.batch, args.device

    def encode(self, frozen: Frozen):
        self.mean, self.std = once(self.latents, self.device, lambda: encode(frozen.vae, self.pictures))
        self.texts = Texts(frozen, [variants for changes in common.spread(instructions, self.scenes) for variants in changes])
        self.scale = frozen.vae.config.scaling_factor

    def draw(self):
        """Latents to draw, states of a text, more channels, and how much each place counts."""
        quad, before, n = (torch.randint(*limits, (self.batch,), device=self.device) for limits in ((0, len(self.scenes)), (0, 4), (1, 4)))
        dice = torch.rand(self.batch, device=self.device)  # 5 % without the text, 5 % without the picture, 5 % without both
        states = self.texts.draw(12 * quad + 3 * before + n - 1, dice < 0.10)
        image = self.mean[4 * quad + before] / self.scale  # as diffusers gives it: the mode, not scaled
        image = torch.where(((dice >= 0.05) & (dice < 0.15))[:, None, None, None], 0.0, image)
        target = 4 * quad + (before + n) % 4
        yield self.mean[target] + self.std[target] * torch.randn_like(image), states, [image], None


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
    a, a_prime, b, b_prime = (data.draw(scenes[name]) for name in GRID)
    return np.concatenate([np.concatenate([a, a_prime], 1), np.concatenate([b, b_prime], 1)], 0)


def covered(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey (zero, in [-1, 1]) where the mask is."""
    return np.where(mask[..., None] == 1, np.uint8(128), picture)


class Pool:
    """Pictures, the same covered, and their masks; and what may be said of what is covered."""

    def __init__(self, path: pathlib.Path, draw, scenes: list, masks: list[np.ndarray], texts: list[list[str]], empty: float):
        self.pictures = drawn_once(path.with_suffix(".npy"), lambda: np.stack(common.spread(draw, scenes)))
        self.latents, self.masks, self.texts, self.empty = path.with_suffix(".pt"), masks, texts, empty

    def encode(self, frozen: Frozen):
        self.texts = Texts(frozen, self.texts)
        self.whole, self.covered = once(self.latents, frozen.device, lambda: self.encoded(frozen))
        self.masks = torch.from_numpy(np.stack(self.masks)[:, None, ::8, ::8].copy()).float().to(frozen.device)  # "nearest", as diffusers does

    def encoded(self, frozen: Frozen):
        return encode(frozen.vae, self.pictures), encode(frozen.vae, np.stack([covered(p, m) for p, m in zip(self.pictures, self.masks)]))

    def draw(self, count: int):
        """Latents to draw, states of a text, more channels, and how much each place counts."""
        index = torch.randint(len(self.masks), (count,), device=self.masks.device)
        x, given = (mean[index] + std[index] * torch.randn_like(mean[index]) for mean, std in (self.whole, self.covered))
        mask = self.masks[index]
        return x, self.texts.draw(index, self.empty), [mask, given], 0.1 + 0.9 * mask


def said(scenes: dict[str, Scene], number: int) -> list[str]:
    """Of the covered cell: captions, and as often as one in four a few words on what changes."""
    name = GRID[number]
    partner = scenes[name.removesuffix("_prime") if name.endswith("_prime") else f"{name}_prime"]
    return [*captions(scenes[name], 3), instruction(random.Random(scenes[name].seed), partner, scenes[name])]


class Inpaint:
    """A quarter of the batch are single pictures, the rest are the cells of grids."""

    def __init__(self, args):
        rng, count = random.Random(args.seed), args.scenes or 24576
        singles = [sample_scene(rng, "train") for _ in range(count)]
        grids = [analogy(rng, tuple(rng.sample(KINDS, rng.choice((1, 1, 2)))), "train") for _ in range(count // 2)]
        cells = [3 if rng.random() < 0.75 else rng.randrange(3) for _ in grids]
        masks = [rectangle(rng) for _ in singles]
        self.pools = (
            Pool(args.work / "singles", data.draw, singles, masks, common.spread(captions, singles), EMPTY_PROMPT),
            Pool(args.work / "grids", grid, grids, [cell(c) for c in cells], [said(*pair) for pair in zip(grids, cells)], 0.2),
        )
        self.counts = (args.batch // 4, 3 * args.batch // 16)

    def encode(self, frozen: Frozen):
        for pool in self.pools:
            pool.encode(frozen)

    def draw(self):
        for pool, count in zip(self.pools, self.counts):
            yield pool.draw(count)


def main():
    parser = common.arguments(__doc__, steps=10000, batch=128, lr=1.5e-3, seed=31)
    parser.add_argument("task", choices=tuple(FOLDERS))
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--scenes", type=int, default=0, help="size of the pool of pictures")
    parser.add_argument("--prepare", action="store_true", help="only draw the pool of pictures")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    tasks = {"instruct": Instruct, "inpaint": Inpaint}
    if args.prepare:
        tasks[args.task](args)
        return
    unet = build(args.model, args.task)
    print("parameters:", sum(p.numel() for p in unet.parameters()), flush=True)
    run = common.Run(args.task, args, unet, ema=0.998)
    if args.export:
        run.ema.half().save_pretrained(args.model / FOLDERS[args.task])
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return
    frozen, task = Frozen(args.model, args.device), tasks[args.task](args)
    task.encode(frozen)
    forward = common.compiled(unet, args)

    def step():
        losses, terms = [], {}
        for x, states, given, where in task.draw():
            loss, error = velocity_loss(forward, frozen, x, states, given, where)
            losses.append(loss)
            terms[f"mse{x.shape[-1]}"] = error.mean()
        return sum(losses) / len(losses), terms

    for _ in run.loop(step):
        pass


if __name__ == "__main__":
    main()
