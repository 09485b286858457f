"""Writes a model of random weights in the true architecture, and the inputs of one step.

    python benches/compare/make_weights.py sd15|sdxl|demo FOLDER [--dtype f16] [--device cuda]

FOLDER then holds `unet`, `text_encoder` (for SDXL `text_encoder_2` too), safetensors as diffusers
and transformers save them. `compare.py` writes the inputs.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

# https://huggingface.co/openai/clip-vit-large-patch14
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
# https://huggingface.co/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
OPENCLIP_BIGG = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def demo() -> tuple[dict, list[dict]]:
    """The architecture of the demo model."""
    places = [parent / "demo/model" for parent in Path(__file__).resolve().parents]
    model = next(place for place in places if place.exists())
    read = lambda name: json.loads((model / name / "config.json").read_text())
    unet = {name: value for name, value in read("unet").items() if not name.startswith("_")}
    text = read("text_encoder")
    return unet, [{name: text[name] for name in CLIP_L} | {"max_position_embeddings": 64}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architecture", choices=("sd15", "sdxl", "demo"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f32")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    args = parser.parse_args()
    unet, text_encoders = {
        "sd15": lambda: (SD15, [CLIP_L]),
        "sdxl": lambda: (SDXL, [CLIP_L, OPENCLIP_BIGG]),
        "demo": demo,
    }[args.architecture]()
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "f16": torch.float16}[args.dtype]
    torch.set_default_device(args.device)
    model = UNet2DConditionModel(**unet).to(dtype)
    print(f"U-Net: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    model.save_pretrained(args.folder / "unet", max_shard_size="100GB")
    for number, config in enumerate(text_encoders):
        model = CLIPTextModelWithProjection(CLIPTextConfig(**config)).to(dtype)
        name = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        model.save_pretrained(args.folder / name, max_shard_size="100GB")


if __name__ == "__main__":
    main()
