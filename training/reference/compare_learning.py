"""Holds `dinv learn` against the PyTorch reference, step by step, in one run.

`dinv` draws timesteps and noise and writes a trace; the reference replays it. Prints the relative
error of the tokens and of the loss, and the median time of a step in both; exits with 1 if the
tokens differ by more than the tolerance.

    cargo build --release
    python training/reference/compare_learning.py --model demo/model --a a.png --a-prime b.png \
        --caption-a "…" --caption-a-prime "…"
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from learn_reference import Settings, add_arguments, run

TOLERANCE = 1e-3
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dinv", type=Path, default=Path("target/release/dinv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "dinv.safetensors"), Path(folder, "torch.safetensors")
        command = [args.dinv, "learn", "--model", args.model, "--a", args.a]
        command += ["--a-prime", args.a_prime, "--caption-a", args.caption_a]
        command += ["--caption-a-prime", args.caption_a_prime, "--steps", args.steps]
        command += ["--trace", ours, "-o", Path(folder, "difference.safetensors")]
        if args.clip:
            command += ["--clip", args.clip]
        for name in vars(Settings()):
            command += ["--" + name.replace("_", "-"), getattr(args, name)]
        subprocess.run([str(word) for word in command], check=True)
        found, expected = load_file(ours), run(args, ours, theirs)
    error = lambda x, y: float((x - y).norm() / y.norm())
    tokens = error(found["tokens"][-1], expected["tokens"][-1])
    print(f"after {args.steps} steps: relative error of the tokens {tokens:.1e},", end=" ")
    print(f"of the loss {error(found['loss'], expected['loss']):.1e}")
    ours, theirs = (float(x["seconds"][WARM_UP:].median()) * 1e3 for x in (found, expected))
    print(f"median step: dinv {ours:.1f} ms, PyTorch {theirs:.1f} ms, ratio {ours / theirs:.2f}")
    sys.exit(tokens > TOLERANCE)


if __name__ == "__main__":
    main()
