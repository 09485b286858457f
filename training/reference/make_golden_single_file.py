"""Makes tests/golden/single_file: the weights of the tiny pipelines in tests/golden as one file each,
in the layout of the original Stable Diffusion code.

The names are written by the rules below and checked against diffusers: its own converters must make
the folder's tensors out of the file's. Run from the root of the repository, after the scripts that
make the pipelines:

    python training/reference/make_golden_single_file.py

With `--full DIR` it writes files of full size, without weights, to DIR instead: what `dinv caption
--model DIR/sdxl.safetensors --dtype f16 --tokenizer …` opens them with is the configuration of their family.

Made with diffusers 0.42.1 and torch 2.15.0.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

GOLDEN = Path("tests/golden")
OUT = GOLDEN / "single_file"

RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]
UNET = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
]
VAE_ATTENTION = [
    ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
]
OPEN_CLIP = [
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj"),
]


def rename(name, table):
    for new, old in table:
        name = re.sub(rf"(^|\.){re.escape(new)}(?=\.|$)", rf"\g<1>{old}", name)
    return name


def original_unet(tensors, config):
    """Blocks are counted through all levels: `layers` (one more on the way up) and a resampling."""
    layers = config["layers_per_block"] + 1
    kinds = config["up_block_types"]

    def key(name):
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, level, kind, layer, rest = match.groups()
            level, layer = int(level), int(layer)
            side, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
            block = first + level * layers + layer
            if kind == "downsamplers":
                return f"{side}.{first + level * layers + layers - 1}.0.op.{rest[5:]}"
            if kind == "upsamplers":
                child = 2 if "CrossAttn" in kinds[level] else 1
                return f"{side}.{level * layers + layers - 1}.{child}.{rest}"
            child = 0 if kind == "resnets" else 1
            return f"{side}.{block}.{child}.{rename(rest, RESNET) if child == 0 else rest}"
        key = rename(name, UNET)
        is_resnet = key.startswith(("middle_block.0", "middle_block.2"))
        return rename(key, RESNET) if is_resnet else key

    return {f"model.diffusion_model.{key(name)}": tensor for name, tensor in tensors.items()}


def original_vae(tensors, config, linear=False):
    levels = len(config["block_out_channels"])
    out = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            half, rest = name.split(".mid_block.attentions.0.")
            key = f"{half}.mid.attn_1.{rename(rest, VAE_ATTENTION)}"
            if tensor.dim() == 2 and not linear:
                tensor = tensor[:, :, None, None]
        else:
            key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
            key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
            key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
            key = rename(key, [
                ("resnets", "block"), ("downsamplers.0", "downsample"),
                ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"),
                ("conv_norm_out", "norm_out"),
            ])
        out[f"first_stage_model.{key}"] = tensor.contiguous()
    return out


def original_clip(tensors, prefix):
    return {prefix + ("" if name.startswith("text_") else "text_model.") + name: tensor
            for name, tensor in tensors.items()}


def original_open_clip(tensors, prefix):
    out, parts = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out[prefix + "text_projection"] = tensor.T.contiguous()
        elif match := re.match(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            block, part, kind = match.groups()
            key = f"{prefix}{rename(block, OPEN_CLIP)}.attn.in_proj_{kind}"
            parts.setdefault(key, {})[part] = tensor
        else:
            out[prefix + rename(name, OPEN_CLIP)] = tensor
    return out | {key: torch.cat([part[p] for p in "qkv"]) for key, part in parts.items()}


def assert_same(found, expected):
    bare = lambda name: name.removeprefix("text_model.")
    found = {bare(name): tensor for name, tensor in found.items()}
    expected = {bare(name): tensor for name, tensor in expected.items()}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def state(folder):
    file, = folder.glob("*.safetensors")
    return load_file(file), json.loads((folder / "config.json").read_text())


def write(name, source, layouts, extra):
    """`layouts`: for each text encoder its prefix, and whether it is OpenCLIP's."""
    unet, unet_config = state(source / "unet")
    vae, vae_config = state(source / "vae")
    checkpoint = original_unet(unet, unet_config)
    checkpoint |= original_vae(vae, vae_config, linear=name == "sd2")
    assert_same(convert_ldm_unet_checkpoint(checkpoint, unet_config), unet)
    assert_same(convert_ldm_vae_checkpoint(dict(checkpoint), vae_config), vae)
    for network, (prefix, open_clip) in layouts.items():
        text, config = state(source / network)
        keys = (original_open_clip if open_clip else original_clip)(text, prefix)
        if open_clip:
            model = SimpleNamespace(config=SimpleNamespace(**config))
            assert_same(convert_open_clip_checkpoint(model, keys, prefix), text)
        else:
            assert_same(convert_ldm_clip_checkpoint(keys), text)
        checkpoint |= keys
    checkpoint |= extra(checkpoint)
    file = OUT / f"{name}.safetensors"
    save_file(checkpoint, file)
    print(name, len(checkpoint), "tensors,", file.stat().st_size, "bytes")


def unused(checkpoint):
    """What whole checkpoints hold besides; the last layer and projection that SD 2 does not use."""
    prefix = "cond_stage_model.model."
    blocks = {int(m[1]) for key in checkpoint if (m := re.search(r"resblocks\.(\d+)", key))}
    last, width = max(blocks), checkpoint[f"{prefix}ln_final.bias"].shape[0]
    block = f"{prefix}transformer.resblocks."
    return {
        "alphas_cumprod": torch.linspace(1, 0, 10),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        f"{prefix}logit_scale": torch.tensor(4.6),
        f"{prefix}text_projection": torch.zeros(width, width),
    } | {
        key.replace(f"{block}{last}.", f"{block}{last + 1}."): tensor.clone()
        for key, tensor in checkpoint.items() if key.startswith(f"{block}{last}.")
    }


def full_models():
    """The networks of each family at full size without weights, as configured in the folders
    stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0 of diffusers."""
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    four = dict(
        block_out_channels=(320, 640, 1280, 1280), down_block_types=(down,) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + (up,) * 3,
    )
    sd2 = dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024)
    sdxl = dict(
        block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", down, down),
        up_block_types=(up, up, "UpBlock2D"), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        transformer_layers_per_block=(1, 2, 10), addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    clip_l = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                  num_attention_heads=12, hidden_act="quick_gelu")
    clip_h = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                  num_attention_heads=16, hidden_act="gelu")
    clip_g = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                  num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
    prefixes = ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."]
    clip = (CLIPTextModel, clip_l, "cond_stage_model.transformer.", original_clip)
    return {
        "sd1": (four | dict(attention_head_dim=8, cross_attention_dim=768), [clip]),
        "sd2": (four | sd2 | dict(use_linear_projection=True), [
            (CLIPTextModel, clip_h, "cond_stage_model.model.", original_open_clip),
        ]),
        "sdxl": (sdxl, [
            (CLIPTextModel, clip_l, prefixes[0], original_clip),
            (CLIPTextModelWithProjection, clip_g, prefixes[1], original_open_clip),
        ]),
    }


def write_full(folder):
    """Files of full size and of f16 zeros, which take no room on a disk that has sparse files."""
    for name, (unet_config, text_encoders) in full_models().items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**unet_config)
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
            checkpoint = original_unet(unet.state_dict(), unet.config)
            checkpoint |= original_vae(vae.state_dict(), vae.config)
            for kind, config, prefix, original in text_encoders:
                checkpoint |= original(kind(CLIPTextConfig(**config)).state_dict(), prefix)
        header, end = {}, 0
        for key, tensor in checkpoint.items():
            start, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(header).encode()
        with open(folder / f"{name}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        print(name, len(checkpoint), "tensors,", end, "bytes")


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--full":
        return write_full(Path(sys.argv[2]))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    clip = "cond_stage_model.transformer."
    write("sd1", GOLDEN / "pipeline", {"text_encoder": (clip, False)}, lambda _: {
        f"{clip}text_model.embeddings.position_ids": torch.arange(40)[None],
    })
    write("sd2", GOLDEN / "sd21", {"text_encoder": ("cond_stage_model.model.", True)}, unused)
    write("sdxl", GOLDEN / "sdxl", {
        "text_encoder": ("conditioner.embedders.0.transformer.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    }, lambda _: {"denoiser.sigmas": torch.linspace(0, 14, 10)})


if __name__ == "__main__":
    main()
