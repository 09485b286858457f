"""The demo world: little landscapes that can be drawn, described and edited exactly.

A `Scene` is eight attributes and a seed. The seed decides everything that words do not say (the
exact position, the line of the hills, where the clouds are), so two scenes that share a seed and
differ in one attribute are a perfect before/after pair, and the world can draw the true B' of any
analogy.

    python world.py --sheet sheet.png       # a page of random scenes, to look at
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random

from PIL import Image, ImageDraw

SIZE = 128  # pixels a side
SCALE = 4  # supersampling: everything is drawn at 512 and averaged down

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": ("house", "castle", "tree", "palm", "cactus", "boat"),
    "color": ("red", "blue", "green", "yellow", "purple"),
    "size": ("small", "large"),
    "place": ("left", "middle", "right"),
    "ground": ("grass", "sand", "snow", "water"),
    "sky": ("day", "sunset", "night", "storm"),
    "extra": ("none", "rainbow", "moon", "clouds", "birds"),
    "style": ("flat", "pixel", "line"),
}
KINDS = tuple(ATTRIBUTES)


@dataclasses.dataclass(frozen=True)
class Scene:
    object: str
    color: str
    size: str
    place: str
    ground: str
    sky: str
    extra: str
    style: str
    seed: int

    def labels(self) -> list[int]:
        return [values.index(getattr(self, kind)) for kind, values in ATTRIBUTES.items()]

    def split(self) -> str:
        """`train`, `validation` or `test`: one (object, colour, ground) triple in ten is held out
        for each of the last two, so that a held-out picture shows a combination never trained on."""
        o, c, _, _, g, *_ = self.labels()
        return {0: "test", 5: "validation"}.get((o + 2 * c + 3 * g) % 10, "train")

    def but(self, kind: str, value: str) -> "Scene":
        return dataclasses.replace(self, **{kind: value})


def sample_scene(rng: random.Random, split: str | None = None) -> Scene:
    while True:
        scene = Scene(*(rng.choice(v) for v in ATTRIBUTES.values()), seed=rng.getrandbits(31))
        if split is None or scene.split() == split:
            return scene


def analogy(rng: random.Random, kinds: tuple[str, ...], split: str) -> dict[str, Scene]:
    """A : A' :: B : B', where both sides change the attributes `kinds` from and to the same values
    and A differs from B in all others. B' belongs to the split, A and A' to training, and so does B
    if the split is `train`."""
    while True:
        b_prime = sample_scene(rng, split)
        new = {kind: getattr(b_prime, kind) for kind in kinds}
        b = dataclasses.replace(b_prime, **{kind: _other(rng, b_prime, kind) for kind in kinds})
        others = {kind: _other(rng, b, kind) for kind in KINDS if kind not in kinds}
        a = dataclasses.replace(b, seed=rng.getrandbits(31), **others)
        scenes = {"a": a, "a_prime": dataclasses.replace(a, **new), "b": b, "b_prime": b_prime}
        if all(scene.split() == "train" for scene in (a, scenes["a_prime"], *([b] if split == "train" else []))):
            return scenes


def _other(rng: random.Random, scene: Scene, kind: str) -> str:
    return rng.choice([v for v in ATTRIBUTES[kind] if v != getattr(scene, kind)])


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------

OBJECT_COLORS = {
    "red": (214, 48, 49),
    "blue": (35, 100, 222),
    "green": (24, 150, 66),
    "yellow": (250, 202, 40),
    "purple": (142, 62, 190),
}
SKIES = {  # top, horizon, hills, light (multiplies the ground and the object)
    "day": ((96, 182, 240), (214, 240, 252), (140, 186, 190), (1.0, 1.0, 1.0)),
    "sunset": ((108, 62, 140), (255, 178, 92), (150, 82, 110), (1.0, 0.86, 0.78)),
    "night": ((10, 14, 48), (48, 62, 120), (28, 34, 76), (0.62, 0.66, 0.84)),
    "storm": ((62, 70, 80), (150, 158, 164), (92, 102, 108), (0.80, 0.82, 0.84)),
}
GROUNDS = {  # fill, detail
    "grass": ((112, 184, 84), (78, 148, 62)),
    "sand": ((238, 208, 146), (212, 174, 108)),
    "snow": ((244, 248, 252), (198, 216, 234)),
    "water": ((64, 148, 206), (134, 198, 232)),
}
RAINBOW = ((222, 66, 62), (246, 150, 60), (250, 218, 84), (92, 184, 96), (70, 130, 214), (136, 88, 184))
INK = (38, 36, 48)
CENTERS = {"left": 35.0, "middle": 64.0, "right": 93.0}
HEIGHTS = {"small": 34.0, "large": 64.0}


def _mix(a, b, t):
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def _times(a, light):
    return tuple(round(x * k) for x, k in zip(a, light))


class _Pen:
    """Fills shapes in the scene's style; coordinates are in pixels of the 128-pixel picture."""

    def __init__(self, image: Image.Image, style: str):
        self.draw = ImageDraw.Draw(image)
        self.line = style == "line"
        self.wash = 0.5  # how much of the paper shows through a line drawing's colours

    def color(self, rgb):
        return _mix(rgb, (255, 255, 255), self.wash) if self.line else tuple(rgb)

    def polygon(self, points, fill, outline=True):
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.polygon(points, fill=self.color(fill))
        if self.line and outline:
            self.draw.line(points + points[:2], fill=INK, width=round(1.6 * SCALE), joint="curve")

    def ellipse(self, x, y, rx, ry, fill, outline=True):
        self.draw.ellipse(
            [(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE],
            fill=self.color(fill),
            outline=INK if self.line and outline else None,
            width=round(1.6 * SCALE) if self.line and outline else 0,
        )

    def stroke(self, points, rgb, width, wash=True):
        """A line that is a line in every style."""
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(points, fill=self.color(rgb) if wash else rgb, width=round(width * SCALE), joint="curve")

    def blob(self, circles, fill):
        """A union of circles with one common outline."""
        if self.line:
            for x, y, r in circles:
                self.draw.ellipse(self._box(x, y, r + 0.8), fill=INK)
        for x, y, r in circles:
            self.draw.ellipse(self._box(x, y, r - (0.8 if self.line else 0.0)), fill=self.color(fill))

    @staticmethod
    def _box(x, y, r):
        return [(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE]


def _house(pen, x, y, h, c, dark, light):
    w = 0.52 * h
    pen.polygon([(x - w, y), (x - w, y - 0.55 * h), (x + w, y - 0.55 * h), (x + w, y)], c)
    pen.polygon([(x - 1.2 * w, y - 0.53 * h), (x, y - h), (x + 1.2 * w, y - 0.53 * h)], dark)
    pen.polygon([(x - 0.22 * w, y), (x - 0.22 * w, y - 0.32 * h), (x + 0.22 * w, y - 0.32 * h), (x + 0.22 * w, y)], dark)
    for side in (-1, 1):
        cx = x + side * 0.6 * w
        pen.polygon([(cx - 0.18 * w, y - 0.24 * h), (cx - 0.18 * w, y - 0.42 * h), (cx + 0.18 * w, y - 0.42 * h), (cx + 0.18 * w, y - 0.24 * h)], light)


def _castle(pen, x, y, h, c, dark, light):
    w = 0.55 * h
    top = y - 0.5 * h
    wall = [(x - w, y), (x - w, top)]
    teeth = 5
    step = 2 * w / (2 * teeth - 1)
    for i in range(teeth):
        left = x - w + 2 * i * step
        wall += [(left, top - 0.1 * h), (left + step, top - 0.1 * h), (left + step, top)]
        if i < teeth - 1:
            wall.append((left + 2 * step, top))
    wall.append((x + w, y))
    pen.polygon(wall, c)
    for side in (-1, 1):
        cx = x + side * w
        r = 0.17 * h
        pen.polygon([(cx - r, y), (cx - r, y - 0.68 * h), (cx + r, y - 0.68 * h), (cx + r, y)], c)
        pen.polygon([(cx - 1.3 * r, y - 0.66 * h), (cx, y - h), (cx + 1.3 * r, y - 0.66 * h)], dark)
    pen.polygon([(x - 0.13 * h, y), (x - 0.13 * h, y - 0.22 * h), (x, y - 0.32 * h), (x + 0.13 * h, y - 0.22 * h), (x + 0.13 * h, y)], dark)


TRUNK = (126, 84, 54)


def _tree(pen, x, y, h, c, dark, light):
    pen.polygon([(x - 0.07 * h, y), (x - 0.06 * h, y - 0.5 * h), (x + 0.06 * h, y - 0.5 * h), (x + 0.07 * h, y)], light)
    r = 0.23 * h
    pen.blob([(x - 0.2 * h, y - 0.5 * h, r), (x + 0.2 * h, y - 0.5 * h, r), (x, y - 0.48 * h, r), (x, y - 0.74 * h, 1.12 * r)], c)


def _palm(pen, x, y, h, c, dark, light):
    pen.polygon([(x - 0.06 * h, y), (x + 0.0 * h, y - 0.74 * h), (x + 0.07 * h, y - 0.74 * h), (x + 0.07 * h, y)], light)
    cx, cy = x + 0.035 * h, y - 0.74 * h
    for dx, dy, fill in ((-0.52, 0.12, dark), (0.52, 0.12, dark), (-0.44, -0.16, c), (0.44, -0.16, c), (-0.2, -0.3, c), (0.2, -0.3, c)):
        tip = (cx + dx * h, cy + dy * h)
        mx, my = cx + 0.5 * dx * h, cy + 0.5 * dy * h - 0.12 * h
        pen.polygon([(cx, cy - 0.05 * h), (mx, my - 0.04 * h), tip, (mx, my + 0.12 * h), (cx, cy + 0.05 * h)], fill)


def _cactus(pen, x, y, h, c, dark, light):
    r = 0.12 * h

    def capsule(points, radius):
        if pen.line:
            for (px, py), (qx, qy) in zip(points, points[1:]):
                _thick(pen, px, py, qx, qy, radius + 0.8, INK, raw=True)
        for (px, py), (qx, qy) in zip(points, points[1:]):
            _thick(pen, px, py, qx, qy, radius - (0.8 if pen.line else 0.0), c)

    capsule([(x - 0.34 * h, y - 0.68 * h), (x - 0.34 * h, y - 0.42 * h), (x, y - 0.36 * h)], 0.75 * r)
    capsule([(x + 0.34 * h, y - 0.78 * h), (x + 0.34 * h, y - 0.52 * h), (x, y - 0.46 * h)], 0.75 * r)
    capsule([(x, y), (x, y - 0.88 * h)], r)


def _thick(pen, px, py, qx, qy, radius, fill, raw=False):
    rgb = fill if raw else pen.color(fill)
    pen.draw.line([(px * SCALE, py * SCALE), (qx * SCALE, qy * SCALE)], fill=rgb, width=round(2 * radius * SCALE))
    for ex, ey in ((px, py), (qx, qy)):
        pen.draw.ellipse(pen._box(ex, ey, radius), fill=rgb)


def _boat(pen, x, y, h, c, dark, light):
    w = 0.62 * h
    pen.polygon([(x - 0.03 * h, y - 0.2 * h), (x - 0.03 * h, y - h), (x + 0.03 * h, y - h), (x + 0.03 * h, y - 0.2 * h)], INK, outline=False)
    pen.polygon([(x + 0.07 * h, y - 0.94 * h), (x + 0.07 * h, y - 0.32 * h), (x + 0.82 * w, y - 0.32 * h)], c)
    pen.polygon([(x - 0.07 * h, y - 0.84 * h), (x - 0.07 * h, y - 0.32 * h), (x - 0.62 * w, y - 0.32 * h)], light)
    pen.polygon([(x - w, y - 0.26 * h), (x - 0.66 * w, y), (x + 0.66 * w, y), (x + w, y - 0.26 * h)], c)


OBJECTS = {"house": _house, "castle": _castle, "tree": _tree, "palm": _palm, "cactus": _cactus, "boat": _boat}


def _draw_sky(pen, image, scene, horizon, u):
    top, low, hills, _ = SKIES[scene.sky]
    for row in range(round((horizon + 6) * SCALE)):
        rgb = pen.color(_mix(top, low, min(1.0, row / (horizon * SCALE)) ** 1.2))
        pen.draw.line([(0, row), (image.width, row)], fill=rgb)
    if scene.sky == "sunset":
        pen.ellipse(64 + 60 * (u["sun"] - 0.5), horizon - 5, 11, 11, (255, 226, 130))
    if scene.sky == "night":
        for sx, sy, sr in u["stars"]:
            pen.ellipse(sx, sy, sr, sr, (255, 248, 214), outline=False)
    ridge = [(-4, horizon + 6)]
    for i in range(33):
        t = i / 32
        ridge.append((-4 + t * (SIZE + 8), horizon - 5 - 5 * math.sin(6.283 * (1.1 * t + u["hill0"])) - 2.5 * math.sin(6.283 * (2.3 * t + u["hill1"]))))
    ridge.append((SIZE + 4, horizon + 6))
    pen.polygon(ridge, hills)


def _draw_weather(pen, scene, horizon, u):
    if scene.sky != "storm":
        return
    bx = 24 + 80 * u["bolt"]
    bolt = [(0, 0), (-7, 17), (-1, 17), (-6, 34), (9, 12), (3, 12), (8, 0)]
    pen.polygon([(bx + dx, 9 + dy) for dx, dy in bolt], (255, 236, 120))
    for rx, ry in u["rain"]:
        pen.stroke([(rx, ry), (rx - 3.5, ry + 10)], (190, 206, 222) if not pen.line else (60, 84, 120), 1.5)


def _draw_extra(pen, scene, horizon, u):
    if scene.extra == "rainbow":
        cx, cy = 64 + 24 * (u["arc"] - 0.5), horizon + 8
        for i, rgb in enumerate(RAINBOW):
            r = 60 - 3.2 * i
            pen.draw.arc([(cx - r) * SCALE, (cy - r) * SCALE, (cx + r) * SCALE, (cy + r) * SCALE], 180, 360, fill=pen.color(rgb), width=round(3.6 * SCALE))
    elif scene.extra == "moon":
        mx, my, r = 22 + 84 * u["moon"], 22, 11.5
        outline = []
        for i in range(25):
            a = math.pi * (0.5 + i / 24)
            outline.append((mx + r * math.cos(a), my - r * math.sin(a)))
        for i in range(25):
            a = math.pi * (1.5 - i / 24)
            outline.append((mx + 0.42 * r * math.cos(a), my - r * math.sin(a)))
        pen.polygon(outline, (255, 246, 200))
    elif scene.extra == "clouds":
        for cx, cy, k in u["clouds"]:
            pen.blob([(cx - 9 * k, cy, 6 * k), (cx, cy - 4 * k, 8.5 * k), (cx + 10 * k, cy, 6.5 * k), (cx + 1 * k, cy + 2 * k, 6 * k)], (250, 250, 252))
    elif scene.extra == "birds":
        for bx, by in u["birds"]:
            pen.stroke([(bx - 8, by - 4.5), (bx - 3.5, by - 4), (bx, by), (bx + 3.5, by - 4), (bx + 8, by - 4.5)], INK if scene.sky != "night" or pen.line else (226, 230, 244), 3.4 if scene.style == "pixel" else 2.6, wash=False)


def _draw_ground(pen, scene, horizon, u):
    light = SKIES[scene.sky][3]
    fill, detail = (_times(c, light) for c in GROUNDS[scene.ground])
    edge = [(-4, SIZE + 4)]
    swell = 0.0 if scene.ground == "water" else 2.6
    for i in range(33):
        t = i / 32
        edge.append((-4 + t * (SIZE + 8), horizon + swell * math.sin(6.283 * (0.8 * t + u["land"]))))
    edge.append((SIZE + 4, SIZE + 4))
    pen.polygon(edge, fill)
    for gx, gy in u["marks"]:
        y = horizon + 9 + gy * (SIZE - horizon - 13)
        if scene.ground == "grass":
            for dx in (-3, 0, 3):
                pen.stroke([(gx, y + 3), (gx + dx, y - 4)], detail, 1.7)
        elif scene.ground == "sand":
            pen.stroke([(gx - 10, y), (gx - 4, y - 2.5), (gx + 4, y - 2.5), (gx + 10, y)], detail, 1.8)
        elif scene.ground == "snow":
            pen.ellipse(gx, y, 9, 2.2, detail, outline=False)
        else:
            pen.stroke([(gx - 9, y), (gx - 4.5, y - 2.5), (gx, y), (gx + 4.5, y - 2.5), (gx + 9, y)], detail, 1.9)


def _nuisance(seed: int) -> dict:
    """What words do not say. Drawn in a fixed order, whatever the attributes are."""
    r = random.Random(seed)
    u = {name: r.random() for name in ("x", "y", "h", "hue", "sun", "hill0", "hill1", "bolt", "arc", "moon", "land", "horizon")}
    u["stars"] = [(r.uniform(4, 124), r.uniform(4, 62), r.uniform(1.2, 1.8)) for _ in range(9)]
    u["rain"] = [(8 + 16 * i + r.uniform(-3, 3), r.uniform(20, 78)) for i in range(8)]
    u["clouds"] = [(24 + r.uniform(-6, 8), 20 + r.uniform(-4, 6), 1.1), (66 + r.uniform(-8, 8), 34 + r.uniform(-5, 4), 0.85), (103 + r.uniform(-8, 6), 20 + r.uniform(-4, 6), 1.05)]
    bx, by = r.uniform(30, 62), r.uniform(18, 28)
    u["birds"] = [(bx, by), (bx + 21, by + 7), (bx + 40, by - 3), (bx + 9, by + 16)]
    u["marks"] = [(10 + 20 * i + r.uniform(-5, 5), (0.35 * i) % 1.0 * 0.8 + r.uniform(0, 0.2)) for i in range(6)]
    return u


def render(scene: Scene) -> Image.Image:
    """The scene as a 128x128 RGB picture."""
    u = _nuisance(scene.seed)
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    pen = _Pen(image, scene.style)
    horizon = 80 + 6 * (u["horizon"] - 0.5)
    _draw_sky(pen, image, scene, horizon, u)
    _draw_extra(pen, scene, horizon, u)
    _draw_ground(pen, scene, horizon, u)

    light = SKIES[scene.sky][3]
    soft = tuple(0.35 + 0.65 * k for k in light)  # the object keeps its colour at night
    base = OBJECT_COLORS[scene.color]
    base = _times(base, tuple(k * (0.96 + 0.08 * u["hue"]) for k in (1, 1, 1)))
    base = tuple(min(255, v) for v in base)
    paint = _times(base, soft)
    dark = _times(_mix(base, (0, 0, 0), 0.38), soft)
    pale = TRUNK if scene.object in ("tree", "palm") else (252, 244, 214)
    x = CENTERS[scene.place] + 8 * (u["x"] - 0.5)
    y = 110 + 6 * (u["y"] - 0.5)
    h = HEIGHTS[scene.size] * (0.94 + 0.12 * u["h"])
    pen.wash = 0.25
    OBJECTS[scene.object](pen, x, y, h, paint, dark, _times(pale, soft))
    pen.wash = 0.5
    _draw_weather(pen, scene, horizon, u)

    if scene.style == "pixel":
        image = image.reduce(SCALE * 4)
        return image.resize((SIZE, SIZE), Image.NEAREST)
    return image.reduce(SCALE)


# ---------------------------------------------------------------------------------------------
# Describing
# ---------------------------------------------------------------------------------------------

# For every attribute the ways to say it: inside a sentence, and as a fragment on its own. The
# first is the canonical one.
SENTENCE = {
    "place": {"left": ("on the left", "at the left"), "middle": ("in the middle", "in the center"), "right": ("on the right", "at the right")},
    "ground": {"grass": ("on grass", "on a green meadow of grass"), "sand": ("on sand", "on the sand"), "snow": ("on snow", "in the snow"), "water": ("on water", "on the water")},
    "sky": {"day": ("by day", "during the day"), "sunset": ("at sunset", "during sunset"), "night": ("at night", "during the night"), "storm": ("in a storm", "during a storm")},
    "extra": {"none": ("with a clear sky", "under a clear sky"), "rainbow": ("with a rainbow", "under a rainbow"), "moon": ("with a moon", "under a moon"), "clouds": ("with clouds", "under clouds"), "birds": ("with birds", "and flying birds")},
    "style": {"flat": ("flat illustration", "a flat illustration"), "pixel": ("pixel art", "as pixel art"), "line": ("line drawing", "a line drawing")},
}
FRAGMENT = {
    "place": {"left": ("left", "on the left"), "middle": ("middle", "in the middle", "center"), "right": ("right", "on the right")},
    "ground": {"grass": ("grass", "on grass"), "sand": ("sand", "on sand"), "snow": ("snow", "on snow"), "water": ("water", "on water")},
    "sky": {"day": ("day", "by day", "daytime"), "sunset": ("sunset", "at sunset"), "night": ("night", "at night"), "storm": ("storm", "stormy", "in a storm")},
    "extra": {"none": ("clear sky",), "rainbow": ("rainbow", "with a rainbow"), "moon": ("moon", "with a moon"), "clouds": ("clouds", "cloudy", "with clouds"), "birds": ("birds", "with birds")},
    "style": {"flat": ("flat illustration", "flat"), "pixel": ("pixel art",), "line": ("line drawing",)},
}


def caption(scene: Scene, named: tuple[str, ...] = KINDS) -> str:
    """The canonical caption of the attributes `named`; of all of them, it is what the captioner is taught to say."""
    said = {kind: SENTENCE[kind][getattr(scene, kind)][0] if kind in SENTENCE else getattr(scene, kind) for kind in named}
    noun = [said[kind] for kind in ("size", "color", "object") if kind in said]
    if noun:
        noun = ["a", *noun] + ([] if "object" in said else ["thing"])
    text = " ".join(noun + [said[kind] for kind in ("place", "ground", "sky", "extra") if kind in said])
    return ", ".join(part for part in (text, said.get("style")) if part)


def word(kind: str, value: str) -> str:
    """The plain word for one attribute, as someone would append it to a prompt."""
    return FRAGMENT[kind][value][0] if kind in FRAGMENT else value


def _fragment(rng, scene, kind):
    value = getattr(scene, kind)
    if kind in FRAGMENT:
        return rng.choice(FRAGMENT[kind][value])
    if kind == "object":
        return rng.choice((value, f"a {value}"))
    return rng.choice((value, value, f"{value} {scene.object}", f"a {value} {scene.object}"))


def _describe(rng: random.Random, scene: Scene, keep: set[str]) -> str:
    """The attributes in `keep`, as a sentence in some order or as a comma list."""
    if rng.random() < 0.3:
        parts = [_fragment(rng, scene, k) if k not in ("color", "size") else getattr(scene, k) for k in KINDS if k in keep]
        rng.shuffle(parts)
        return ", ".join(parts)
    noun = []
    if {"object", "color", "size"} & keep:
        adjectives = [getattr(scene, k) for k in ("size", "color") if k in keep]
        if rng.random() < 0.2:
            adjectives.reverse()
        noun = [" ".join(["a"] + adjectives + [scene.object if "object" in keep else "thing"])]
    places = [k for k in ("place", "ground", "sky", "extra") if k in keep]
    if rng.random() < 0.5:
        rng.shuffle(places)
    words = noun + [SENTENCE[k][getattr(scene, k)][0 if rng.random() < 0.6 else 1] for k in places]
    text = " ".join(words)
    if "style" in keep:
        style = SENTENCE["style"][scene.style]
        if rng.random() < 0.3 and text:
            text = f"{style[1].removeprefix('as ')} of {text}"
        else:
            text = f"{text}, {style[0]}" if text else style[0]
    return text


def random_caption(rng: random.Random, scene: Scene) -> tuple[str, set[str]]:
    """A true caption, as varied as people's prompts are: whole sentences, partial ones, comma
    lists, and trailing modifiers that override what stood before or add to it. Returned with the
    attributes that it tells."""
    if rng.random() < 0.1:
        base = caption(scene)
        keep = set(KINDS)
    else:
        keep = set(KINDS) if rng.random() < 0.6 else set(rng.sample(KINDS, rng.randint(1, 7)))
        base = None
    if rng.random() < 0.45:  # nothing trails
        return base or _describe(rng, scene, keep), keep
    changed = rng.sample(KINDS, rng.choice((1, 1, 1, 2, 2, 3)))
    other = scene
    for kind in changed:
        if rng.random() < 0.8:  # override; otherwise the modifier repeats or adds
            other = other.but(kind, rng.choice([v for v in ATTRIBUTES[kind] if v != getattr(scene, kind)]))
    text = caption(other) if base else _describe(rng, other, keep)
    tail = [_fragment(rng, scene, k) for k in changed]
    if rng.random() < 0.2:  # people repeat themselves
        tail.append(rng.choice(tail))
    joiner = rng.choice((", ", ", ", ", ", " "))
    # "red house" as a fragment of the colour also tells the object, whether it was told or not.
    told = {"object"} if any(scene.object in part.split() for part in tail) else set()
    return text + joiner + joiner.join(tail), keep | set(changed) | told


# The ways to ask for a change; the first is the canonical one and says nothing but the change.
# {new} and {old} are values, {said} is the new one
# as SENTENCE says it, {object} what stands there before and {now} after.
INSTRUCTIONS = {
    "object": ("turn it into a {new}", "turn the {old} into a {new}", "make it a {new}", "replace the {old} with a {new}", "a {new} instead of the {old}", "a {new} instead"),
    "color": ("make it {new}", "make the {object} {new}", "color the {object} {new}", "paint it {new}", "a {new} {now}", "{new} instead of {old}"),
    "size": ("make it {new}", "make the {object} {new}", "a {new} {now}", "{new} instead of {old}"),
    "place": ("move it to the {new}", "move the {object} to the {new}", "put it {said}", "{said} instead", "a {now} {said}"),
    "ground": ("put it {said}", "change the ground to {new}", "turn the {old} into {new}", "{said} instead", "replace the {old} with {new}", "make the ground {new}"),
    "sky": ("change the sky to {new}", "{said} instead", "{said}", "make it {new}"),
    "add": ("add {new}", "draw {new}", "{said}", "let there be {new}"),
    "remove": ("remove the {old}", "{said}", "take the {old} away", "clear the sky", "no {old}"),
    "replace": ("replace the {old} with {new}", "change the {old} to {new}", "{new} instead of the {old}", "{said} instead"),
    "style": ("make it {new}", "turn it into {new}", "as {new}", "{new} instead", "draw it as {new}"),
}
NOUNS = {"rainbow": "a rainbow", "moon": "a moon", "flat": "a flat illustration", "pixel": "pixel art", "line": "a line drawing", "storm": "a storm"}


def instruction(rng: random.Random | None, before: Scene, after: Scene) -> str:
    """Asks for what changes between two scenes; canonically without `rng`, otherwise in one of the
    ways people would, sometimes by naming the new thing alone."""
    parts = []
    for kind in KINDS:
        old, new = getattr(before, kind), getattr(after, kind)
        if old == new:
            continue
        if rng and rng.random() < 0.15:
            parts.append(_fragment(rng, after, kind))
            continue
        ways = INSTRUCTIONS[kind if kind != "extra" else "add" if old == "none" else "remove" if new == "none" else "replace"]
        way = rng.choice(ways) if rng else ways[0]
        said = SENTENCE[kind][new] if kind in SENTENCE else (new,)
        parts.append(way.format(old=old, new=NOUNS.get(new, new), said=rng.choice(said) if rng else said[0], object=before.object, now=after.object))
    if rng is None:
        return " and ".join(parts)
    rng.shuffle(parts)
    return rng.choice((" and ", ", ")).join(parts)


def corpus(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [random_caption(rng, sample_scene(rng))[0] for _ in range(n)]


EXAMPLE = {  # the pictures of demo/images: A and A' differ in the sky alone
    "a": Scene("castle", "red", "large", "middle", "grass", "day", "none", "flat", 11),
    "a_prime": Scene("castle", "red", "large", "middle", "grass", "sunset", "none", "flat", 11),
    "b": Scene("boat", "blue", "large", "left", "water", "day", "birds", "flat", 4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sheet", help="a page of random scenes")
    parser.add_argument("--example", help="folder for the pictures of the built-in example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.example:
        for name, scene in EXAMPLE.items():
            render(scene).save(f"{args.example}/{name}.png")
    if not args.sheet:
        return
    sheet = Image.new("RGB", (8 * 132 + 4, 6 * 132 + 4), "white")
    for i in range(48):
        sheet.paste(render(sample_scene(rng)), (4 + i % 8 * 132, 4 + i // 8 * 132))
    sheet.save(args.sheet)
    for _ in range(args.captions):
        print(*random_caption(rng, sample_scene(rng)), sep="  | ")


if __name__ == "__main__":
    main()
