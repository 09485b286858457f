"""Makes tests/golden/lora: LoRA files for the tiny pipelines `pipeline` (Stable Diffusion 1) and `sdxl` in the
layouts that are found in the wild, and the pictures that diffusers draws with them; and for every tiny
transformer, whose fused layers are several in diffusers, the weights that diffusers fuses.

    python training/reference/make_golden_lora.py

All files of one model hold the same random numbers. Those that diffusers reads are merged by its
`load_lora_weights` and `fuse_lora`; ComfyUI's names and those of OpenCLIP's fused projections are the same tensors
called otherwise. Made with diffusers 0.42.1, peft 0.21.2, transformers 5.24.0 and torch 2.15.0.
"""

import json
import shutil
from pathlib import Path

import numpy
import torch
from diffusers import (
    DDIMScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from PIL import Image
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
OUT = GOLDEN / "lora"
PROMPT, NEGATIVE, STEPS, SCALE = "a blue house by a lake!", "red", 4, 0.7
RANK, ALPHA = 2, 1.5


def original_name(name: str, layers: int, up_attends: list[bool]) -> str:
    """What the original code calls a layer of the U-Net, written out anew from its module list."""
    parts = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in parts:
        return parts[name]
    resnet = {
        "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    fields = name.split(".")
    if fields[0] == "mid_block":
        if fields[1] == "attentions":
            return ".".join(["middle_block.1", *fields[3:]])
        return f"middle_block.{2 * int(fields[2])}.{resnet[fields[3]]}"
    level, kind, layer = int(fields[1]), fields[2], int(fields[3])
    down = fields[0] == "down_blocks"
    block = (1 if down else 0) + level * (layers + 1) + layer
    half = "input_blocks" if down else "output_blocks"
    if kind == "resnets":
        return f"{half}.{block}.0.{resnet[fields[4]]}"
    if kind == "attentions":
        return ".".join([f"{half}.{block}.1", *fields[4:]])
    if kind == "downsamplers":
        return f"input_blocks.{1 + level * (layers + 1) + layers}.0.op"
    return f"output_blocks.{level * (layers + 1) + layers}.{2 if up_attends[level] else 1}.conv"


def layers_of(module: torch.nn.Module, wanted) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in module.named_modules() if isinstance(m, kinds) and wanted(n)}


def low_rank(layer: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = layer.weight.shape
    down = torch.randn((RANK, *shape[1:]), generator=generator) / shape[1:].numel() ** 0.5
    up = torch.randn((shape[0], RANK, *[1] * (len(shape) - 2)), generator=generator)
    return down.half(), up.half()


def of_unet(name: str) -> bool:
    return any(name.endswith(end) for end in (
        "attn1.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
        "conv1", "conv_shortcut", "time_emb_proj", "samplers.0.conv", "conv_in", "conv_out", "embedding.linear_1",
    ))


def of_attention(name: str) -> bool:
    return ".attn" in name


def of_text(name: str) -> bool:
    return name.endswith(("q_proj", "v_proj", "out_proj", "fc1"))


def draw(pipeline, latents: torch.Tensor, **more) -> numpy.ndarray:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    more |= {"height": latents.shape[-2] * 2, "width": latents.shape[-1] * 2}
    return pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=5.0, latents=latents.clone(),
        output_type="np", **more,
    ).images[0]


def picture(image: numpy.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype("uint8"))


def fused(cls, folder: Path, path: Path) -> object:
    pipeline = cls.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    return pipeline


def make(name: str, cls, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = cls.from_pretrained(folder, torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    unet, is_xl = plain.unet, cls is StableDiffusionXLPipeline
    encoders = {"text_encoder": plain.text_encoder}
    if is_xl:
        encoders["text_encoder_2"] = plain.text_encoder_2
    size = unet.config.sample_size
    latents = torch.randn((1, 4, size, size), generator=generator)
    save_file({"latents": latents}, OUT / f"{name}_latents.safetensors")
    picture(draw(plain, latents)).save(OUT / f"{name}_plain.png")

    weights = {("unet", n): low_rank(m, generator) for n, m in layers_of(unet, of_unet).items()}
    for encoder, model in encoders.items():
        for n, m in layers_of(model, of_text).items():
            weights[encoder, n] = low_rank(m, generator)
    of_old = {k: v for k, v in weights.items() if k[0] != "unet" or of_attention(k[1])}
    up_attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    original = lambda n: original_name(n, unet.config.layers_per_block, up_attends)
    kohya_encoder = {"text_encoder": "lora_te1" if is_xl else "lora_te", "text_encoder_2": "lora_te2"}
    whole = lambda n: n if n.startswith("text_model.") else f"text_model.{n}"

    def save(file: str, tensors: dict, metadata: dict | None = None) -> Path:
        path = OUT / f"{name}_{file}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
        return path

    def flat(unet_name, chosen) -> dict:
        tensors = {}
        for (network, n), (down, up) in chosen.items():
            start = f"lora_unet_{unet_name(n)}" if network == "unet" else f"{kohya_encoder[network]}_{whole(n)}"
            start = start.replace(".", "_")
            tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
            tensors[f"{start}.alpha"] = torch.tensor(ALPHA)
        return tensors

    read, same = {}, {}
    # The files of diffusers say α in their metadata.
    tensors, settings = {}, {}
    for (network, n), (down, up) in weights.items():
        n = n if network == "unet" else whole(n)
        tensors |= {f"{network}.{n}.lora_A.weight": down, f"{network}.{n}.lora_B.weight": up}
        settings |= {f"{network}.lora_alpha": ALPHA, f"{network}.r": RANK}
        settings.setdefault(f"{network}.target_modules", []).append(n.removeprefix("text_model."))
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    read["diffusers"] = save("diffusers", tensors, metadata)
    if is_xl:
        read["kohya_original"] = save("kohya_original", flat(original, weights))
        same["kohya"] = save("kohya", flat(lambda n: n, weights))
    else:
        read["kohya"] = save("kohya", flat(lambda n: n, weights))
        same["kohya_original"] = save("kohya_original", flat(original, weights))
    comfy = {"text_encoder": "text_encoders.clip_l.transformer", "text_encoder_2": "text_encoders.clip_g.transformer"}
    tensors = {}
    for (network, n), (down, up) in weights.items():
        start = f"diffusion_model.{original(n)}" if network == "unet" else f"{comfy[network]}.{whole(n)}"
        tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        tensors[f"{start}.alpha"] = torch.tensor(ALPHA)
    same["comfyui"] = save("comfyui", tensors)
    # Attention processors, as diffusers saved them first: no α, which means α = r.
    tensors = {}
    for (network, n), (down, up) in of_old.items():
        if network == "unet":
            block, layer = n.rsplit(".attn", 1)
            layer = f"attn{layer}".replace(".to_out.0", ".processor.to_out").replace(".to_q", ".processor.to_q")
            layer = layer.replace(".to_k", ".processor.to_k").replace(".to_v", ".processor.to_v")
            start, ends = f"unet.{block}.{layer}", ("_lora.down.weight", "_lora.up.weight")
        else:
            start = f"{network}.{whole(n)}"
            ends = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        tensors |= {f"{start}{ends[0]}": down, f"{start}{ends[1]}": up}
    old = save("processors", tensors)

    pictures = {key: draw(fused(cls, folder, path), latents) for key, path in read.items()}
    first = next(iter(pictures.values()))
    for key, image in pictures.items():
        assert abs(image - first).max() < 1e-4, (key, abs(image - first).max())
    picture(first).save(OUT / f"{name}.png")
    picture(draw(fused(cls, folder, old), latents)).save(OUT / f"{name}_processors.png")
    moved = abs(first - draw(plain, latents)).max() * 255
    print(name, "layers", len(weights), "read by diffusers", list(read), "renamed", list(same), f"moved by {moved:.0f}/255")


TRANSFORMERS = {
    "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "klein": Flux2KleinPipeline, "z_image": ZImagePipeline,
}


def make_transformer(family: str, seed: int) -> None:
    """For each matrix of the original layout a low-rank change, which is that of its rows in diffusers. Of the fused
    weights W, W v is kept, with vⱼ = sin j."""
    generator = torch.Generator().manual_seed(seed)
    names = json.loads((GOLDEN / "original" / "transformers.json").read_text())[family]
    pipeline = TRANSFORMERS[family].from_pretrained(GOLDEN / family, torch_dtype=torch.float32)
    network = pipeline.transformer
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    is_block = lambda n: any(part in n for part in ("blocks.", "layers.", "refiner."))
    parts = {n: row for n, row in names.items() if n.endswith(".weight") and n.removesuffix(".weight") in linear and is_block(n)}
    downs, ups = {}, {}
    for name, row in parts.items():
        weight, original = network.get_parameter(name), row["from"].removesuffix(".weight")
        if original not in downs:
            whole = len(weight) * row["rows"][0][2] // sum(end - start for start, end, _ in row["rows"])
            downs[original] = (0.4 * torch.randn((RANK, weight.shape[1]), generator=generator)).half()
            ups[original] = (0.4 * torch.randn((whole, RANK), generator=generator)).half()
    comfy, own, settings = {}, {}, {"transformer.lora_alpha": ALPHA, "transformer.r": RANK, "transformer.target_modules": []}
    for original, down in downs.items():
        start = f"diffusion_model.{original}"
        comfy |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": ups[original], f"{start}.alpha": torch.tensor(ALPHA)}
    for name, row in parts.items():
        original, module = row["from"].removesuffix(".weight"), name.removesuffix(".weight")
        own_rows = torch.cat([ups[original][start * len(ups[original]) // of : end * len(ups[original]) // of] for start, end, of in row["rows"]])
        own[f"transformer.{module}.lora_A.weight"] = downs[original].clone()
        own[f"transformer.{module}.lora_B.weight"] = own_rows
        settings["transformer.target_modules"].append(module)
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(comfy, OUT / f"{family}_comfyui.safetensors")
    save_file(own, OUT / f"{family}_diffusers.safetensors", metadata)
    before = {name: network.get_parameter(name).detach().clone() for name in parts}
    pipeline.load_lora_weights(OUT / f"{family}_diffusers.safetensors")
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    products = {}
    for name, was in before.items():
        weight = network.get_parameter(name).detach()
        assert not torch.equal(weight, was), name
        products[name] = weight @ torch.sin(torch.arange(weight.shape[1]).float())
    save_file(products, OUT / f"{family}_fused.safetensors")
    print(family, "layers", len(parts), "in the original layout", len(downs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    make("sd1", StableDiffusionPipeline, GOLDEN / "pipeline", 50)
    make("sdxl", StableDiffusionXLPipeline, GOLDEN / "sdxl", 51)
    for seed, family in enumerate(TRANSFORMERS, 52):
        make_transformer(family, seed)
