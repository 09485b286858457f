"""Quality of `dinv` on analogies of the demo world whose true answer is known.

    python evaluate.py draw  --out DIR [--split validation] [--per-kind 13]   # pictures A, A', B, true B'
    python evaluate.py run   --out DIR --name default -- [dinv analogy flags]  # resumes by itself
    python evaluate.py words --out DIR --name sdedit --inversion sdedit --guidance ordinary --guidance-scale 7.5 --skip 0.2
    python evaluate.py score --out DIR [--sheet sheet.png]                     # a row for every name

`words` makes B' from B with the true captions of B and B' in place of a learned difference.
`score` prints for every kind of edit the share of made B' that show the changed attribute and the
share of all other attributes that are kept, as the judge (judge.py) sees them, and the mean squared
error to the true B'. Tune on `validation`; `test` is for the last measurement alone.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from world import ATTRIBUTES, KINDS, Scene, caption, render, sample_scene

SEEDS = {"validation": 70, "test": 71}


def draw(out: pathlib.Path, split: str, per_kind: int):
    """Each analogy changes one attribute; A and B differ in everything but what the edit needs."""
    rng = random.Random(SEEDS[split])
    rows = []
    for number in range(per_kind * len(KINDS)):
        kind = KINDS[number % len(KINDS)]
        b_prime = sample_scene(rng, split)
        value = getattr(b_prime, kind)
        old = rng.choice([v for v in ATTRIBUTES[kind] if v != value])
        a = sample_scene(rng, "train").but(kind, old)
        while a.but(kind, value).split() != "train":
            a = sample_scene(rng, "train").but(kind, old)
        scenes = {"a": a, "a_prime": a.but(kind, value), "b": b_prime.but(kind, old), "b_prime": b_prime}
        folder = out / "pictures" / f"{number:03}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, scene in scenes.items():
            render(scene).save(folder / f"{name}.png")
        rows.append({"kind": kind, "value": value, **{k: vars(s) for k, s in scenes.items()}})
    (out / "analogies.json").write_text(json.dumps(rows))
    print(len(rows), "analogies")


def run(out: pathlib.Path, name: str, dinv: str, jobs: int, flags: list[str]):
    def solve(folder: pathlib.Path):
        result = out / name / folder.name
        if (result / "b_prime.png").exists():
            return
        pictures = [f"--{flag}={folder / file}" for flag, file in (("a", "a.png"), ("a-prime", "a_prime.png"), ("b", "b.png"))]
        command = [dinv, "analogy", *pictures, "-o", str(result), "--overwrite", *flags]
        threads = {"RAYON_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        started = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            raise SystemExit(f"{folder.name}: {done.stderr}")
        print(folder.name, f"{time.time() - started:.1f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(solve, sorted((out / "pictures").iterdir())))


def words(out: pathlib.Path, name: str, args):
    import torch

    import gates

    torch.set_grad_enabled(False)
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = gates.Model(args.model, args.steps)
    rows = json.loads((out / "analogies.json").read_text())
    for start in range(0, len(rows), 26):
        part = rows[start : start + 26]
        b, b_prime = ([Scene(**row[side]) for row in part] for side in ("b", "b_prime"))
        source, target = (model.encode_prompt([caption(scene) for scene in scenes]) for scenes in (b, b_prime))
        negative = source if args.guidance == "difference" else model.encode_prompt([""] * len(part))
        z = model.edit(model.encode_image(gates.tensor(b)), source, target, negative, args.inversion, args.guidance_scale, args.skip)
        for number, picture in enumerate(model.decode(z), start):
            folder = out / name / f"{number:03}"
            folder.mkdir(parents=True, exist_ok=True)
            gates.to_image(picture).save(folder / "b_prime.png")


def score(out: pathlib.Path, sheet: pathlib.Path | None):
    import common
    import gates
    import judge as judging

    judge = judging.load()
    rows = json.loads((out / "analogies.json").read_text())
    triples = [(r["kind"], Scene(**r["b"]), Scene(**r["b_prime"])) for r in rows]

    def pictures(folder, file):
        return common.pictures_to_tensor(np.stack([np.asarray(Image.open(folder / f"{i:03}" / file).convert("RGB")) for i in range(len(rows))]))

    true = pictures(out / "pictures", "b_prime.png")
    print("true B'", json.dumps(gates.report(judging.predict(judge, true), triples)))
    for folder in sorted(p for p in out.iterdir() if p.is_dir() and p.name != "pictures"):
        missing = [i for i in range(len(rows)) if not (folder / f"{i:03}" / "b_prime.png").exists()]
        if missing:
            print(folder.name, f"is not finished: {len(missing)} of {len(rows)} are missing")
            continue
        made = pictures(folder, "b_prime.png")
        table = gates.report(judging.predict(judge, made), triples)
        print(folder.name, json.dumps(table | {"mse": round(float(((made - true) / 2).pow(2).mean()), 5)}))
        if sheet:
            shown = range(min(16, len(rows)))
            columns = [pictures(out / "pictures", f"{n}.png")[list(shown)] for n in ("a", "a_prime", "b")]
            gates.save_sheet(sheet.with_stem(f"{sheet.stem}-{folder.name}"), [*columns, made[list(shown)], true[list(shown)]])


def main():
    flags = []
    if "--" in sys.argv:
        cut = sys.argv.index("--")
        flags, sys.argv = sys.argv[cut + 1 :], sys.argv[:cut]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("draw", "run", "words", "score"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--split", choices=tuple(SEEDS), default="validation")
    parser.add_argument("--per-kind", type=int, default=13)
    parser.add_argument("--name", default="default")
    parser.add_argument("--dinv", default=str(pathlib.Path(__file__).parent.parent / "target/release/dinv"))
    parser.add_argument("--jobs", type=int, default=1, help="analogies solved at a time, sharing the cores")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "demo/model")
    parser.add_argument("--inversion", choices=("edit-friendly", "ddim", "sdedit"), default="edit-friendly")
    parser.add_argument("--guidance", choices=("difference", "ordinary"), default="difference")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--skip", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sheet", type=pathlib.Path)
    args = parser.parse_args()
    if args.action == "draw":
        draw(args.out, args.split, args.per_kind)
    elif args.action == "run":
        run(args.out, args.name, args.dinv, args.jobs, flags)
    elif args.action == "words":
        words(args.out, args.name, args)
    else:
        score(args.out, args.sheet)


if __name__ == "__main__":
    main()
