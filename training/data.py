"""Draws the training pictures once and keeps them as one array of bytes.

    python data.py --out WORK            # WORK/{train,validation}.npy and .json, about 3.3 GB
"""

import argparse
import dataclasses
import json
import pathlib
import random

import numpy as np
import torch

import common
from world import SIZE, Scene, render, sample_scene

SEEDS = {"train": 1, "validation": 2}
COUNTS = {"train": 65536, "validation": 1024}


def draw(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene))


def pictures(scenes: list[Scene]) -> np.ndarray:
    """uint8 [n, 128, 128, 3]"""
    return np.stack(common.spread(draw, scenes))


def scenes(split: str, count: int) -> list[Scene]:
    rng = random.Random(SEEDS[split])
    return [sample_scene(rng, split) for _ in range(count)]


def load(folder: pathlib.Path, split: str, device: str | None = None):
    """The pictures (uint8 [n, 128, 128, 3]) and their scenes: memory-mapped, or as a tensor on a device."""
    path = folder / f"{split}.npy"
    told = [Scene(**s) for s in json.loads((folder / f"{split}.json").read_text())]
    if device is None:
        return np.load(path, mmap_mode="c"), told  # copy on write: PyTorch wants writable memory
    mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
    return mapped if torch.device(device).type == "cpu" else mapped.to(device), told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=COUNTS["train"], help="training pictures, and at most so many for validation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        drawn = scenes(split, args.count if split == "train" else min(args.count, COUNTS[split]))
        made = pictures(drawn)
        np.save(args.out / f"{split}.npy", made)
        (args.out / f"{split}.json").write_text(json.dumps([dataclasses.asdict(s) for s in drawn]))
        print(split, made.shape, flush=True)


if __name__ == "__main__":
    main()
