"""Makes tests/golden/dinov2: tiny DINOv2 models with random weights, and what transformers gives.

    python training/reference/make_golden_dinov2.py

`expected.safetensors` of each folder: a picture, its `pixel_values` by the preprocessor (bicubic,
centre crop, ImageNet's mean and deviation), and the hidden states and the class token's output for
them and for pixels of another size, for which the position embeddings are interpolated.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

OUT = Path(__file__).resolve().parents[2] / "tests/golden/dinov2"
CONFIG = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=35, patch_size=7)


def randomise(model):
    """Weights large enough that every part shows in the output; halves, so that f16 is exact."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        offset = 1.0 if "norm" in name and name.endswith("weight") or "lambda1" in name else 0.0
        p.data = (noise * (0.3 if p.dim() > 1 else 0.2) + offset).half().float()
    return model.eval()


@torch.no_grad()
def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(2)
    picture = np.asarray(Image.effect_mandelbrot((60, 48), (-2, -1.2, 0.8, 1.2), 60).convert("RGB")).copy()
    picture[:, :, 1] = picture[::-1, :, 1]
    picture[:, :, 2] = picture[:, ::-1, 2]
    processor = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 35, "width": 35}, resample=3,
                                     image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels = torch.as_tensor(np.stack(processor(Image.fromarray(picture)).pixel_values)).float()
    other = torch.randn(2, 3, 21, 42, generator=generator)
    for name, more in (("mlp", {}), ("swiglu", {"use_swiglu_ffn": True})):
        model = randomise(Dinov2Model(Dinov2Config(**CONFIG, **more)))
        tensors = {"picture": torch.from_numpy(picture), "pixel_values": pixels, "other.pixel_values": other}
        for prefix, x in (("", pixels), ("other.", other)):
            out = model(x)
            tensors |= {f"{prefix}last_hidden_state": out.last_hidden_state, f"{prefix}pooler_output": out.pooler_output}
        model.half().save_pretrained(OUT / name)
        processor.save_pretrained(OUT / name)
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, OUT / name / "expected.safetensors")
        print(name, {k: list(v.shape) for k, v in tensors.items()})


main()
