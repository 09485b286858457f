"""Holds `dinv learn` against the PyTorch reference, step by step, in one run.

`dinv` draws timesteps and noise and writes a trace; the reference replays it. Prints the relative
error of the tokens and of the loss, and the time of a step in both; exits with 1 if the
tokens differ by more than the tolerance.

    cargo build --release
    python training/reference/compare_learning.py --model demo/model --a a.png --a-prime b.png \
        --caption-a "…" --caption-a-prime "…"
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from learn_reference import Settings, add_arguments, run

TOLERANCE = 1e-3
WARM_UP = 3
TIMED = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dinv", type=Path, default=Path("target/release/dinv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "dinv.safetensors"), Path(folder, "torch.safetensors")

        def learn(steps: int, *flags) -> float:
            """Seconds that `dinv` says it took."""
            command = [args.dinv, "learn", "--quiet", "--json", "--overwrite", "--model", args.model]
            command += ["--a", args.a, "--a-prime", args.a_prime, "--caption-a", args.caption_a]
            command += ["--caption-a-prime", args.caption_a_prime, "--steps", steps, *flags]
            command += ["--clip-first", 0, "--clip-thinned", 0, "--max-norm", 1e36]
            command += ["-o", Path(folder, "difference.safetensors")]
            for clip in args.clip or []:
                command += ["--clip", clip]
            for name in vars(Settings()):
                command += ["--" + name.replace("_", "-"), getattr(args, name)]
            done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
            return json.loads(done.stdout)["seconds"]

        learn(args.steps, "--trace", ours)
        found, expected = load_file(ours), run(args, ours, theirs)
        # Loading and encoding take the same time in both runs, so the difference is steps alone.
        times = [learn(steps, "--select-every", 0) for steps in (args.steps, args.steps + TIMED)]
    error = lambda x, y: float((x - y).norm() / y.norm())
    names = [name for name in expected if name.startswith("tokens")]
    tokens = max(error(found[name][-1], expected[name][-1]) for name in names)
    print(f"after {args.steps} steps: relative error of the tokens {tokens:.1e},", end=" ")
    print(f"of the loss {error(found['loss'], expected['loss']):.1e}")
    ours = (times[1] - times[0]) / TIMED * 1e3
    theirs = float(expected["seconds"][WARM_UP:].median()) * 1e3
    print(f"a step: dinv {ours:.1f} ms (mean), PyTorch {theirs:.1f} ms (median), ratio {ours / theirs:.2f}")
    sys.exit(tokens > TOLERANCE)


if __name__ == "__main__":
    main()
