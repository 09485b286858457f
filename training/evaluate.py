"""Quality of `dinv` on analogies of the demo world whose true answer is known.

    python evaluate.py draw  --out DIR [--split validation] [--per-kind 13]   # pictures A, A', B, true B'
    python evaluate.py run   --out DIR --name default -- [dinv analogy flags]  # resumes by itself
    python evaluate.py score --out DIR --work WORK [--sheet sheet.png]         # a row for every name

`score` prints for every kind of edit the share of made B' that show the changed attribute and the
share of all other attributes that are kept, as the judge (judge.py) sees them, and the mean squared
error to the true B'. Tune on `validation`; `test` is for the last measurement alone.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from world import ATTRIBUTES, KINDS, Scene, render, sample_scene

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


def run(out: pathlib.Path, name: str, dinv: str, flags: list[str]):
    for folder in sorted((out / "pictures").iterdir()):
        result = out / name / folder.name
        if (result / "b_prime.png").exists():
            continue
        pictures = [f"--{flag}={folder / file}" for flag, file in (("a", "a.png"), ("a-prime", "a_prime.png"), ("b", "b.png"))]
        started = time.time()
        done = subprocess.run([dinv, "analogy", *pictures, "-o", str(result), "--overwrite", *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder.name}: {done.stderr}")
        print(folder.name, f"{time.time() - started:.1f} s", flush=True)


def score(out: pathlib.Path, work: pathlib.Path, sheet: pathlib.Path | None):
    import common
    import gates
    import judge as judging

    judge = judging.load(work)
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
    parser.add_argument("action", choices=("draw", "run", "score"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--split", choices=tuple(SEEDS), default="validation")
    parser.add_argument("--per-kind", type=int, default=13)
    parser.add_argument("--name", default="default")
    parser.add_argument("--dinv", default=str(pathlib.Path(__file__).parent.parent / "target/release/dinv"))
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--sheet", type=pathlib.Path)
    args = parser.parse_args()
    if args.action == "draw":
        draw(args.out, args.split, args.per_kind)
    elif args.action == "run":
        run(args.out, args.name, args.dinv, flags)
    else:
        score(args.out, args.work, args.sheet)


if __name__ == "__main__":
    main()
