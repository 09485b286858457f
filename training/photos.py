"""Makes the suite `photos`: photographs in the public domain, and edits of them with a known answer.

    python training/photos.py                        # edits, manifest.jsonl and noise, from photos/plain
    python training/photos.py --originals FOLDER     # photos/plain too, from the files that packages ship
    python training/photos.py --contact sheet.png    # all pictures on one sheet, to look at

An edit is a function of one picture and a generator seeded by its name, so that A → A′ and B → B′ are the same
operation. Needs numpy and Pillow.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parents[1] / "demo/benchmark/photos"
SIZE = 512
LUMA = np.array([0.299, 0.587, 0.114])

# name: (file in --originals, the square that is kept as left, top, side)
PHOTOS = {
    "astronaut": ("astronaut.png", (0, 0, 512)),
    "cameraman": ("camera.png", (0, 0, 512)),
    "cat": ("chelsea.png", (100, 0, 300)),
    "city": ("cityCC0.png", (250, 0, 406)),
    "coffee": ("coffee.png", (95, 0, 400)),
    "galaxies": ("hubble_deep_field.jpg", (60, 100, 700)),
    "raccoon": ("face.png", (240, 0, 768)),
    "rocket": ("rocket.jpg", (110, 0, 427)),
    "stairs": ("ascent.png", (0, 0, 512)),
}

# What the photographs show, in the words of a captioner.
CAPTIONS = {
    "astronaut": "a woman in an orange space suit in front of an american flag",
    "cameraman": "a man in a black coat with a camera on a tripod",
    "cat": "a close up of an orange cat with green eyes",
    "city": "tall glass buildings in a city at night",
    "coffee": "a cup of coffee on a red saucer on a wooden table",
    "galaxies": "many small galaxies in a black sky",
    "raccoon": "a raccoon lying in green leaves",
    "rocket": "a white rocket standing on a launch pad",
    "stairs": "people on the stairs of a wooden tower",
}


def gray(image):
    return image @ LUMA


def over(low, high, image):
    """`high` where image is 1, `low` where it is 0."""
    image = image[..., None] if image.ndim == 2 else image
    return low * (1 - image) + high * image


def resized(values, shape):
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC))


def blurred(image, sigma):
    reach = int(3 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(reach, reach) if axis == at else (0, 0) for at in range(image.ndim)]
        padded = np.pad(image, pad, mode="edge")
        length = image.shape[axis]
        image = sum(tap * np.take(padded, range(at, at + length), axis) for at, tap in enumerate(taps))
    return image


def smeared(image, dx, dy, steps):
    """Averaged along a direction, with wrapping."""
    shifted = (np.roll(image, (round(dy * at), round(dx * at)), (0, 1)) for at in range(steps))
    return sum(shifted) / steps


def clouds(random, shape, cell):
    grid = random.random((shape[0] // cell + 2, shape[1] // cell + 2))
    return np.clip(resized(grid, shape), 0, 1)


def vignette(shape):
    y, x = np.mgrid[-1:1:shape[0] * 1j, -1:1:shape[1] * 1j]
    return np.clip(1 - 0.45 * (x * x + y * y) ** 1.2, 0, 1)


def flattened(image, radius):
    """Kuwahara's filter: each pixel is the mean of the calmest of the four squares that touch it."""
    size = radius + 1

    def means(values):
        padded = np.pad(values, [(radius, radius)] * 2 + [(0, 0)] * (values.ndim - 2), mode="reflect")
        total = np.cumsum(np.cumsum(padded, 0), 1)
        total = np.pad(total, [(1, 0)] * 2 + [(0, 0)] * (values.ndim - 2))
        box = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
        height, width = values.shape[:2]
        corners = [(0, 0), (0, radius), (radius, 0), (radius, radius)]
        return np.stack([box[y:y + height, x:x + width] / size**2 for y, x in corners])

    tone = gray(image)
    calmest = np.argmin(means(tone**2) - means(tone) ** 2, 0)
    return np.take_along_axis(means(image), calmest[None, ..., None], 0)[0]


def saturated(image, amount):
    return np.clip(over(gray(image)[..., None], image, np.full(image.shape[:2], amount)), 0, 1)


def outlines(tone, sigma, strength):
    return np.clip((blurred(tone, 1.6 * sigma) - blurred(tone, sigma)) * strength, 0, 1)


def pencil(image, random):
    tone = gray(image)
    lines = np.clip(tone / (blurred(tone, 7) + 0.02), 0, 1) ** 2.2
    grain = random.random(tone.shape)
    hatch = smeared(grain, 0.8, -0.8, 22)
    hatch = (hatch - hatch.mean()) / hatch.std()
    shade = np.clip(1 - 0.85 * (1 - tone) ** 1.6 * (0.62 + 0.3 * hatch), 0, 1)
    page = lines * shade * (0.985 + 0.03 * (grain - 0.5))
    return page[..., None] * [0.97, 0.965, 0.95]


def night(image, random):
    tone = gray(image)[..., None]
    dim = over(tone, image, np.full(image.shape[:2], 0.35)) ** 1.25
    dark = dim * [0.34, 0.46, 0.78] + [0.015, 0.02, 0.06]
    return dark * vignette(image.shape[:2])[..., None]


def snow(image, random):
    tone = gray(image)
    soft = blurred(tone, 2.0)
    lit = np.roll(soft, -4, 0) - np.roll(soft, 4, 0)
    cover = np.clip(lit * 3 - 0.35, 0, 1)
    cold = saturated(image, 0.45) * [0.80, 0.86, 0.95] * 0.82 + [0.15, 0.16, 0.18]
    page = over(cold, np.array([0.95, 0.97, 1.0]), np.clip(blurred(cover, 1.6), 0, 0.8))
    for count, size, bright in ((1100, 1.0, 0.8), (420, 1.8, 0.9), (110, 3.2, 0.9)):
        flakes = np.zeros(tone.shape)
        flakes[random.integers(0, SIZE, count), random.integers(0, SIZE, count)] = 1
        flakes = blurred(flakes, size) * (2 * np.pi * size**2) * 1.5
        page = over(page, np.ones(3), np.clip(flakes, 0, 1) * bright)
    return page


def sepia(image, random):
    tone = np.clip(gray(image) ** 0.85 * 0.86 + 0.11, 0, 1)
    tone = tone + 0.05 * (random.random(tone.shape) - 0.5)
    tinted = np.stack([tone**0.82, tone**1.05 * 0.93, tone**1.35 * 0.80], -1)
    page = tinted * (0.45 + 0.55 * vignette(tone.shape))[..., None]
    for _ in range(9):
        column, start = random.integers(0, SIZE), random.integers(0, SIZE // 2)
        length = random.integers(60, SIZE // 2)
        page[start:start + length, column] = page[start:start + length, column] * 0.6 + 0.36
    return page


def fog(image, random):
    height, width = image.shape[:2]
    drift = 0.6 * clouds(random, (height, width), 128) + 0.4 * clouds(random, (height, width), 48)
    depth = np.linspace(0.86, 0.50, height)[:, None] + 0.22 * (drift - 0.5)
    soft = saturated(blurred(image, 1.4), 0.6)
    return over(soft, np.array([0.83, 0.85, 0.87]), np.clip(depth, 0, 0.93))


def cartoon(image, random):
    flat = saturated(flattened(flattened(image, 4), 4), 1.5)
    tone = np.clip(gray(flat), 0.02, 1)
    steps = np.round(tone**0.8 * 5) / 5
    page = flat * (np.clip(steps, 0.12, 1) / tone**0.8)[..., None]
    ink = outlines(gray(flattened(image, 3)), 1.4, 26)
    return over(page, np.zeros(3), np.clip(ink, 0, 1))


def negative(image, random):
    return 1 - image


def mosaic(image, random):
    cell, cells = 16, SIZE // 16
    jitter = random.random((cells + 2, cells + 2, 2))
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    row, column = (y // cell).astype(int), (x // cell).astype(int)
    near = np.full((2, SIZE, SIZE), 1e9)
    stone = np.zeros((SIZE, SIZE), int)
    for up in (-1, 0, 1):
        for left in (-1, 0, 1):
            r, c = row + up, column + left
            at = jitter[r + 1, c + 1]
            far = np.hypot(y - (r + 0.15 + 0.7 * at[..., 0]) * cell, x - (c + 0.15 + 0.7 * at[..., 1]) * cell)
            closer = far < near[0]
            near[1] = np.where(closer, near[0], np.minimum(near[1], far))
            stone = np.where(closer, (r + 1) * (cells + 2) + c + 1, stone)
            near[0] = np.where(closer, far, near[0])
    count = np.bincount(stone.ravel(), minlength=(cells + 2) ** 2)
    colour = [np.bincount(stone.ravel(), image[..., at].ravel(), (cells + 2) ** 2) for at in range(3)]
    colour = np.stack(colour, -1) / np.maximum(count, 1)[:, None]
    colour = np.clip(colour * (0.9 + 0.25 * random.random((len(colour), 1))), 0, 1)
    gap = np.clip((near[1] - near[0]) / 2.6 - 0.25, 0, 1)
    return over(np.array([0.30, 0.28, 0.26]), colour[stone], gap)


def painting(image, random):
    flat = saturated(flattened(flattened(flattened(image, 7), 5), 3), 1.35)
    strokes = smeared(random.random(image.shape[:2]), 0.9, 0.45, 14)
    strokes = (strokes - strokes.mean()) / strokes.std()
    return np.clip(flat * (1 + 0.055 * strokes[..., None]) + 0.02, 0, 1)


def thermal(image, random):
    tone = blurred(gray(image), 2.2)
    tone = (tone - tone.min()) / (tone.max() - tone.min())
    stops = [0, 0.2, 0.42, 0.62, 0.82, 1]
    colours = np.array([[0, 0, 8], [40, 10, 120], [165, 20, 135], [235, 90, 30], [253, 200, 35], [255, 255, 235]]) / 255
    return np.stack([np.interp(tone, stops, colours[:, at]) for at in range(3)], -1)


def sunset(image, random):
    height, width = image.shape[:2]
    tone = gray(image)[..., None]
    sky = np.linspace(0, 1, height)[:, None, None]
    light = over(np.array([0.98, 0.50, 0.42]), np.array([1.25, 0.74, 0.30]), np.broadcast_to(sky[..., 0], (height, width)))
    warm = over(tone, image, np.full((height, width), 0.55)) * light
    glow = blurred(np.clip(tone[..., 0] - 0.55, 0, 1), 14)[..., None] * [0.9, 0.45, 0.1]
    return np.clip(warm + 0.7 * glow + [0.07, 0.015, 0.06], 0, 1)


def rain(image, random):
    soft = saturated(blurred(image, 1.1), 0.5)
    wet = soft * [0.55, 0.61, 0.68] + [0.07, 0.08, 0.10]
    for count, length, bright in ((2600, 16, 2.6), (900, 34, 5.2)):
        drops = np.zeros(image.shape[:2])
        drops[random.integers(0, SIZE, count), random.integers(0, SIZE, count)] = 1
        streaks = blurred(smeared(drops, -0.22, 1, length), 0.6) * length
        wet = over(wet, np.array([0.82, 0.86, 0.90]), np.clip(streaks * bright * 0.13, 0, 0.65))
    return wet


# kind: (edit, photographs, caption of the result, instruction). The first photograph is A of the first two analogies,
# the second is A of the third.
EDITS = {
    "pencil": (pencil, ("cat", "coffee", "astronaut"), "a pencil drawing of {}", "make it a pencil drawing"),
    "night": (night, ("raccoon", "stairs", "cameraman"), "{} at night", "make it night"),
    "snow": (snow, ("raccoon", "rocket", "city"), "{} in the snow", "let it snow"),
    "sepia": (sepia, ("coffee", "astronaut", "city"), "an old sepia photo of {}", "make it an old sepia photo"),
    "fog": (fog, ("city", "stairs", "rocket"), "{} in thick fog", "add thick fog"),
    "cartoon": (cartoon, ("astronaut", "cat", "coffee"), "a cartoon of {}", "make it a cartoon"),
    "negative": (negative, ("cat", "coffee", "galaxies"), "a negative of a photo of {}", "make it a negative"),
    "mosaic": (mosaic, ("cat", "astronaut", "raccoon"), "a mosaic of {}", "make it a mosaic of small stones"),
    "painting": (painting, ("raccoon", "city", "coffee"), "an oil painting of {}", "make it an oil painting"),
    "thermal": (thermal, ("astronaut", "cat", "stairs"), "a thermal image of {}", "make it the image of a thermal camera"),
    "sunset": (sunset, ("stairs", "cameraman", "raccoon"), "{} at sunset", "make it sunset"),
    "rain": (rain, ("city", "cameraman", "raccoon"), "{} in heavy rain", "make it rain"),
}


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float) / 255


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
    image.save(path, quality=82, optimize=True, progressive=True)


def crop(originals):
    for name, (file, (left, top, side)) in PHOTOS.items():
        image = Image.open(originals / file).convert("RGB").crop((left, top, left + side, top + side))
        write(FOLDER / f"plain/{name}.jpg", np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)) / 255)


def edit():
    for kind, (function, names, *_) in EDITS.items():
        for name in names:
            random = np.random.Generator(np.random.PCG64(zlib.crc32(f"{kind}/{name}".encode())))
            write(FOLDER / f"{kind}/{name}.jpg", function(read(FOLDER / f"plain/{name}.jpg"), random))


def manifest():
    lines = []
    for kind, (_, (first, second, third), caption, instruction) in EDITS.items():
        for a, b in ((first, second), (first, third), (second, first)):
            lines.append({
                "name": f"{kind}-{a}-{b}", "kind": kind,
                "a": f"plain/{a}.jpg", "a_prime": f"{kind}/{a}.jpg", "b": f"plain/{b}.jpg", "b_prime": f"{kind}/{b}.jpg",
                "captions": {
                    "a": CAPTIONS[a], "a_prime": caption.format(CAPTIONS[a]),
                    "b": CAPTIONS[b], "b_prime": caption.format(CAPTIONS[b]),
                },
                "instruction": instruction,
            })
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (FOLDER / "manifest.jsonl").write_text(text, encoding="utf-8")


def noise():
    """The noise that diffusers' own slow tests draw from, as safetensors: numpy.random.RandomState(0)."""
    latents = np.random.RandomState(0).standard_normal((1, 4, 64, 64)).astype("<f4")
    entry = {"dtype": "F32", "shape": latents.shape, "data_offsets": [0, latents.nbytes]}
    header = json.dumps({"latents": entry}).encode()
    header += b" " * (-len(header) % 8)
    (FOLDER / "noise.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + latents.tobytes())


def contact(path, tile=256):
    rows = [("plain", list(PHOTOS))] + [(kind, list(names)) for kind, (_, names, *_) in EDITS.items()]
    rows = [(kind, names[at:at + 3]) for kind, names in rows for at in range(0, len(names), 3)]
    columns = 2
    height = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * 3 * tile, height * (tile + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for at, (kind, names) in enumerate(rows):
        for place, name in enumerate(names):
            x, y = (at // height * 3 + place) * tile, at % height * (tile + 14)
            sheet.paste(Image.open(FOLDER / f"{kind}/{name}.jpg").resize((tile, tile)), (x, y + 14))
            draw.text((x, y), f"{kind}/{name}", "black")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=Path)
    parser.add_argument("--contact", type=Path)
    arguments = parser.parse_args()
    if arguments.originals:
        crop(arguments.originals)
    edit()
    manifest()
    noise()
    if arguments.contact:
        contact(arguments.contact)


if __name__ == "__main__":
    main()
