"""Makes tests/golden/clip: tiny CLIP towers with random weights, and what transformers gives.

Run from the root of the repository: python training/reference/make_golden_clip.py
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
    CLIPVisionConfig, CLIPVisionModelWithProjection,
)

OUT = Path("tests/golden/clip")
TEXT = dict(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=3, max_position_embeddings=16, bos_token_id=58, eos_token_id=59,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    image_size=20, patch_size=5,
)
# Two prompts that end at different places: one padded by the end token, one by 0.
IDS = torch.tensor([
    [58, 3, 17, 42, 5, 59] + [59] * 10,
    [58, 9, 9, 30, 21, 8, 11, 55, 2, 59] + [0] * 6,
])


def randomise(model):
    """Weights large enough that every part shows in the output; halves, so that f16 is exact."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.4 if p.dim() > 1 else 0.2
        p.data = (noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        p.data = p.data.half().float()
    return model.eval()


def save(model, name, expected):
    folder = OUT / name
    model.half().save_pretrained(folder)
    save_file({k: v.detach().contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(1)
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))

    # Stable Diffusion 1's: quick_gelu, the last hidden state; with the legacy end token 2.
    model = randomise(CLIPTextModel(CLIPTextConfig(**{**TEXT, "eos_token_id": 2})))
    out = model(IDS)
    save(model, "text", {"last": out.last_hidden_state, "pooled": out.pooler_output})
    # The same as earlier transformers save it: under `text_model.`, with the positions' numbers.
    shutil.copytree(OUT / "text", OUT / "text_prefixed")
    path = OUT / "text_prefixed/model.safetensors"
    tensors = {f"text_model.{k}": v for k, v in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, path)

    # SDXL's second: gelu, projection, the last but one hidden state.
    config = CLIPTextConfig(**TEXT, hidden_act="gelu", projection_dim=12)
    model = randomise(CLIPTextModelWithProjection(config))
    out = model(IDS, output_hidden_states=True)
    save(model, "text_projected", {
        "last": out.last_hidden_state, "penultimate": out.hidden_states[-2],
        "embeds": out.text_embeds,
    })

    model = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=12)))
    save(model, "vision_projected", {"pixels": pixels, "embeds": model(pixels).image_embeds})

    model = randomise(CLIPModel(CLIPConfig(
        text_config={**TEXT, "hidden_act": "gelu"}, vision_config={**VISION, "hidden_act": "gelu"},
        projection_dim=12,
    )))
    save(model, "joint", {
        "pixels": pixels, "image": model.get_image_features(pixels).pooler_output,
        "text": model.get_text_features(IDS).pooler_output,
    })


main()
