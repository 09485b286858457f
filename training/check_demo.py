"""Shows that diffusers and transformers load the demo model, and draws and captions with it.

    python check_demo.py --model ../demo/model --out sheet.png
"""

import argparse

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, CLIPModel, CLIPTokenizer

import common

PROMPTS = [
    "a large red castle on the left on snow at night with a moon, flat illustration",
    "a small blue boat in the middle on water at sunset with birds, flat illustration",
    "a large green tree on the right on grass by day with a rainbow, line drawing",
    "a large purple house in the middle on sand in a storm with clouds, pixel art",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(PROMPTS, num_inference_steps=50, guidance_scale=2.0, generator=generator).images
    sheet = Image.new("RGB", (4 * 132 + 4, 136), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (4 + i * 132, 4))
    sheet.save(args.out)

    clip = CLIPModel.from_pretrained(f"{args.model}/clip", torch_dtype=torch.float32).eval()
    ids = CLIPTokenizer.from_pretrained(f"{args.model}/clip")(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    captioner = Blip2ForConditionalGeneration.from_pretrained(f"{args.model}/captioner", torch_dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(f"{args.model}/captioner")
    pixels = common.pictures_to_tensor(np.stack([np.asarray(p) for p in pictures]))
    start = torch.tensor([[captioner.config.image_token_id] * captioner.config.num_query_tokens + [words.bos_token_id]] * len(PROMPTS))
    with torch.no_grad():
        best = clip(input_ids=ids, pixel_values=pixels).logits_per_image.argmax(1).tolist()
        said = captioner.generate(pixel_values=pixels, input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=30)
    print("CLIP's best caption of each picture:", best)
    for prompt, tokens in zip(PROMPTS, said):
        print(f"asked: {prompt}\n said: {words.decode(tokens[start.shape[1]:] if len(tokens) > start.shape[1] else tokens, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
