"""Makes tests/golden/judge: what the judge (training/judge.py) computes from four pictures.

    python training/reference/make_golden_judge.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))

import judge as judging  # noqa: E402

OUT = ROOT / "tests/golden/judge"
ANALOGY = ROOT / "demo/benchmark/validation/000"


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    judge = judging.load()
    names = ("a", "a_prime", "b", "b_prime")
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(ANALOGY / f"{n}.png").convert("RGB")) for n in names]))
    pictures = pictures.permute(0, 3, 1, 2).contiguous()
    tensors = {"pictures": pictures}
    x = pictures.float() / 127.5 - 1
    for number, stage in enumerate(judge.stages):
        x = stage(x)
        tensors[f"stage{number}.mean"] = x.mean(dim=(2, 3))
        tensors[f"stage{number}.corner"] = x[:, :4, :4, :4]
    tensors["pooled"] = F.adaptive_avg_pool2d(x, 4)[:, :8]
    tensors["hidden"] = F.silu(judge.hidden(F.adaptive_avg_pool2d(x, 4).flatten(1)))
    tensors["logits"] = judge.out(tensors["hidden"])
    OUT.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, OUT / "expected.safetensors")
    for name, value in tensors.items():
        print(name, list(value.shape))


main()
