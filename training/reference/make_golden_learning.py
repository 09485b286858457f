"""Makes tests/golden/learning: a tiny Stable Diffusion pipeline with random weights, two pictures,
and what the PyTorch reference of the optimisation loop learns from them in 20 steps.

    python training/reference/make_golden_learning.py
"""

import json
import shutil
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from learn_reference import Pair, Reference, save_traces

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
OUT = GOLDEN / "learning"
STEPS, BATCH, SIDE = 20, 2, 32
CAPTIONS = "a red house", "a blue house at night"
LENGTH = 32


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of a scale that keeps activations near 1, rounded to f16."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data = value.half().float()
    return model.eval()


def make_pipeline() -> None:
    shutil.copytree(GOLDEN / "tokenizer" / "json", OUT / "tokenizer")
    path = OUT / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_max_length": LENGTH}, indent=2) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(OUT / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH,
                     "bos_token_id": tokenizer.bos_token_id,
                     "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 16},
        projection_dim=12,
    ))
    randomise(clip, 0).half().save_pretrained(OUT / "clip")
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(OUT / "clip")
    for file in (OUT / "tokenizer").iterdir():
        shutil.copy(file, OUT / "clip")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(
        {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    )
    text_encoder.half().save_pretrained(OUT / "text_encoder")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, norm_num_groups=4,
    )
    randomise(unet, 1).half().save_pretrained(OUT / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.5,
    )
    randomise(vae, 2).half().save_pretrained(OUT / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    ).save_pretrained(OUT / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline"}
    (OUT / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make_pipeline()
    random = numpy.random.default_rng(3)
    coarse = random.integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((4, 4, 1), numpy.uint8)) for c in coarse]
    for name, picture in zip(("a", "a_prime"), pictures):
        Image.fromarray(picture).save(OUT / f"{name}.png")
    generator = torch.Generator().manual_seed(4)
    timesteps = torch.randint(0, 1000, (STEPS, BATCH), generator=generator)
    timesteps[0] = torch.tensor([999, 0])
    noise = torch.randn((STEPS, BATCH, 4, 8, 8), generator=generator)
    save_traces(Reference(OUT), Pair(*pictures, *CAPTIONS), timesteps, noise, OUT)


if __name__ == "__main__":
    main()
