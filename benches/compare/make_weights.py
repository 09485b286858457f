"""Writes a model of random weights in the true architecture, and the inputs of one step.

    python benches/compare/make_weights.py sd15|sdxl|demo|sd35|flux FOLDER [--layers 4] [--dtype f16] [--device cuda]

FOLDER then holds `unet`, `text_encoder` (for SDXL `text_encoder_2` too), or `transformer`, safetensors as
diffusers and transformers save them. `compare.py` writes the inputs.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
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

# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# https://huggingface.co/black-forest-labs/FLUX.1-dev
FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


def transformer(architecture: str, layers: int | None) -> torch.nn.Module:
    """The whole network, or so many of its blocks; of FLUX.1, so many of either kind."""
    if architecture == "sd35":
        few = {"num_layers": layers, "dual_attention_layers": tuple(range(layers // 2 + 1))} if layers else {}
        return SD3Transformer2DModel(**SD35_MEDIUM | few)
    few = {"num_layers": layers, "num_single_layers": layers} if layers else {}
    return FluxTransformer2DModel(**FLUX_DEV | few)


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
    parser.add_argument("architecture", choices=("sd15", "sdxl", "demo", "sd35", "flux"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f32")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--layers", type=int, help="blocks of a transformer, if not all")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "f16": torch.float16}[args.dtype]
    torch.set_default_device(args.device)
    if args.architecture in ("sd35", "flux"):
        model = transformer(args.architecture, args.layers).to(dtype)
        print(f"transformer: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        model.save_pretrained(args.folder / "transformer", max_shard_size="100GB")
        return
    unet, text_encoders = {
        "sd15": lambda: (SD15, [CLIP_L]),
        "sdxl": lambda: (SDXL, [CLIP_L, OPENCLIP_BIGG]),
        "demo": demo,
    }[args.architecture]()
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
