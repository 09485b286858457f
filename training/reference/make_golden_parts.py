"""Makes tests/golden/parts: textual inversions in the layouts of several programs, other autoencoders and `clip_skip`,
for the tiny pipelines `pipeline` (Stable Diffusion 1), `sdxl` and `flux`, and what diffusers makes of them.

    python training/reference/make_golden_parts.py

Made with diffusers 0.42.1, transformers 5.24.0 and torch 2.15.0.
"""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from make_golden_diffusion import randomise
from make_golden_lora import draw, picture

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
OUT = GOLDEN / "parts"
PROMPT = "a <toy> by <vec.v2>!"


def opened(cls, folder: str):
    pipeline = cls.from_pretrained(GOLDEN / folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(name: str) -> torch.Tensor:
    return load_file(GOLDEN / "lora" / f"{name}_latents.safetensors")["latents"]


def states(pipeline) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        encoded = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    names = ["context", "negative", "pooled", "negative_pooled"]
    return {k: v for k, v in zip(names, encoded) if v is not None and not k.startswith("negative")}


def make_embeddings() -> None:
    generator = torch.Generator().manual_seed(60)
    randn = lambda *shape: (0.3 * torch.randn(shape, generator=generator)).half()
    one, three = randn(16), randn(3, 16)
    # The same numbers as diffusers, A1111's converted files, kohya's scripts and InvokeAI call them.
    for file, tensors in {
        "diffusers": {"<toy>": one}, "a1111": {"string_to_param.*": one[None]}, "kohya": {"emb_params": one[None]},
        "comfyui": {"clip_l": one[None]}, "three": {"emb_params": three},
    }.items():
        save_file(tensors, OUT / f"{file}.safetensors")
    pipeline = opened(StableDiffusionPipeline, "pipeline")
    pipeline.load_textual_inversion({"toy": one.float()}, token="<toy>")
    pipeline.load_textual_inversion({"three": three.float()}, token="<vec.v2>")
    save_file(states(pipeline), OUT / "sd1_states.safetensors")

    toy = {"clip_l": randn(2, 16), "clip_g": randn(2, 20)}
    save_file(toy, OUT / "xl.safetensors")
    pipeline = opened(StableDiffusionXLPipeline, "sdxl")
    for tokenizer, encoder, key in [
        (pipeline.tokenizer, pipeline.text_encoder, "clip_l"), (pipeline.tokenizer_2, pipeline.text_encoder_2, "clip_g"),
    ]:
        pipeline.load_textual_inversion(
            {"toy": toy[key].float()}, token="<toy>", tokenizer=tokenizer, text_encoder=encoder
        )
    # A word that the first text encoder knows and the second reads as text.
    pipeline.load_textual_inversion({"three": three.float()}, token="<vec.v2>")
    encoded = pipeline.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    save_file({"context": encoded[0].detach(), "pooled": encoded[2].detach()}, OUT / "sdxl_states.safetensors")


def make_t5_embeddings() -> None:
    """A word for CLIP and T5, named as OneTrainer and diffusers' trainers name its vectors."""
    generator = torch.Generator().manual_seed(63)
    pipeline = opened(FluxPipeline, "flux")
    encoders = {"clip_l": (pipeline.tokenizer, pipeline.text_encoder), "t5": (pipeline.tokenizer_2, pipeline.text_encoder_2)}
    toy = {}
    for key, (tokenizer, encoder) in encoders.items():
        toy[key] = (0.3 * torch.randn((2, encoder.get_input_embeddings().embedding_dim), generator=generator)).half()
        pipeline.load_textual_inversion({"toy": toy[key].float()}, token="<toy>", tokenizer=tokenizer, text_encoder=encoder)
    save_file(toy, OUT / "flux.safetensors")
    with torch.no_grad():
        context, pooled, _ = pipeline.encode_prompt("a <toy> by a lake", None, device="cpu")
    save_file({"context": context.half(), "pooled": pooled}, OUT / "flux_states.safetensors")


def make_clip_skip() -> None:
    for name, folder, cls in [
        ("sd1", "pipeline", StableDiffusionPipeline), ("sdxl", "sdxl", StableDiffusionXLPipeline),
    ]:
        pipeline = opened(cls, folder)
        # Stable Diffusion's pipeline asks for the norm in a module that transformers 5 no longer has.
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
        picture(draw(pipeline, latents_of(name), clip_skip=1)).save(OUT / f"{name}_skipped.png")


def make_vae() -> None:
    generator = torch.Generator().manual_seed(61)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    randomise(vae, generator)
    vae.half().save_pretrained(OUT / "vae")
    vae.float()
    # The original layout, written out from its module list: two levels of one residual block.
    parts = {
        "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k", "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "conv_shortcut": "nin_shortcut",
        "downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv", ".resnets.": ".block.",
        "encoder.down_blocks.": "encoder.down.", "decoder.up_blocks.0": "decoder.up.LAST", "decoder.up_blocks.1": "decoder.up.0",
        "decoder.up.LAST": "decoder.up.1",
    }
    tensors = {}
    for key, value in vae.half().state_dict().items():
        for name, original in parts.items():
            key = key.replace(name, original)
        if ".attn_1." in key and value.ndim == 2:
            value = value[:, :, None, None]
        tensors[key] = value.contiguous()
    save_file(tensors, OUT / "vae_original.safetensors")
    vae.float()
    pipeline = opened(StableDiffusionPipeline, "pipeline")
    pipeline.vae = vae
    picture(draw(pipeline, latents_of("sd1"))).save(OUT / "sd1_other_vae.png")


def make_tiny_vae() -> None:
    """A distilled autoencoder: its picture of the model's latents, and both ways by itself."""
    generator = torch.Generator().manual_seed(62)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1), scaling_factor=0.7,
    ).eval()
    randomise(vae, generator)
    vae.half().save_pretrained(OUT / "vae_tiny")
    vae.float()
    pixels, latents = torch.rand((1, 3, 12, 20), generator=generator) * 2 - 1, 3 * torch.randn((1, 4, 6, 10), generator=generator)
    with torch.no_grad():
        tensors = {"pixels": pixels, "encoded": vae.encode(pixels).latents, "latents": latents, "decoded": vae.decode(latents).sample}
    save_file({name: x.contiguous() for name, x in tensors.items()}, OUT / "vae_tiny_io.safetensors")
    pipeline = opened(StableDiffusionPipeline, "pipeline")
    pipeline.vae = vae
    picture(draw(pipeline, latents_of("sd1"))).save(OUT / "sd1_tiny_vae.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    make_embeddings()
    make_t5_embeddings()
    make_clip_skip()
    make_vae()
    make_tiny_vae()
