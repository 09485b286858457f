"""Writes the benchmark's demo suites: folders of pictures and a manifest that any tool can read.

    python suite.py --out ../demo/benchmark
    python suite.py --out half --captions half

`test` is for the last measurement alone; everything is tuned on `validation`. B' is a held-out
combination of object, colour and ground, A and A' are not, and A differs from B in everything that
the edit leaves alone. Every kind of edit occurs equally often, every pair of kinds as well, and
every prefix of the manifest is as balanced as it can be. `validation` was extended after its first 92
analogies, which stayed as they were. With `--captions half`, the captions of an analogy name four of the eight
attributes, the same four for all of its pictures: half of what changes is not in the captions.
"""

import argparse
import json
import pathlib
import random

from world import ATTRIBUTES, KINDS, SIZE, analogy, caption, instruction, render

VERSIONS = {"validation": 2, "test": 1}
SEEDS = {"validation": 80, "test": 81}
# Parts of a suite, one after the other: analogies of each kind, of each pair of kinds.
COUNTS = {"validation": ((8, 1), (8, 4)), "test": ((16, 3),)}
CELLS = ("a", "a_prime", "b", "b_prime")


FOLDER = pathlib.Path(__file__).resolve().parent.parent / "demo/benchmark"


def read(split: str) -> list[dict]:
    """The manifest, its pictures' paths made whole."""
    lines = (FOLDER / split / "manifest.jsonl").read_text().splitlines()
    return [row | {cell: FOLDER / split / row[cell] for cell in CELLS} for row in map(json.loads, lines)]


def pairs() -> list[tuple[str, str]]:
    """All 28 pairs of kinds, in the order of a round-robin tournament: four in a row name all eight."""
    first, *ring = KINDS
    rounds = []
    for _ in range(len(ring)):
        rounds += [(first, ring[0])] + [(ring[i], ring[-i]) for i in range(1, len(KINDS) // 2)]
        ring = ring[1:] + ring[:1]
    return [tuple(sorted(pair, key=KINDS.index)) for pair in rounds]


def order(counts: tuple[int, int]) -> list[tuple[str, ...]]:
    """The kinds of every analogy of a part, evenly mixed."""
    timed = []
    for count, kinds in zip(counts, ([(kind,) for kind in KINDS], pairs())):
        timed += [((turn + (n + 0.5) / len(kinds)) / count, k) for turn in range(count) for n, k in enumerate(kinds)]
    return [k for _, k in sorted(timed, key=lambda entry: entry[0])]


def write(out: pathlib.Path, split: str, captions: str):
    rng = random.Random(SEEDS[split])
    told = random.Random(SEEDS[split])
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, kinds in enumerate(kinds for counts in COUNTS[split] for kinds in order(counts)):
        scenes = analogy(rng, kinds, split)
        name = f"{number:03}"
        named = {"full": KINDS, "half": tuple(told.sample(KINDS, len(KINDS) // 2))}[captions]
        (out / name).mkdir(exist_ok=True)
        for cell in CELLS:
            render(scenes[cell]).save(out / name / f"{cell}.png", optimize=True)
        rows.append({
            "name": name,
            "kind": "+".join(kinds),
            **{cell: f"{name}/{cell}.png" for cell in CELLS},
            "captions": {cell: caption(scenes[cell], named) for cell in CELLS},
            "instruction": instruction(None, scenes["a"], scenes["a_prime"]),
            "attributes": {cell: {kind: getattr(scenes[cell], kind) for kind in KINDS} for cell in CELLS},
        })
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "name": {"full": "demo", "half": "demo-half-captions"}[captions], "version": VERSIONS[split], "split": split, "seed": SEEDS[split], "analogies": len(rows), "size": SIZE,
        "license": "MIT OR Apache-2.0", "credit": "Drawn by training/world.py of Difference Inversion.",
        "attributes": ATTRIBUTES,
    }
    (out / "suite.json").write_text(json.dumps(about, indent=2) + "\n")
    print(split, len(rows), "analogies,", sum(p.stat().st_size for p in out.rglob("*") if p.is_file()), "bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--captions", choices=("full", "half"), default="full")
    args = parser.parse_args()
    if args.captions != "full" and args.out == FOLDER:
        parser.error("--captions half needs --out: the benchmark's own captions are full")
    for split in COUNTS:
        write(args.out / split, split, args.captions)


if __name__ == "__main__":
    main()
