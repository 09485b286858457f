"""Draws with an exported difference in diffusers, and with the difference itself in dinv, from the same noise.

    python training/reference/interop.py [--dinv target/release/dinv]

Needs diffusers 0.42.1. Prints the largest difference of the pictures, of 255, and fails above 1.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

DEMO = Path(__file__).resolve().parents[2] / "demo"
PROMPT, NEGATIVE = "a large blue boat on the left on water by day", "snow"
STEPS, SCALE = 10, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dinv", type=Path, default=Path("target/release/dinv"))
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        difference, picture = at / "sunset.safetensors", at / "picture.png"
        save_file({"latents": latents}, at / "noise.safetensors")

        def dinv(*words) -> None:
            subprocess.run([str(args.dinv), *map(str, words)], check=True, capture_output=True)

        a, a_prime = (DEMO / "images" / f"{name}.png" for name in ("a", "a_prime"))
        dinv("learn", "--model", args.model, "--a", a, "--a-prime", a_prime, "--steps", 20, "-o", difference)
        dinv("export", difference, "--format", "diffusers", "--name", "dinv-sunset", "-o", at)
        dinv("generate", "--model", args.model, "--prompt", PROMPT, "--negative-prompt", NEGATIVE,
             "--difference", difference, "--init-latents", at / "noise.safetensors", "--guidance-scale", SCALE,
             "--num-inference-steps", STEPS, "-o", picture)
        pipe.load_textual_inversion(str(at / "dinv-sunset.safetensors"))
        drawn = pipe(
            f"{PROMPT} <dinv-sunset>", negative_prompt=NEGATIVE, latents=latents, guidance_scale=SCALE,
            num_inference_steps=STEPS, output_type="np",
        ).images[0]
        found = numpy.asarray(Image.open(picture), numpy.float32)
        worst = float(numpy.abs(found - 255 * drawn).max())
    print(f"{worst:.2f} of 255")
    if worst > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
