"""What every training script shares: arguments, resuming, the learning rate, the moving average."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pathlib
import time

import numpy as np
import torch
import torch.distributed as dist


def arguments(description: str, *, steps: int, batch: int, lr: float, seed: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of data, checkpoints and logs")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def pictures_to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024),
    scaled to AdamW's update size as in Liu et al. 2025 ("Muon is scalable for LLM training").
    For weight matrices; convolutions are seen as [out, in * h * w]."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @staticmethod
    def orthogonalise(g: torch.Tensor) -> torch.Tensor:
        x = g.flatten(1).bfloat16()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.T if tall else x).float().reshape(g.shape)

    @torch.no_grad()
    def step(self):
        """With several processes, each orthogonalises its share of the matrices."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = torch.zeros(sum(p.numel() for p in parameters)).split([p.numel() for p in parameters])
            for number, (p, update) in enumerate(zip(parameters, updates)):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                if number % world == rank:
                    update.copy_(self.orthogonalise(p.grad.lerp(state["momentum"], group["momentum"])).flatten())
            if world > 1:
                dist.all_reduce(updates[0]._base)
            for p, update in zip(parameters, updates):
                scale = 0.2 * max(p.shape[0], p[0].numel()) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"] * scale)


def is_matrix(module: torch.nn.Module, p: torch.nn.Parameter) -> bool:
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16


class Run:
    """A training run that goes on where it stopped: `for step in run.loop(): run.update(loss)`.

    Under `torchrun --nproc-per-node N script.py …` N processes share every batch (each takes what
    `share` gives it, and gradients are averaged), which is faster on a CPU than N threads.
    """

    def __init__(self, name: str, args, modules: torch.nn.Module, ema: float = 0.0):
        self.name, self.args, self.module = name, args, modules
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo")
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        matrices = {id(p) for m in modules.modules() for p in m.parameters(recurse=False) if is_matrix(m, p)}
        self.optimizers = [
            Muon([p for p in self.parameters if id(p) in matrices], lr=args.lr),
            torch.optim.AdamW([p for p in self.parameters if id(p) not in matrices], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.ema_decay = ema
        self.ema = copy.deepcopy(modules).requires_grad_(False) if ema else None
        self.path = args.work / f"{name}.ckpt"
        self.log = open(args.work / f"{name}.log", "a", buffering=1)
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=False)
            modules.load_state_dict(state["module"])
            if not getattr(args, "export", None):
                for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]
        self.recent: dict[str, list[float]] = {}

    def rng(self) -> np.random.Generator:
        """The same draws for a step, whether the run was interrupted or not."""
        torch.manual_seed(self.args.seed * 1_000_003 + self.step)
        return np.random.default_rng([self.args.seed, self.step])

    def share(self, batch):
        """This process's part of a batch."""
        return batch[self.rank :: self.world]

    def save(self):
        if self.rank:
            return
        state = {"module": self.module.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step, "seconds": self.seconds}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def loop(self):
        started, saved, before = time.time(), time.time(), self.seconds
        while self.step < self.args.steps:
            yield self.step
            self.step += 1
            self.seconds = before + time.time() - started
            if self.step % 50 == 0 and self.rank == 0:
                means = {k: round(float(np.mean(v)), 5) for k, v in self.recent.items()}
                self.recent.clear()
                print(json.dumps({"step": self.step, "minutes": round(self.seconds / 60, 2), **means}), file=self.log)
            if time.time() - saved > 150:
                self.save()
                saved = time.time()
        self.save()

    def update(self, loss: torch.Tensor, **terms: float):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.args.steps, self.args.lr)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            gradients = torch.cat([p.grad.flatten() for p in self.parameters])
            dist.all_reduce(gradients)
            for p, g in zip(self.parameters, gradients.div_(self.world).split([p.numel() for p in self.parameters])):
                p.grad.copy_(g.view_as(p.grad))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema is not None:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for average, value in zip(self.ema.parameters(), self.module.parameters()):
                    average.lerp_(value, 1 - decay)
        for name, value in {"loss": float(loss.detach()), **terms}.items():
            self.recent.setdefault(name, []).append(value)
