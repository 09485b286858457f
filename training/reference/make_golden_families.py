"""Makes tests/golden/{sd21,sdxl,instruct_pix2pix,inpaint,lcm}: a tiny pipeline of every family with
random weights, what diffusers makes of it, and for the first two the CLIP of their text encoders and
what the PyTorch reference of the optimisation loop learns.

    python training/reference/make_golden_families.py            # all, or the names of some

Made with diffusers 0.42.1, transformers 5.23.0 and torch 2.15.0.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import scheduling_lcm
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from learn_reference import Pair, Reference, save_traces
from make_golden_learning import randomise

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
LENGTH, SIDE, LATENT_SIDE = 24, 16, 8
CAPTIONS = "a red house", "a blue house at night"
PROMPT, NEGATIVE = "a blue house by a lake!", "red"
LEARNING_STEPS, BATCH = 20, 2
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_tokenizer(pad: str, folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with the padding of ViT-L/14 (`files`) or OpenCLIP (`bang`)."""
    shutil.copytree(GOLDEN / "tokenizer" / pad, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_max_length": LENGTH}) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def make_clip(tokenizer, folder: Path, pad: str, seed: int, **sizes) -> CLIPModel:
    """The joint space of one text encoder."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    joint = sizes.pop("projection_dim", 12)
    sizes["intermediate_size"] = sizes["hidden_size"] + 4
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8, "num_hidden_layers": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=joint))
    randomise(clip, seed).half().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    for file in (GOLDEN / "tokenizer" / pad).iterdir():
        shutil.copy(file, folder)
    return clip.float()


def text_encoder_of(clip: CLIPModel, cls=CLIPTextModel, layers: int | None = None):
    """The text tower alone, of its first layers."""
    config = clip.config.text_config
    config = type(config).from_dict({
        **config.to_dict(),
        "num_hidden_layers": layers or config.num_hidden_layers,
        "projection_dim": clip.config.projection_dim,
    })
    encoder = cls(config)
    known = {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    known["text_projection.weight"] = clip.text_projection.weight
    wanted = encoder.state_dict()
    encoder.load_state_dict({k: known[k.removeprefix("text_model.")] for k in wanted})
    return encoder.half().eval()


def make_unet(seed: int, **config) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**{
        "sample_size": LATENT_SIDE, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2, **config,
    })
    return randomise(unet, seed).half()


def make_vae(seed: int, **config) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )
    return randomise(vae, seed).half()


def make_sd21(out: Path) -> StableDiffusionPipeline:
    """OpenCLIP's text encoder without its last layer; linear projections; velocity."""
    tokenizer = make_tokenizer("bang", out / "tokenizer")
    clip = make_clip(tokenizer, out / "clip", "bang", 10, num_hidden_layers=3, hidden_act="gelu")
    unet = make_unet(
        11, cross_attention_dim=16, use_linear_projection=True, attention_head_dim=(2, 4),
        upcast_attention=True,
    )
    scheduler = DDIMScheduler(
        **TRAINED, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=make_vae(12, scaling_factor=0.3), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        text_encoder=text_encoder_of(clip, layers=2), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl(out: Path) -> StableDiffusionXLPipeline:
    """CLIP ViT-L's kind of text encoder beside OpenCLIP's."""
    tokenizer = make_tokenizer("files", out / "tokenizer")
    tokenizer_2 = make_tokenizer("bang", out / "tokenizer_2")
    clip = make_clip(tokenizer, out / "clip", "files", 20, hidden_act="quick_gelu")
    clip_2 = make_clip(
        tokenizer_2, out / "clip_2", "bang", 21, hidden_size=20, num_hidden_layers=3,
        hidden_act="gelu", projection_dim=10,
    )
    unet = make_unet(
        22, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=36,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=10 + 6 * 4,
    )
    scheduler = EulerDiscreteScheduler(**TRAINED, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=make_vae(23, scaling_factor=0.13025, force_upcast=True), tokenizer=tokenizer,
        text_encoder=text_encoder_of(clip), tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_of(clip_2, CLIPTextModelWithProjection), unet=unet,
        scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )


def make_sd15_like(out: Path, cls, seed: int, in_channels: int, scheduler, **of_unet):
    """A pipeline of Stable Diffusion 1.5's parts whose U-Net sees something else, too."""
    tokenizer = make_tokenizer("files", out / "tokenizer")
    clip = make_clip(tokenizer, out / "clip", "files", seed, hidden_act="quick_gelu")
    shutil.rmtree(out / "clip")
    return cls(
        vae=make_vae(seed + 1, scaling_factor=0.3), tokenizer=tokenizer, scheduler=scheduler,
        unet=make_unet(seed + 2, cross_attention_dim=16, in_channels=in_channels, **of_unet),
        text_encoder=text_encoder_of(clip), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )


def make_instruct_pix2pix(out: Path) -> StableDiffusionInstructPix2PixPipeline:
    scheduler = EulerDiscreteScheduler(**TRAINED, timestep_spacing="leading", steps_offset=1)
    return make_sd15_like(out, StableDiffusionInstructPix2PixPipeline, 30, 4 + 4, scheduler)


def make_inpaint(out: Path) -> StableDiffusionInpaintPipeline:
    scheduler = DDIMScheduler(**TRAINED, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return make_sd15_like(out, StableDiffusionInpaintPipeline, 40, 4 + 1 + 4, scheduler)


def make_lcm(out: Path) -> LatentConsistencyModelPipeline:
    """A consistency model that was distilled from guided predictions and is told the scale."""
    return make_sd15_like(out, LatentConsistencyModelPipeline, 50, 4, LCMScheduler(), time_cond_proj_dim=6)


def make_learning(out: Path, pictures: list[numpy.ndarray], seed: int) -> None:
    """What the reference learns from two pictures."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (LEARNING_STEPS, BATCH), generator=generator)
    timesteps[0] = torch.tensor([999, 0])
    shape = (LEARNING_STEPS, BATCH, 4, LATENT_SIDE, LATENT_SIDE)
    noise = torch.randn(shape, generator=generator).half().float()
    save_traces(Reference(out), Pair(*pictures, *CAPTIONS), timesteps, noise, out)


def draw(pipeline, latents: torch.Tensor, **arguments) -> torch.Tensor:
    """The latents that a pipeline makes of `latents`."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(latents=latents, output_type="latent", **arguments).images


def decode(pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Their picture in [0, 1]."""
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1)


def outputs_of_sd21(pipeline, latents: torch.Tensor, out: Path) -> dict:
    embeds, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=NEGATIVE)
    drawn = draw(pipeline, latents, prompt=PROMPT, num_inference_steps=5, guidance_scale=4.0)
    return {
        "prompt_embeds": embeds, "negative_prompt_embeds": negative, "drawn": drawn,
        "picture": decode(pipeline, drawn),
    }


def outputs_of_sdxl(pipeline, latents: torch.Tensor, out: Path) -> dict:
    names = [
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]
    absent = dict(zip(names, pipeline.encode_prompt(PROMPT)))
    given = dict(zip(names, pipeline.encode_prompt(PROMPT, negative_prompt=NEGATIVE)))
    outputs = {name: absent[name] for name in names}
    outputs |= {f"given.{name}": given[name] for name in names if "negative" in name}
    common = {"prompt": PROMPT, "num_inference_steps": 4}
    outputs["drawn"] = draw(pipeline, latents, guidance_scale=5.0, **common)
    outputs["picture"] = decode(pipeline, outputs["drawn"])
    outputs["drawn_with_negative"] = draw(
        pipeline, latents, guidance_scale=5.0, negative_prompt=NEGATIVE, **common
    )
    turbo = EulerDiscreteScheduler(**TRAINED, timestep_spacing="trailing")
    pipeline.scheduler = turbo
    outputs["drawn_by_turbo"] = draw(
        pipeline, latents, prompt=PROMPT, num_inference_steps=2, guidance_scale=0.0
    )
    return outputs


def outputs_of_instruct_pix2pix(pipeline, latents: torch.Tensor, out: Path) -> dict:
    common = {"prompt": PROMPT, "image": Image.open(out / "a.png"), "num_inference_steps": 4}
    drawn = draw(
        pipeline, latents, guidance_scale=4.0, image_guidance_scale=1.5, negative_prompt=NEGATIVE,
        **common,
    )
    return {
        "drawn": drawn,
        "picture": decode(pipeline, drawn),
        "drawn_without_guidance": draw(pipeline, latents, guidance_scale=1.0, **common),
    }


def outputs_of_inpaint(pipeline, latents: torch.Tensor, out: Path) -> dict:
    # Edges between latent pixels and greys on both sides of half: what counts must be exact.
    mask = numpy.zeros((SIDE, SIDE), numpy.uint8)
    mask[3:11, 4:13], mask[12:, :8], mask[12:, 8:] = 255, 127, 128
    Image.fromarray(mask).convert("RGB").save(out / "mask.png")
    image = Image.open(out / "a.png")
    pixels = pipeline.image_processor.preprocess(image)
    kept = pixels * (torch.from_numpy(mask) < 128)
    # The mean in place of a sample.
    masked = pipeline.vae.encode(kept).latent_dist.mean * pipeline.vae.config.scaling_factor
    drawn = draw(
        pipeline, latents, prompt=PROMPT, image=image, mask_image=Image.fromarray(mask),
        masked_image_latents=masked, num_inference_steps=4, guidance_scale=4.0,
        height=SIDE, width=SIDE,
    )
    return {"drawn": drawn, "picture": decode(pipeline, drawn)}


def outputs_of_lcm(pipeline, latents: torch.Tensor, out: Path) -> dict:
    noise = torch.randn((4, *latents.shape), generator=torch.Generator().manual_seed(7))
    outputs = {"noise": noise.flatten(0, 1)}
    for name, scale in (("", 8.5), ("_at_3", 3.0), ("_without_guidance", 1.0)):
        fresh = iter(noise)
        scheduling_lcm.randn_tensor = lambda *_, **__: next(fresh)
        outputs[f"drawn{name}"] = draw(
            pipeline, latents, prompt=PROMPT, num_inference_steps=4, guidance_scale=scale
        )
    return outputs | {"picture": decode(pipeline, outputs["drawn"])}


FAMILIES = {
    "sd21": (make_sd21, outputs_of_sd21),
    "sdxl": (make_sdxl, outputs_of_sdxl),
    "instruct_pix2pix": (make_instruct_pix2pix, outputs_of_instruct_pix2pix),
    "inpaint": (make_inpaint, outputs_of_inpaint),
    "lcm": (make_lcm, outputs_of_lcm),
}
LEARNING = "sd21", "sdxl"


@torch.no_grad()
def make_outputs(out: Path, cls, outputs_of) -> None:
    pipeline = cls.from_pretrained(out, torch_dtype=torch.float32, local_files_only=True)
    latents = torch.randn((1, 4, LATENT_SIDE, LATENT_SIDE), generator=torch.Generator().manual_seed(6))
    outputs = {"latents": latents, **outputs_of(pipeline, latents, out)}
    save_file({name: x.contiguous() for name, x in outputs.items()}, out / "io.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (make, outputs_of)) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        print(name)
        out = GOLDEN / name
        shutil.rmtree(out, ignore_errors=True)
        pipeline = make(out)
        pipeline.save_pretrained(out)
        coarse = numpy.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
        pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
        for letter, picture in zip(("a", "a_prime"), pictures):
            Image.fromarray(picture).save(out / f"{letter}.png")
        make_outputs(out, type(pipeline), outputs_of)
        if name in LEARNING:
            make_learning(out, pictures, seed)


if __name__ == "__main__":
    main()
