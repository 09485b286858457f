"""Times the same step in PyTorch and in this crate, in turns, and prints a table.

    python benches/compare/compare.py FOLDER [--pixels 256] [--what step|call] [--repeats 7]

FOLDER holds what `make_weights.py` wrote. Every worker is a process of its own that works when it
is told to and waits otherwise. Wall time, CPU time (user and system) and the most memory ever
resident, while the models are opened and while it works, are the system's figures for that
process. The first loss and gradient of all of them
must agree, or nothing is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
TOLERANCE = 2e-3
TICKS = os.sysconf("SC_CLK_TCK")


class Worker:
    def __init__(self, name: str, command: list, threads: int):
        self.name, self.wall, self.cpu, self.results = name, [], [], []
        command = [str(word) for word in command]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
            "MIMALLOC_PURGE_DELAY": "10000",  # as the program has it
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.read("ready")
        self.opening = self.memory("VmHWM")
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak starts anew

    def read(self, expected: str = "") -> str:
        line = self.process.stdout.readline()
        if not line.startswith(expected) or not line:
            raise SystemExit(f"{self.name} stopped: {line}")
        return line

    def cpu_time(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self, field: str) -> float:
        """Peak (VmHWM) or present (VmRSS) resident memory in GB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9

    def work(self) -> None:
        cpu, began = self.cpu_time(), time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.read("[")
        self.wall.append(time.perf_counter() - began)
        self.cpu.append(self.cpu_time() - cpu)
        self.results.append(json.loads(line))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def write_transformer_inputs(path: Path, config: dict, pixels: int, draws: int) -> None:
    """Random latents and prompts of a flow-matching transformer."""
    torch.manual_seed(1)
    is_flux = config["_class_name"] == "FluxTransformer2DModel"
    rows, side = 2 * draws, pixels // 8
    latents = rows, 16, side, side
    save_file({
        "noisy": torch.randn(latents),
        "target": torch.randn(latents),
        "timesteps": (1000 * torch.rand(draws)).repeat(2),
        "context": torch.randn(rows, 512 if is_flux else 77 + 256, config["joint_attention_dim"]),
        "pooled": torch.randn(rows, config["pooled_projection_dim"]),
    }, path)


def write_inputs(path: Path, model: Path, pixels: int, draws: int, num_tokens: int) -> None:
    """The inputs of a step: of a U-Net, random latents, prompts of 10 words, and difference tokens of the size of learned ones."""
    transformer = model / "transformer/config.json"
    if transformer.exists():
        return write_transformer_inputs(path, json.loads(transformer.read_text()), pixels, draws)
    torch.manual_seed(1)
    configs = [json.loads((f / "config.json").read_text()) for f in sorted(model.glob("text_*"))]
    unet = json.loads((model / "unet/config.json").read_text())
    length, end = configs[0]["max_position_embeddings"], configs[0]["eos_token_id"]
    words, side = 10, pixels // (4 if length == 64 else 8)
    rows = 2 * draws
    ids = torch.randint(0, end - 1, (2, length))
    ids[:, 0], ids[:, 1 + words + num_tokens :] = end - 1, end
    alone = torch.zeros(1, num_tokens + 2, dtype=torch.long)
    alone[0, 0], alone[0, -1] = end - 1, end
    inputs = {
        "noisy": torch.randn(rows, unet["in_channels"], side, side),
        "target": torch.randn(rows, unet["out_channels"], side, side),
        "timesteps": torch.randint(0, 1000, (draws,)).repeat(2).float(),
        "context": torch.randn(2, length, unet["cross_attention_dim"]),
        "ids": ids.int(),
        "ids_alone": alone.int(),
        "starts": torch.tensor([1 + words] * 2).int(),
    }
    for number, config in enumerate(configs):
        inputs[f"tokens.{number}"] = 0.02 * torch.randn(num_tokens, config["hidden_size"])
        inputs[f"delta.{number}"] = torch.nn.functional.normalize(
            torch.randn(1, config["projection_dim"]), dim=1
        )
    if len(configs) > 1:
        inputs["text_embeds"] = torch.randn(2, configs[-1]["projection_dim"])
        inputs["time_ids"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2).float()
    save_file(inputs, path)


def workers(args: argparse.Namespace, inputs: Path):
    """The commands of the ways that are asked for."""
    torch_step = [sys.executable, HERE / "torch_step.py", args.model, inputs, args.what]
    step = [args.binary.resolve(), args.model, inputs, args.what]
    ways = {
        "torch": ("PyTorch", torch_step),
        "torch-cl": ("PyTorch, channels last", [*torch_step, "--channels-last"]),
        "dinv": ("dinv", step),
    }
    for flags in args.dinv:
        ways[flags] = (f"dinv {flags}", [*step, *flags.split()])
    names = [*filter(None, args.ways.split(",")), *args.dinv]
    return [ways[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--what", choices=("step", "call"), default="step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--draws", type=int, default=1, help="noises a step; two rows each")
    parser.add_argument("--num-tokens", type=int, default=10)
    parser.add_argument("--ways", default="torch,torch-cl,dinv")
    parser.add_argument("--dinv", action="append", default=[], metavar="FLAGS",
                        help="dinv once more, with these flags of its worker")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", type=Path, required=True, help="the worker; see README.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs.safetensors")
        write_inputs(inputs, args.model, args.pixels, args.draws, args.num_tokens)
        all_workers = [Worker(name, command, args.threads) for name, command in workers(args, inputs)]
        for number in range(1 + args.repeats):  # the first warms up
            for worker in all_workers:
                worker.work()
            print(number, *(f"{w.name}: {w.wall[-1]:.2f} s" for w in all_workers), file=sys.stderr)
    first = all_workers[0]
    for worker in all_workers:
        for found, expected in zip(worker.results[0], first.results[0]):
            if abs(found - expected) > TOLERANCE * abs(expected):
                raise SystemExit(f"{worker.name} found {worker.results[0]}, {first.name} {first.results[0]}")
    print(f"{args.model.name}, {args.what}, {args.pixels} px, {2 * args.draws} rows, {args.threads} threads,", end=" ")
    print(f"medians of {args.repeats}; loss and gradient {first.results[0]}")
    print("| | wall | CPU | memory opening | peak memory |\n|---|---|---|---|---|")
    median = lambda values: statistics.median(values[1:])
    base = min((w for w in all_workers if w.name.startswith("PyTorch")),
               key=lambda w: median(w.cpu), default=first)
    peaks = {w.name: w.memory("VmHWM") for w in all_workers}
    for w in all_workers:
        w.close()
        wall, cpu, peak = median(w.wall), median(w.cpu), peaks[w.name]
        print(f"| {w.name} | {wall:.2f} s ({wall / median(base.wall):.2f}) ", end="")
        print(f"| {cpu:.2f} s ({cpu / median(base.cpu):.2f}) | {w.opening:.2f} GB ", end="")
        print(f"| {peak:.2f} GB ({peak / peaks[base.name]:.2f}) |")


if __name__ == "__main__":
    main()
