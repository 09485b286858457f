"""Makes tests/golden/images: odd JPEGs, and what Pillow and transformers make of a picture.

Run from the root of the repository: python training/reference/make_golden_images.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

OUT = Path("tests/golden/images")


def picture(width, height):
    """Smooth waves with a hard-edged square, so that every filter has something to do."""
    y, x = np.mgrid[0:height, 0:width] / 7.0
    channels = [np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y) * np.cos(x)]
    pixels = np.stack([127.5 + 127.5 * c for c in channels], -1).round().astype(np.uint8)
    pixels[5:12, 9:17] = [250, 3, 128]
    return Image.fromarray(pixels)


def quarters():
    """Red, green / blue, white: an orientation is told from the corners."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:] = [230, 20, 20], [20, 200, 20]
    pixels[8:, :12], pixels[8:, 12:] = [20, 20, 220], [240, 240, 240]
    return Image.fromarray(pixels)


def as_half(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).half().contiguous()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    quarters().save(OUT / "exif-6.jpg", quality=95, exif=exif)
    quarters().convert("CMYK").save(OUT / "cmyk.jpg", quality=95)

    source = picture(41, 31)
    source.save(OUT / "source.png")
    tensors = {}
    for name in ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]:
        for width, height in [(13, 9), (50, 40)]:
            resized = source.resize((width, height), getattr(Image.Resampling, name.upper()))
            tensors[f"{name}.{width}x{height}"] = as_half(resized)
    processors = {
        "clip": CLIPImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
        ),
        "clip_padded": CLIPImageProcessorPil(
            size={"shortest_edge": 15}, crop_size={"height": 22, "width": 20}
        ),
        "blip": BlipImageProcessorPil(size={"height": 32, "width": 32}),
    }
    for name, processor in processors.items():
        folder = OUT / name
        processor.save_pretrained(folder)
        tensors[name] = processor(source, return_tensors="pt")["pixel_values"].float().contiguous()
    save_file(tensors, OUT / "expected.safetensors")


main()
