"""Makes tests/golden/flux and tests/golden/flux_schnell: a tiny FLUX.1 dev with random weights, its text
encoders among them, what diffusers makes of it, and what the PyTorch reference of the optimisation loop
learns on it; and the transformer and schedule of a tiny schnell, whose other parts are those of dev.

    python training/reference/make_golden_flux.py

Made with diffusers 0.42.1, transformers 5.24.0 and torch 2.15.0.
"""

import shutil
from pathlib import Path

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from learn_reference import Pair, Reference, TextEncoder, save_traces
from make_golden_families import (
    BATCH,
    CAPTIONS,
    LEARNING_STEPS,
    NEGATIVE,
    PROMPT,
    SIDE,
    draw,
    make_clip,
    make_tokenizer,
    text_encoder_of,
)
from make_golden_learning import randomise
from make_golden_sd3 import CHANNELS, LATENT_SIDE, WIDE, make_t5, make_t5_tokenizer, normal, picture

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
DEV_LENGTH, SCHNELL_LENGTH = 512, 256
# Tokens between and beyond the two that μ is defined at, in the tiny pictures' range.
SHIFTS = {"base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15}


def make_network(seed: int, **config) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel(**{
        "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 40,
        "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), **config,
    })
    return randomise(network, seed)


def make_pipeline(out: Path) -> FluxPipeline:
    tokenizer = make_tokenizer("files", out / "tokenizer")
    tokenizer_2 = make_t5_tokenizer(out / "tokenizer_2")
    clip = make_clip(tokenizer, out / "clip", "files", 70, hidden_act="quick_gelu")
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        force_upcast=True,
    )
    return FluxPipeline(
        transformer=make_network(71, guidance_embeds=True).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, **SHIFTS
        ),
        vae=randomise(vae, 72).half(), tokenizer=tokenizer,
        text_encoder=text_encoder_of(clip, CLIPTextModel),
        text_encoder_2=make_t5(tokenizer_2, 73), tokenizer_2=tokenizer_2,
    )


def places(height: int, width: int) -> torch.Tensor:
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


def packed(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return FluxPipeline._unpack_latents(tokens, height, width, 1)


def predict(network, latents, times, states, pooled, guidance: float | None) -> torch.Tensor:
    """The prediction of a transformer for latents that are not packed."""
    size = latents.shape[-2:]
    told = None if guidance is None else torch.full([len(latents)], guidance)
    tokens = network(
        packed(latents), states, pooled, times / 1000, places(*size),
        torch.zeros(states.shape[1], 3), told,
    ).sample
    return unpacked(tokens, *size)


class ReferenceFlux(Reference):
    """The parts of FLUX.1 dev. While a difference is learned, it is told no guidance: a scale of 1."""

    def __init__(self, model: Path):
        part = lambda cls, name: cls.from_pretrained(model / name, torch_dtype=torch.float32).eval()
        self.transformer = part(FluxTransformer2DModel, "transformer")
        self.vae = part(AutoencoderKL, "vae")
        tower, self.t5 = part(CLIPTextModel, "text_encoder"), part(T5EncoderModel, "text_encoder_2")
        for module in (self.transformer, self.vae, self.t5, tower):
            module.requires_grad_(False)
        self.encoders = [TextEncoder(CLIPTokenizer.from_pretrained(model / "tokenizer"), tower)]
        self.tokenizer_2 = T5Tokenizer.from_pretrained(model / "tokenizer_2")
        self.joints = self.joint_spaces([model / "clip"])

    def noised(self, latents, epsilon, t):
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * epsilon, epsilon - latents

    def conditions(self, prompts: list, size) -> tuple[torch.Tensor, torch.Tensor]:
        words = [(words, tokens[0]) for words, tokens in prompts]
        ids = self.tokenizer_2(
            [words for words, _ in prompts], padding="max_length", max_length=DEV_LENGTH,
            truncation=True, return_tensors="pt",
        ).input_ids
        return self.t5(ids).last_hidden_state, self.encoders[0](words).pooler_output

    def predict(self, noisy, t, states, pooled):
        return predict(self.transformer, noisy, t, states, pooled, 1.0)


def gradients_of(network: FluxTransformer2DModel, guidance: float | None) -> dict:
    """A prediction for two latents that are not square, and gradients to what it is told."""
    latents, times = normal(74, 2, CHANNELS, *WIDE), torch.tensor([1000.0, 12.25])
    states, pooled = normal(75, 2, 7, 40).requires_grad_(), normal(76, 2, 16).requires_grad_()
    output = predict(network, latents, times, states, pooled, guidance)
    towards = normal(77, *output.shape)
    (output * towards).sum().backward()
    tensors = {"latents": latents, "states": states, "pooled": pooled, "times": times,
               "output": output, "towards": towards, "states.grad": states.grad,
               "pooled.grad": pooled.grad}
    return {f"network.{name}": x.detach() for name, x in tensors.items()}


def sigmas_of(pipeline: FluxPipeline, tokens: int, steps: int) -> torch.Tensor:
    """The σ that the pipeline sets for pictures of so many tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = pipeline.scheduler.config
    mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len,
                         config.base_shift, config.max_shift)
    pipeline.scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
    return pipeline.scheduler.sigmas.clone()


def outputs_of(pipeline: FluxPipeline, length: int) -> dict:
    outputs = {}
    for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
        states, pooled, _ = pipeline.encode_prompt(text, None, "cpu", max_sequence_length=length)
        # Of the states those at both ends, which all others go through in T5.
        outputs[f"{prefix}prompt_embeds"] = torch.cat([states[:, :16], states[:, -16:]], 1)
        outputs[f"{prefix}pooled_prompt_embeds"] = pooled
    common = {"prompt": PROMPT, "num_inference_steps": 4, "max_sequence_length": length}
    for name, seed, (height, width) in (("", 78, (LATENT_SIDE,) * 2), ("wide.", 79, WIDE)):
        latents = normal(seed, 1, CHANNELS, height, width)
        tokens = draw(pipeline, packed(latents), guidance_scale=3.5, height=2 * height,
                      width=2 * width, **common)
        outputs[f"{name}latents"] = latents
        outputs[f"{name}drawn"] = unpacked(tokens, height, width)
        outputs[f"{name}picture"] = picture(pipeline, outputs[f"{name}drawn"])
        for steps in (1, 4, 28):
            count = height * width // 4
            outputs[f"sigmas.{count}.{steps}"] = sigmas_of(pipeline, count, steps)
    return outputs


def opened(folder: Path, **parts) -> FluxPipeline:
    return FluxPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, **parts
    )


def save(outputs: dict, out: Path) -> None:
    save_file({name: x.detach().contiguous() for name, x in outputs.items()}, out / "io.safetensors")


def make_dev(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    make_pipeline(out).save_pretrained(out)
    coarse = numpy.random.default_rng(7).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
    for letter, image in zip(("a", "a_prime"), pictures):
        Image.fromarray(image).save(out / f"{letter}.png")
    pipeline = opened(out)
    with torch.no_grad():
        outputs = outputs_of(pipeline, DEV_LENGTH)
        pixels = pipeline.image_processor.preprocess(Image.open(out / "a.png"))
        config, mean = pipeline.vae.config, pipeline.vae.encode(pixels).latent_dist.mean
        outputs["encoded"] = (mean - config.shift_factor) * config.scaling_factor
    save(outputs | gradients_of(pipeline.transformer, 3.5), out)
    times = 1000 * torch.rand((LEARNING_STEPS, BATCH), generator=torch.Generator().manual_seed(80))
    times[0] = torch.tensor([1000.0, 0.5])
    noise = normal(81, LEARNING_STEPS, BATCH, CHANNELS, LATENT_SIDE, LATENT_SIDE).half().float()
    save_traces(ReferenceFlux(out), Pair(*pictures, *CAPTIONS), times, noise, out)


def make_schnell(out: Path, dev: Path) -> None:
    """A transformer that is told no guidance scale, and a schedule without shift."""
    shutil.rmtree(out, ignore_errors=True)
    make_network(82).half().save_pretrained(out / "transformer")
    FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=False, **SHIFTS
    ).save_pretrained(out / "scheduler")
    load = lambda cls, name, **kinds: cls.from_pretrained(out / name, **kinds)
    pipeline = opened(
        dev, transformer=load(FluxTransformer2DModel, "transformer", torch_dtype=torch.float32),
        scheduler=load(FlowMatchEulerDiscreteScheduler, "scheduler"),
    )
    with torch.no_grad():
        outputs = outputs_of(pipeline, SCHNELL_LENGTH)
    save(outputs | gradients_of(pipeline.transformer, None), out)


def main() -> None:
    torch.set_num_threads(1)
    make_dev(GOLDEN / "flux")
    make_schnell(GOLDEN / "flux_schnell", GOLDEN / "flux")


if __name__ == "__main__":
    main()
