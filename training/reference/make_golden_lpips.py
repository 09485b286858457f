"""Makes tests/golden/lpips: LPIPS (Zhang et al. 2018, arXiv 1801.03924) over VGG16 with random weights.

    python training/reference/make_golden_lpips.py

The layout and the names are those of the `lpips` package's `LPIPS(net="vgg").state_dict()`; the
widths are tiny. For features y of the two pictures at the end of each of VGG's five blocks,
normalised over channels at every place,

    d(x, x') = sum_l mean_hw sum_c w_lc (y_lchw - y'_lchw)^2
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests/golden/lpips"
# The number of every convolution in VGG16's `features`, by block; each is followed by a ReLU, and
# every block but the first begins with a 2x2 maximum pooling.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (4, 6, 8, 10, 12)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {"scaling_layer.shift": torch.tensor(SHIFT).view(1, 3, 1, 1), "scaling_layer.scale": torch.tensor(SCALE).view(1, 3, 1, 1)}
    before = 3
    for block, (numbers, width) in enumerate(zip(BLOCKS, WIDTHS)):
        for number in numbers:
            name = f"net.slice{block + 1}.{number}"
            tensors[f"{name}.weight"] = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            tensors[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2
            before = width
        tensors[f"lin{block}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return tensors


def features(w, x):
    x = (x - w["scaling_layer.shift"]) / w["scaling_layer.scale"]
    for block, numbers in enumerate(BLOCKS):
        if block:
            x = F.max_pool2d(x, 2)
        for number in numbers:
            name = f"net.slice{block + 1}.{number}"
            x = F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1))
        yield x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def main():
    torch.set_num_threads(1)
    w = weights()
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(2, 3, 40, 52, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    terms = []
    for block, (a, b) in enumerate(zip(features(w, x), features(w, y))):
        terms.append(F.conv2d((a - b).pow(2), w[f"lin{block}.model.1.weight"]).mean(dim=(1, 2, 3)))
    layers = torch.stack(terms, 1)
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(w, OUT / "model.safetensors")
    save_file({"x": x, "y": y, "layers": layers, "distance": layers.sum(1)}, OUT / "expected.safetensors")
    print(layers, layers.sum(1))


main()
