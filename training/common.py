"""What every training script shares: arguments, resuming, the learning rate, the moving average."""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import pathlib
import time

import numpy as np
import torch


def arguments(description: str, *, steps: int, batch: int, lr: float, seed: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of data, checkpoints and logs")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seconds", type=float, help="train for this time instead of --steps")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="on a GPU, launch every kernel by itself instead of a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="compile the network, which takes a minute or more")
    return parser


def learning_rate(step: int, progress: float, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak; `progress` is the share of the run that is done."""
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def pictures_to_tensor(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1], in the memory's own order (channels last)."""
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(np.ascontiguousarray(pictures))
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether it computes in bfloat16; other processors would only emulate it, which is slower than float32."""
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device))


def compiled(function, args):
    return torch.compile(function, dynamic=False) if args.compile else function


def spread(function, items: list, chunk: int = 64) -> list:
    """`function` of every item, on all cores."""
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(function, items, chunksize=chunk)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024),
    scaled to AdamW's update size as in Liu et al. 2025 ("Muon is scalable for LLM training").
    For weight matrices; convolutions are seen as [out, in * h * w]. Matrices of one shape are
    orthogonalised together."""

    def __init__(self, parameters, lr: torch.Tensor, momentum: float = 0.95, weight_decay: float = 0.01):
        shapes: dict[tuple[int, int], list] = {}
        for p in parameters:
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        groups = [{"params": alike} for alike in shapes.values()]
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @staticmethod
    def orthogonalise(g: torch.Tensor) -> torch.Tensor:
        """Of matrices [n, rows, columns]."""
        x = g.bfloat16() if has_bfloat16(g.device) else g
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta, gradients = [self.state[p]["momentum"] for p in parameters], [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            looked_ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = self.orthogonalise(torch.stack([g.flatten(1) for g in looked_ahead]))
            updates = updates * (-0.2 * max(updates.shape[1:]) ** 0.5 * group["lr"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, [u.view(p.shape) for u, p in zip(updates, parameters)])


def is_matrix(module: torch.nn.Module, p: torch.nn.Parameter) -> bool:
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16


class Run:
    """A training run that resumes where it stopped: `for _ in run.loop(forward): pass`, where `forward` draws
    a batch and returns the loss and a dictionary of terms for the log; or, where a batch needs work on the CPU,
    `for step in run.loop(): run.update(loss)`.

    On a GPU, a step is thousands of small kernels, which take longer to launch than to run. So a step of
    `loop(forward)` is captured once as a CUDA graph. `forward` may not wait for the GPU, and draws from
    PyTorch's generator alone."""

    def __init__(self, name: str, args, modules: torch.nn.Module, ema: float = 0.0, extras: dict | None = None):
        """`extras` are saved and restored, but not trained: whatever has a state_dict."""
        self.name, self.args, self.module = name, args, modules.to(args.device)
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("high")
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        matrices = {id(p) for m in modules.modules() for p in m.parameters(recurse=False) if is_matrix(m, p)}
        # Numbers that change from step to step are tensors, so that a CUDA graph can read them.
        self.lr, self.decay = torch.zeros((), device=args.device), torch.zeros((), device=args.device)
        on_gpu = torch.device(args.device).type == "cuda"
        self.graph, self.steps_until_graph = None, 4 if on_gpu and not args.eager else None
        self.optimizers = [
            Muon([p for p in self.parameters if id(p) in matrices], lr=self.lr),
            torch.optim.AdamW(
                [p for p in self.parameters if id(p) not in matrices], lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=on_gpu, capturable=on_gpu
            ),
        ]
        self.ema_decay = ema
        self.ema = copy.deepcopy(modules).requires_grad_(False) if ema else None
        self.extras = extras or {}
        self.path = args.work / f"{name}.ckpt"
        self.log = open(args.work / f"{name}.log", "a", buffering=1)
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=False, map_location=args.device)
            modules.load_state_dict(state["module"])
            if not getattr(args, "export", None):
                for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            for key, extra in self.extras.items():
                extra.load_state_dict(state[key])
            self.step, self.seconds = state["step"], state["seconds"]
        self.began = time.time() - self.seconds
        self.recent: dict[str, list[torch.Tensor]] = {}

    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.args.seconds:
            return min(1.0, (time.time() - self.began) / self.args.seconds)
        return min(1.0, self.step / self.args.steps)

    def seed(self):
        """The same draws for a step, whether the run was interrupted or not."""
        torch.manual_seed(self.args.seed * 1_000_003 + self.step)

    def rng(self) -> np.random.Generator:
        """The same draws for a step, from NumPy's generator too."""
        self.seed()
        return np.random.default_rng([self.args.seed, self.step])

    def save(self):
        self.seconds = time.time() - self.began
        state = {"module": self.module.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step, "seconds": self.seconds}
        state |= {key: extra.state_dict() for key, extra in self.extras.items()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def loop(self, forward=None):
        """Yields the number of each step, after it was taken if there is a `forward`."""
        self.began = time.time() - self.seconds
        saved = time.time()
        while self.progress() < 1:
            if forward is not None:
                self.take(forward)
            yield self.step
            self.step += 1
            if self.step % 50 == 0:
                means = {k: round(float(torch.stack(v).mean()), 5) for k, v in self.recent.items()}  # waits for the GPU
                self.recent.clear()
                self.seconds = time.time() - self.began
                print(json.dumps({"step": self.step, "done": round(self.progress(), 3), "minutes": round(self.seconds / 60, 2), **means}), file=self.log)
            if time.time() - saved > 150:
                self.save()
                saved = time.time()
        self.save()

    def take(self, forward):
        """One step: as it is, or as a CUDA graph after a few steps on a stream of their own."""
        self.seed()
        self.set_rates()
        if self.steps_until_graph is None:
            told = self.whole_step(forward)
        elif self.steps_until_graph > 0:
            self.steps_until_graph -= 1
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                told = self.whole_step(forward)
            main.wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.told = self.whole_step(forward)
            self.graph.replay()  # capturing does not run it
            told = {name: value.clone() for name, value in self.told.items()}
        self.note(**told)

    def whole_step(self, forward) -> dict[str, torch.Tensor]:
        loss, terms = forward()
        loss.backward()
        self.apply()
        return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    def update(self, loss: torch.Tensor, **terms: torch.Tensor):
        loss.backward()
        self.set_rates()
        self.apply()
        self.note(loss=loss, **terms)

    def note(self, **terms: torch.Tensor):
        """Numbers whose means go into the log."""
        for name, value in terms.items():
            self.recent.setdefault(name, []).append(value.detach())

    def set_rates(self):
        self.lr.fill_(learning_rate(self.step, self.progress(), self.args.lr))
        self.decay.fill_(min(self.ema_decay, (1 + self.step) / (10 + self.step)))

    @torch.no_grad()
    def apply(self):
        """Steps the optimizers and the moving average."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        if self.ema is not None:
            averages, values = list(self.ema.parameters()), list(self.module.parameters())
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, torch._foreach_mul(values, 1 - self.decay))
