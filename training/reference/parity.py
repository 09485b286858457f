"""Parity at full size: every family of models with random weights, in f32, computed by diffusers
and transformers and by this crate.

    cargo build --release --bin dinv --example parity
    python training/reference/parity.py --work DIR [--only sd15 …] [--markdown docs/parity.md]

For every family: the text encoders, the image towers that belong to them, one call of the U-Net
and the VAE both ways (relative error at most 1e-4), then the whole text-to-image pipeline against
`dinv generate`, from the same latents, 10 steps, with every scheduler (pixels within 2/255).
Of flow-matching families, the parts alone: the transformer (of Stable Diffusion 3.5 medium the whole, of
the others one block of each kind), layers of T5-XXL and Qwen3, and the VAE.
Exits with 1 on a miss. DIR needs 20 GB; what takes too much memory is made, measured and deleted
part by part, the largest (SDXL's pipeline, 14 GB) needs 20 GB of memory.

The weights are random: numbers of the size that keeps activations near 1, from a seed. The
vocabulary is made up (as long as CLIP's, of pairs of letters), since the real one is a download.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImageTransformer2DModel,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches/compare"))

import make_golden_chroma
import make_golden_flux
import make_golden_klein
import make_golden_z_image
from make_weights import FLUX_DEV, SD35_MEDIUM

RELATIVE, PIXELS, STEPS = 1e-4, 2, 10
PROMPT, NEGATIVE = "a red house on a green hill, at sunset", "blurry"

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768)
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu", projection_dim=1024)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
VISION = {
    "ViT-L/14": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="quick_gelu", projection_dim=768),
    "ViT-H/14": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu", projection_dim=1024),
    "ViT-bigG/14": dict(hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, hidden_act="gelu", projection_dim=1280),
}
UNET_1 = dict(sample_size=32, cross_attention_dim=768, attention_head_dim=8)
UNET_2 = dict(sample_size=32, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
UNET_XL = dict(
    sample_size=32, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
    block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)
SD_NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
# family: pipeline, U-Net, text encoders, image towers, scheduler
FAMILIES = {
    "sd15": (StableDiffusionPipeline, UNET_1, [CLIP_L], ["ViT-L/14"], SD_NOISE),
    "sd21": (StableDiffusionPipeline, UNET_2, [CLIP_H], ["ViT-H/14"], SD_NOISE | dict(prediction_type="v_prediction")),
    "sdxl": (StableDiffusionXLPipeline, UNET_XL, [CLIP_L, CLIP_G], ["ViT-L/14", "ViT-bigG/14"], SD_NOISE),
    "instruct-pix2pix": (StableDiffusionInstructPix2PixPipeline, UNET_1 | dict(in_channels=8), [CLIP_L], ["ViT-L/14"], SD_NOISE),
    "inpaint": (StableDiffusionInpaintPipeline, UNET_1 | dict(in_channels=9), [CLIP_L], ["ViT-L/14"], SD_NOISE),
}
ONE_OF_EACH = dict(num_layers=1, num_single_layers=1)
KLEIN_4B = dict(
    in_channels=128, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3 * 2560, axes_dims_rope=(32, 32, 32, 32),
    guidance_embeds=False,
)
Z_IMAGE = dict(
    in_channels=16, dim=3840, n_layers=1, n_refiner_layers=1, n_heads=30, n_kv_heads=30, cap_feat_dim=2560, axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512],
)
# Few words: the widths are those of the originals.
T5_XXL = T5Config(
    vocab_size=1000, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=1, feed_forward_proj="gated-gelu",
    is_encoder_decoder=False, tie_word_embeddings=False,
)
QWEN3_4B = Qwen3Config(
    vocab_size=1000, hidden_size=2560, intermediate_size=9728, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
)
# family: what builds the transformer, what calls it, the shape of its context, the width of the pooled prompt
FLOWS = {
    "sd35": (
        lambda: SD3Transformer2DModel(**SD35_MEDIUM), lambda network, x, times, context, pooled: network(x, context, pooled, times).sample,
        (77 + 256, 4096), 2048,
    ),
    "flux": (
        lambda: FluxTransformer2DModel(**FLUX_DEV | ONE_OF_EACH),
        lambda network, x, times, context, pooled: make_golden_flux.predict(network, x, times, context, pooled, 1.0), (512, 4096), 768,
    ),
    "chroma": (
        lambda: ChromaTransformer2DModel(**ONE_OF_EACH),
        lambda network, x, times, context, _: make_golden_chroma.predict(network, x, times, context, torch.ones(context.shape[:2], dtype=bool)),
        (45, 4096), None,
    ),
    "klein": (
        lambda: Flux2Transformer2DModel(**KLEIN_4B | ONE_OF_EACH),
        lambda network, x, times, context, _: make_golden_klein.predict(network, x, times, context), (512, 3 * 2560), None,
    ),
    "z-image": (
        lambda: ZImageTransformer2DModel(**Z_IMAGE),
        lambda network, x, times, context, _: make_golden_z_image.predict(network, x, times, list(context)), (45, 2560), None,
    ),
}
# Made of the same parts as sd15, but for the U-Net.
LIKE_SD15 = "instruct-pix2pix", "inpaint"
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
    "uni-pc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
}

INTRODUCTION = f"""# Parity with diffusers at full size

Every family with its true architecture and random weights, f32, on the CPU: the last table of

    just parity WORK

Networks are compared by the largest difference relative to the largest reference value (at most
{RELATIVE:g}); pictures of 256 pixels, drawn from the same latents in {STEPS} steps under guidance 5 with a
negative prompt, by the largest difference of a colour value (at most {PIXELS} of 255).

Flow-matching families are compared part by part and draw no pictures here. The transformer of Stable Diffusion 3.5 medium is
whole; FLUX.1, Chroma, FLUX.2 klein and Z-Image have one block of each kind, T5-XXL one layer and Qwen3 three, all at their true widths.

"""


@contextlib.contextmanager
def no_initialisation():
    """Modules are made without filling their parameters, which takes minutes at this size."""
    names = ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_", "ones_", "zeros_", "constant_", "trunc_normal_")
    kept = {name: getattr(torch.nn.init, name) for name in names}
    for name in names:
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(torch.nn.init, name, function)


def give_memory_back():
    """What was deleted, and what the C library keeps of it in pieces: gigabytes after SDXL."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def make(build, seed: int):
    """A network with weights of the size that keeps activations near 1."""
    with no_initialisation():
        model = build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(generator=generator)
        if p.dim() > 1 and "embedding" not in name:
            p.mul_(p[0].numel() ** -0.5)
        elif p.dim() > 1:
            p.mul_(0.1)
        else:
            p.mul_(0.1)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return model


def make_tokenizer(folder: pathlib.Path, pad: str):
    """As many entries as CLIP's: letters, pairs of letters, start and end."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for a, b in itertools.product(letters, letters + [letter + "</w>" for letter in letters]):
        if len(vocabulary) == 49406:
            break
        merges.append(f"{a} {b}")
        vocabulary.append(a + b)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    files = dict(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return CLIPTokenizer(**files, pad_token=pad, model_max_length=77)


class Table:
    """What was compared, and by how much it differs."""

    def __init__(self):
        self.rows, self.missed = [], False

    def add(self, family, part, error, limit):
        held = error <= limit
        self.missed |= not held
        shown = f"{error:.0f}/255" if limit == PIXELS else f"{error:.1e}"
        row = [family, part, shown, "yes" if held else "**no**"]
        self.rows.append(row)
        print(" | ".join(row), flush=True)

    def markdown(self):
        head = ["family", "part", "error", "held"]
        lines = [head, ["---"] * len(head), *self.rows]
        return INTRODUCTION + "".join("| " + " | ".join(line) + " |\n" for line in lines)


class Parity:
    def __init__(self, args):
        self.args, self.table = args, Table()

    def run(self, command):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
        return done.stdout

    def compare(self, family, part, kind, model, inputs, compute):
        """One network: `compute` gives the reference outputs by name."""
        folder, io = self.args.work / "part", self.args.work / "io.safetensors"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        outputs = inputs | compute(model)
        save_file({k: v.contiguous() for k, v in outputs.items()}, io)
        del model
        give_memory_back()
        for line in self.run([self.args.parity, kind, folder, io]).splitlines():
            name, error = line.split()
            self.table.add(family, f"{part}: {name}", float(error), RELATIVE)
        shutil.rmtree(folder)

    def text_encoder(self, family, number, config):
        with_projection = config is CLIP_G
        build = CLIPTextModelWithProjection if with_projection else CLIPTextModel
        model = make(lambda: build(CLIPTextConfig(**config, eos_token_id=49407)), 1 + number)
        generator = torch.Generator().manual_seed(11)
        ids = torch.randint(0, 49406, (1, 77), generator=generator)
        ids[0, 0], ids[0, 20:] = 49406, 49407

        def compute(model):
            output = model(ids, output_hidden_states=True)
            outputs = {"last_hidden_state": output.last_hidden_state, "penultimate": output.hidden_states[-2]}
            return outputs | ({"text_embeds": output.text_embeds} if with_projection else {})

        self.compare(family, f"text encoder {number + 1}", "text", model, {"input_ids": ids}, compute)

    def image_tower(self, family, name):
        config = CLIPVisionConfig(**VISION[name], image_size=224, patch_size=14)
        model = make(lambda: CLIPVisionModelWithProjection(config), 5)
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(12))
        self.compare(family, name, "vision", model, {"pixel_values": pixels}, lambda m: {"image_embeds": m(pixels).image_embeds})

    def unet(self, family, config):
        model = make(lambda: UNet2DConditionModel(**config), 3)
        generator = torch.Generator().manual_seed(13)
        inputs = {
            "sample": torch.randn(1, config.get("in_channels", 4), 64, 64, generator=generator),
            "timesteps": torch.tensor([501.0]),
            "encoder_hidden_states": torch.randn(1, 77, config["cross_attention_dim"], generator=generator),
        }
        added = {}
        if "addition_embed_type" in config:
            added = {"text_embeds": torch.randn(1, 1280, generator=generator), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]])}

        def compute(model):
            return {"output": model(inputs["sample"], inputs["timesteps"], inputs["encoder_hidden_states"], added_cond_kwargs=added or None).sample}

        self.compare(family, "U-Net at 512 px", "unet", model, inputs | added, compute)

    def transformer(self, family):
        build, call, context, pooled = FLOWS[family]
        model = make(build, 3)
        generator = torch.Generator().manual_seed(13)
        shape = (1, 128, 16, 16) if family == "klein" else (1, 16, 32, 32)
        inputs = {
            "latents": torch.randn(shape, generator=generator), "timesteps": torch.tensor([501.0]),
            "context": torch.randn(1, *context, generator=generator),
        }
        if pooled:
            inputs["pooled"] = torch.randn(1, pooled, generator=generator)
        told = inputs["latents"], inputs["timesteps"], inputs["context"], inputs.get("pooled")
        self.compare(family, "transformer at 256 px", "transformer", model, inputs, lambda network: {"output": call(network, *told)})

    def tower(self, family):
        """The language model that reads the prompt."""
        ids = torch.randint(0, 1000, (1, 64), generator=torch.Generator().manual_seed(11))
        inputs = {"input_ids": ids}
        if family in ("sd35", "flux", "chroma"):
            model = make(lambda: T5EncoderModel(T5_XXL), 1)
            return self.compare(family, "T5-XXL, one layer", "t5", model, inputs, lambda t5: {"last_hidden_state": t5(ids).last_hidden_state})

        def compute(qwen):
            states = qwen(ids, output_hidden_states=True).hidden_states
            return {"layer_1": states[1], "layer_2": states[2]}

        self.compare(family, "Qwen3-4B", "qwen3", make(lambda: Qwen3ForCausalLM(QWEN3_4B), 1), inputs, compute)

    def vae(self, family, config, kind=AutoencoderKL):
        generator = torch.Generator().manual_seed(14)
        inputs = {
            "image": torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1,
            "latents": torch.randn(1, config.get("latent_channels", 4), 32, 32, generator=generator),
        }

        def compute(vae):
            return {"mean": vae.encode(inputs["image"]).latent_dist.mean, "decoded": vae.decode(inputs["latents"]).sample}

        self.compare(family, "VAE at 256 px", "vae", make_vae(config, kind), inputs, compute)

    def pictures(self, family, pipeline):
        """What the pipeline and `dinv generate` are given beside words."""
        if family not in LIKE_SD15:
            return dict(height=256, width=256), []
        y, x = np.mgrid[0:256, 0:256]
        image = self.args.work / "image.png"
        Image.fromarray(np.stack([x, y, (3 * x + 5 * y) % 256], 2).astype(np.uint8)).save(image)
        if family == "instruct-pix2pix":
            return dict(image=Image.open(image), image_guidance_scale=1.5), ["--image", image, "--image-guidance-scale", 1.5]
        mask = self.args.work / "mask.png"
        white = (x > 70) & (x < 200) & (y > 90)
        Image.fromarray((white * 255).astype(np.uint8)).convert("RGB").save(mask)
        pixels = pipeline.image_processor.preprocess(Image.open(image)) * ~torch.from_numpy(white)
        # The mean in place of a sample.
        masked = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        given = dict(image=Image.open(image), mask_image=Image.open(mask).convert("L"), masked_image_latents=masked, strength=1.0)
        return given | dict(height=256, width=256), ["--image", image, "--mask", mask]

    def pipeline(self, family, kind, unet, encoders, scheduler):
        """`dinv generate` against the pipeline of diffusers."""
        folder = self.args.work / family
        parts = {"vae": make_vae(vae_config(kind)), "unet": make(lambda: UNet2DConditionModel(**unet), 3)}
        for number, config in enumerate(encoders):
            build = CLIPTextModelWithProjection if config is CLIP_G else CLIPTextModel
            end = "" if number == 0 else f"_{number + 1}"
            pad = "!" if config is not CLIP_L else "<|endoftext|>"
            parts[f"text_encoder{end}"] = make(lambda: build(CLIPTextConfig(**config, eos_token_id=49407)), 1 + number)
            parts[f"tokenizer{end}"] = make_tokenizer(self.args.work / "vocabulary", pad)
        if kind is not StableDiffusionXLPipeline:
            parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        else:
            parts |= dict(add_watermarker=False)
        pipeline = kind(scheduler=DDIMScheduler(**scheduler), **parts)
        pipeline.set_progress_bar_config(disable=True)
        shutil.rmtree(folder, ignore_errors=True)
        pipeline.save_pretrained(folder)
        generator = torch.Generator().manual_seed(15)
        init = {
            "latents": torch.randn(1, 4, 32, 32, generator=generator),
            "noise": torch.randn(STEPS, 4, 32, 32, generator=generator),
        }
        save_file(init, self.args.work / "init.safetensors")
        given, flags = self.pictures(family, pipeline)
        reference = {}
        for name, cls in SCHEDULERS.items():
            noises = iter(init["noise"].split(1))
            scheduling_euler_ancestral_discrete.randn_tensor = lambda *_, **__: next(noises)
            pipeline.scheduler = cls.from_pretrained(folder, subfolder="scheduler")
            picture = pipeline(
                PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=5.0,
                latents=init["latents"], output_type="pil", **given,
            ).images[0]
            reference[name] = np.asarray(picture).astype(int)
            picture.save(self.args.work / f"{family}-{name}-diffusers.png")
        del pipeline, parts
        give_memory_back()
        for name, expected in reference.items():
            out = self.args.work / f"{family}-{name}-dinv.png"
            self.run([
                self.args.dinv, "generate", "--model", folder, "--prompt", PROMPT, "--negative-prompt", NEGATIVE,
                "--num-inference-steps", STEPS, "--guidance-scale", 5, "--scheduler", name,
                "--init-latents", self.args.work / "init.safetensors", "-o", out, "--overwrite", "--quiet", *flags,
            ])
            found = np.asarray(Image.open(out).convert("RGB")).astype(int)
            self.table.add(family, f"generate, {name}", np.abs(found - expected).max(), PIXELS)
        shutil.rmtree(folder)

    def flow(self, name):
        if "text" in self.args.parts:
            self.tower(name)
        if "unet" in self.args.parts:
            self.transformer(name)
        if "vae" in self.args.parts:
            config = vae_config(None)
            if name == "klein":
                return self.vae(name, config | dict(latent_channels=32), AutoencoderKLFlux2)
            self.vae(name, config | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False))

    def family(self, name):
        if name in FLOWS:
            return self.flow(name)
        kind, unet, encoders, towers, scheduler = FAMILIES[name]
        wanted = set(self.args.parts) - ({"text", "vision", "vae"} if name in LIKE_SD15 else set())
        if "text" in wanted:
            for number, config in enumerate(encoders):
                self.text_encoder(name, number, config)
        if "vision" in wanted:
            for tower in towers[-1:] if name == "sdxl" else towers:
                self.image_tower(name, tower)
        if "unet" in wanted:
            self.unet(name, unet)
        if "vae" in wanted:
            self.vae(name, vae_config(kind))
        if "generate" in wanted:
            self.pipeline(name, kind, unet, encoders, scheduler)


def vae_config(kind):
    config = dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )
    if kind is None:
        return config
    return config | (dict(scaling_factor=0.13025, force_upcast=True) if kind is StableDiffusionXLPipeline else dict(scaling_factor=0.18215))


def make_vae(config, kind=AutoencoderKL):
    """The decoder's last layer is scaled so that pictures are neither flat nor clipped."""
    vae = make(lambda: kind(**config), 4)
    latents = torch.randn(1, vae.config.latent_channels, 32, 32, generator=torch.Generator().manual_seed(16))
    vae.decoder.conv_out.weight.mul_(0.3 / vae.decode(latents).sample.std())
    vae.decoder.conv_out.bias.zero_()
    return vae


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the random models")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, *FLOWS], default=[*FAMILIES, *FLOWS])
    parser.add_argument("--parts", nargs="+", choices=("text", "vision", "unet", "vae", "generate"), default=["text", "vision", "unet", "vae", "generate"])
    parser.add_argument("--dinv", type=pathlib.Path, default=ROOT / "target/release/dinv")
    parser.add_argument("--parity", type=pathlib.Path, default=ROOT / "target/release/examples/parity")
    parser.add_argument("--markdown", type=pathlib.Path, help="file to write the table to")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    parity = Parity(args)
    for name in args.only:
        parity.family(name)
    if args.markdown:
        args.markdown.write_text(parity.table.markdown())
    sys.exit(parity.table.missed)


if __name__ == "__main__":
    main()
