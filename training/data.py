"""Draws the training pictures once and keeps them as one array of bytes.

    python data.py --out WORK            # WORK/{train,validation}.npy and .json, about 1.3 GB
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import random

import numpy as np

from world import Scene, render, sample_scene

SEEDS = {"train": 1, "validation": 2}
COUNTS = {"train": 24576, "validation": 1024}


def _draw(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene))


def scenes(split: str) -> list[Scene]:
    rng = random.Random(SEEDS[split])
    return [sample_scene(rng, split) for _ in range(COUNTS[split])]


def load(folder: pathlib.Path, split: str):
    """The pictures (uint8 [n, 128, 128, 3], memory-mapped) and their scenes."""
    pictures = np.load(folder / f"{split}.npy", mmap_mode="r")
    return pictures, [Scene(**s) for s in json.loads((folder / f"{split}.json").read_text())]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        drawn = scenes(split)
        with multiprocessing.Pool() as pool:
            pictures = np.stack(pool.map(_draw, drawn, chunksize=64))
        np.save(args.out / f"{split}.npy", pictures)
        (args.out / f"{split}.json").write_text(json.dumps([dataclasses.asdict(s) for s in drawn]))
        print(split, pictures.shape, flush=True)


if __name__ == "__main__":
    main()
