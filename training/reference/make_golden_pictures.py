"""Writes tests/golden/pictures: small pictures in the forms that people have, and what Pillow reads of each.

For every picture there is `NAME.expected.png`, 8-bit RGB: turned as `ImageOps.exif_transpose` does, brought to sRGB by its
ICC profile with littleCMS (or by its gAMA chunk with the formula of the PNG specification), transparent pixels laid
over white. 16 bits are scaled, which Pillow's own conversion of greys is not. `refused.json` names those that Pillow
reads in a way that has no meaning as a picture.
"""

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden" / "pictures"
W, H = 13, 9
rng = np.random.default_rng(5)
RGB = rng.integers(0, 256, (H, W, 3), np.uint8)
ALPHA = rng.integers(0, 256, (H, W, 1), np.uint8)
ALPHA[0, :3, 0] = [0, 255, 1]
GREY = rng.integers(0, 256, (H, W, 1), np.uint8)
WIDE = rng.integers(0, 65536, (H, W, 3), np.uint16)
WIDE_ALPHA = rng.integers(1, 65536, (H, W, 1), np.uint16)


def premultiplied(colour, alpha):
    most = np.iinfo(colour.dtype).max
    return (colour.astype(np.uint64) * alpha // most).astype(colour.dtype)


def packed(values, bits):
    rows = []
    for row in values[:, :, 0] >> (8 - bits):
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return b"".join(rows)


def tiff(data, samples, bits, photometric, *, extra=(), order="<", big=False, planar=False, more=(), compression=1):
    """A TIFF in one strip, or one for each plane."""
    strips = data if planar else [data]
    tags = [
        (256, 4, [W]), (257, 4, [H]), (258, 3, [bits] * samples), (259, 3, [compression]), (262, 3, [photometric]),
        (277, 3, [samples]), (278, 4, [H]), (279, 4, [len(strip) for strip in strips]),
        (284, 3, [2 if planar else 1]), *more,
    ]
    if extra:
        tags.append((338, 3, list(extra)))
    width, code, pointer = (8, "Q", "Q") if big else (4, "I", "I")
    kinds = {1: "B", 3: "H", 4: "I", 5: "II", 16: "Q"}
    head = 16 if big else 8
    sizes = head + (8 if big else 2) + (len(tags) + 1) * (20 if big else 12) + width
    body, offsets = b"", []
    for strip in strips:
        offsets.append(sizes + len(body))
        body += strip
    tags = sorted([*tags, (273, 4, offsets)])
    entries = b""
    for tag, kind, values in tags:
        if kind == 5:
            value = struct.pack(order + "II", *values)
            count = 1
        else:
            value = struct.pack(order + kinds[kind] * len(values), *values)
            count = len(values)
        entries += struct.pack(order + "HH" + code, tag, kind, count)
        if len(value) <= width:
            entries += value.ljust(width, b"\0")
        else:
            entries += struct.pack(order + pointer, sizes + len(body))
            body += value
    magic = {"<": b"II", ">": b"MM"}[order]
    if big:
        head = magic + struct.pack(order + "HHHQ", 43, 8, 0, 16) + struct.pack(order + "Q", len(tags))
    else:
        head = magic + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(tags))
    return head + entries + struct.pack(order + pointer, 0) + body


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, colour, bits=8, before=(), after=()):
    if bits == 16:
        pixels = pixels.astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, colour, 0, 0, 0))]
    parts += [chunk(*part) for part in before]
    parts += [chunk(b"IDAT", zlib.compress(raw))]
    parts += [chunk(*part) for part in after] + [chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(value, kind=3, order=">"):
    packs = {1: "Bxxx", 3: "Hxx", 4: "I", 8: "hxx", 9: "i"}
    magic = {"<": b"II", ">": b"MM"}[order]
    return magic + struct.pack(order + "HIHHHI" + packs[kind] + "I", 42, 8, 1, 0x112, kind, 1, value, 0)


def raw_profile(data):
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


def xmp(value, element=False):
    inside = f"<tiff:Orientation>{value}</tiff:Orientation>" if element else ""
    attribute = "" if element else f' tiff:Orientation="{value}"'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def itxt(text, compressed=False):
    body = zlib.compress(text) if compressed else text
    return b"iTXt", b"XML:com.adobe.xmp\0" + (b"\1" if compressed else b"\0") + b"\0\0\0" + body


def saved(image, format, **options):
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def grey_profile(gamma):
    """An ICC profile of grey with a gamma (ICC.1:2010, a curve of one entry)."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    white = b"XYZ \0\0\0\0" + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    text = b"text\0\0\0\0public domain\0".ljust(24, b"\0")
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(8 + 3 + 67)
    desc = desc.ljust(-(-len(desc) // 4) * 4, b"\0")
    parts = {b"desc": desc, b"cprt": text, b"wtpt": white, b"kTRC": curve}
    offset, table, body = 128 + 4 + 12 * len(parts), b"", b""
    for name, part in parts.items():
        table += name + struct.pack(">II", offset + len(body), len(part))
        body += part
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body


def gamma_to_srgb(values, gamma):
    linear = np.asarray(values, np.float64) ** (1 / gamma)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)


def over_white(rgb, alpha):
    rgb, alpha = rgb.astype(np.uint32), alpha.astype(np.uint32)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def read(data):
    """As Pillow reads it, over white."""
    image = Image.open(BytesIO(data))
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    if profile is not None and image.mode in ("L", "RGB"):
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, BytesIO(profile), srgb, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE)
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        if image.mode == "La":
            image = image.convert("LA")
        array = np.asarray(image.convert("RGBA"))
        return over_white(array[:, :, :3], array[:, :, 3:])
    return np.asarray(image.convert("RGB"))


cat = lambda *parts: np.concatenate(parts, -1).tobytes()
palette = rng.integers(0, 65536, 3 * 256)
orientation = lambda value, kind=3: [(274, kind, [value])]
cmyk = rng.integers(0, 256, (H, W, 4), np.uint8)
x = np.zeros((H, W, 1), np.uint8)
files = {
    "grey1.tif": tiff(packed(GREY, 1), 1, 1, 1),
    "grey1_white.tif": tiff(packed(GREY, 1), 1, 1, 0),
    "grey2.tif": tiff(packed(GREY, 2), 1, 2, 1),
    "grey4.tif": tiff(packed(GREY, 4), 1, 4, 1),
    "grey4_white.tif": tiff(packed(GREY, 4), 1, 4, 0),
    "grey8_white.tif": tiff(GREY.tobytes(), 1, 8, 0),
    "grey16.tif": tiff(WIDE[:, :, :1].astype("<u2").tobytes(), 1, 16, 1),
    "grey16_motorola.tif": tiff(WIDE[:, :, :1].astype(">u2").tobytes(), 1, 16, 1, order=">"),
    "grey_extra.tif": tiff(cat(GREY, ALPHA), 2, 8, 1, extra=[0]),
    "grey_alpha.tif": tiff(cat(GREY, ALPHA), 2, 8, 1, extra=[2]),
    "grey_premultiplied.tif": tiff(cat(premultiplied(GREY, ALPHA), ALPHA), 2, 8, 1, extra=[1]),
    "rgb.tif": tiff(RGB.tobytes(), 3, 8, 2),
    "rgb_big.tif": tiff(RGB.tobytes(), 3, 8, 2, big=True),
    "rgb_big_turned.tif": tiff(RGB.tobytes(), 3, 8, 2, big=True, more=[(274, 3, [6])]),
    "rgb_planes.tif": tiff([RGB[:, :, i].tobytes() for i in range(3)], 3, 8, 2, planar=True),
    "rgb_extra.tif": tiff(cat(RGB, ALPHA), 4, 8, 2, extra=[0]),
    "rgb_extra2.tif": tiff(cat(RGB, ALPHA, x), 5, 8, 2, extra=[0, 0]),
    "rgba.tif": tiff(cat(RGB, ALPHA), 4, 8, 2, extra=[2]),
    "rgba_unsaid.tif": tiff(cat(RGB, ALPHA), 4, 8, 2),
    "rgba_corel.tif": tiff(cat(RGB, ALPHA), 4, 8, 2, extra=[999]),
    "rgba_premultiplied.tif": tiff(cat(premultiplied(RGB, ALPHA), ALPHA), 4, 8, 2, extra=[1]),
    "rgba_premultiplied_extra.tif": tiff(cat(premultiplied(RGB, ALPHA), ALPHA, x), 5, 8, 2, extra=[1, 0]),
    "rgba_deflate.tif": tiff(zlib.compress(cat(premultiplied(RGB, ALPHA), ALPHA)), 4, 8, 2, extra=[1], compression=8),
    "rgb16.tif": tiff(WIDE.astype("<u2").tobytes(), 3, 16, 2),
    "rgb16_motorola.tif": tiff(WIDE.astype(">u2").tobytes(), 3, 16, 2, order=">"),
    "rgba16.tif": tiff(np.concatenate([WIDE, WIDE_ALPHA], -1).astype("<u2").tobytes(), 4, 16, 2, extra=[2]),
    "rgba16_premultiplied.tif": tiff(
        np.concatenate([premultiplied(WIDE, WIDE_ALPHA), WIDE_ALPHA], -1).astype("<u2").tobytes(), 4, 16, 2, extra=[1]
    ),
    "palette8.tif": tiff(GREY.tobytes(), 1, 8, 3, more=[(320, 3, list(palette))]),
    "palette4.tif": tiff(packed(GREY, 4), 1, 4, 3, more=[(320, 3, list(palette[:48]))]),
    "palette1.tif": tiff(packed(GREY, 1), 1, 1, 3, more=[(320, 3, list(palette[:6]))]),
    "cmyk.tif": tiff(cmyk.tobytes(), 4, 8, 5),
    "cmyk_extra.tif": tiff(cat(cmyk, x), 5, 8, 5, extra=[0]),
    "lzw.tif": saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"),
    "predictor.tif": saved(Image.fromarray(RGB), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "packbits.tif": saved(Image.fromarray(GREY[:, :, 0]), "TIFF", compression="packbits"),
    "group4.tif": saved(Image.fromarray(GREY[:, :, 0]).convert("1"), "TIFF", compression="group4"),
    "jpeg.tif": saved(Image.fromarray(np.repeat(np.repeat(GREY, 8, 0), 8, 1)[:, :, 0]), "TIFF", compression="jpeg"),
    "turned.tif": tiff(RGB.tobytes(), 3, 8, 2, more=orientation(6)),
    "turned_long.tif": tiff(RGB.tobytes(), 3, 8, 2, more=orientation(8, 4)),
    "turned_xmp.tif": tiff(RGB.tobytes(), 3, 8, 2, more=[(700, 1, list(xmp(5)))]),
    "grey_profile.tif": tiff(GREY.tobytes(), 1, 8, 1, more=[(34675, 1, list(grey_profile(1.0)))]),
    "eXIf_before.png": png(RGB, 2, before=[(b"eXIf", exif(6))]),
    "eXIf_after.png": png(RGB, 2, after=[(b"eXIf", exif(6))]),
    "eXIf_long.png": png(RGB, 2, before=[(b"eXIf", exif(8, 4))]),
    "eXIf_intel_long.png": png(RGB, 2, before=[(b"eXIf", exif(3, 4, "<"))]),
    "eXIf_byte.png": png(RGB, 2, before=[(b"eXIf", exif(6, 1))]),
    "eXIf_signed.png": png(RGB, 2, before=[(b"eXIf", exif(5, 9))]),
    "eXIf_nonsense.png": png(RGB, 2, before=[(b"eXIf", exif(9))]),
    "magick_text.png": png(RGB, 2, before=[(b"tEXt", b"Raw profile type exif\0" + raw_profile(exif(6)))]),
    "magick_ztxt.png": png(
        RGB, 2, after=[(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(b"Exif\0\0" + exif(8))))]
    ),
    "xmp.png": png(RGB, 2, before=[itxt(xmp(6))]),
    "xmp_element.png": png(RGB, 2, before=[itxt(xmp(8, True))]),
    "xmp_compressed_after.png": png(RGB, 2, after=[itxt(xmp(7), True)]),
    "exif_goes_before_xmp.png": png(RGB, 2, before=[(b"eXIf", exif(1)), itxt(xmp(6))]),
    "grey_alpha.png": png(np.concatenate([GREY, ALPHA], -1), 4),
    "grey_transparent.png": png(GREY, 0, before=[(b"tRNS", struct.pack(">H", GREY[2, 2, 0]))]),
    "grey16.png": png(WIDE[:, :, :1], 0, 16),
    "grey_profile.png": png(GREY, 0, before=[(b"iCCP", b"grey\0\0" + zlib.compress(grey_profile(1.8)))]),
    "grey_profile_linear.png": png(GREY, 0, before=[(b"iCCP", b"grey\0\0" + zlib.compress(grey_profile(1.0)))]),
    "exif.jpg": saved(Image.fromarray(np.repeat(np.repeat(GREY, 8, 0), 8, 1)[:, :, 0]), "JPEG", quality=95, exif=exif(6, 4)),
    "xmp.jpg": saved(Image.fromarray(np.repeat(np.repeat(GREY, 8, 0), 8, 1)[:, :, 0]), "JPEG", quality=95, xmp=xmp(8)),
    "grey_profile.jpg": saved(
        Image.fromarray(np.repeat(np.repeat(GREY, 8, 0), 8, 1)[:, :, 0]), "JPEG", quality=95, icc_profile=grey_profile(1.0)
    ),
    "exif.webp": saved(Image.fromarray(RGB), "WEBP", lossless=True, exif=exif(6)),
    "xmp.webp": saved(Image.fromarray(RGB), "WEBP", lossless=True, xmp=xmp(5)),
    "rgb.bmp": saved(Image.fromarray(RGB), "BMP"),
    "palette.bmp": saved(Image.fromarray(RGB).quantize(16), "BMP"),
    "bits.bmp": saved(Image.fromarray(GREY[:, :, 0]).convert("1"), "BMP"),
    "bgrx.bmp": saved(Image.merge("RGBA", Image.fromarray(np.concatenate([RGB, ALPHA], -1)).split()), "BMP"),
    "palette.gif": saved(Image.fromarray(RGB).quantize(16), "GIF"),
    "transparent.gif": saved(Image.fromarray(RGB).quantize(16), "GIF", transparency=3),
    "palette_transparent.png": saved(Image.fromarray(RGB).quantize(16), "PNG", transparency=bytes(range(0, 240, 15))),
}
# By the formula of the PNG specification: Pillow leaves gAMA alone.
gamma = {
    "gamma_linear.png": (RGB, 2, 8, 1.0, []),
    "gamma_mac.png": (RGB, 2, 8, 0.55556, []),
    "gamma_grey.png": (GREY, 0, 8, 1.0, []),
    "gamma_wide.png": (WIDE, 2, 16, 1.0, []),
    "gamma_usual.png": (RGB, 2, 8, 0.45455, []),
    "gamma_beside_srgb.png": (RGB, 2, 8, 1.0, [(b"sRGB", b"\0")]),
}
refused = {
    "float.tif": tiff(RGB[:, :, :1].astype("<f4").tobytes(), 1, 32, 1, more=[(339, 3, [3])]),
    "long.tif": tiff(RGB[:, :, :1].astype("<u4").tobytes(), 1, 32, 1),
    "signed.tif": tiff(RGB[:, :, :1].astype("<i2").tobytes(), 1, 16, 1, more=[(339, 3, [2])]),
    "lab.tif": tiff(RGB.tobytes(), 3, 8, 8),
    "reversed_bits.tif": tiff(RGB.tobytes(), 3, 8, 2, more=[(266, 3, [2])]),
    "avif.png": saved(Image.fromarray(RGB), "AVIF"),
    "jpeg2000.jpg": saved(Image.fromarray(RGB), "JPEG2000"),
    "netpbm.ppm": saved(Image.fromarray(RGB), "PPM"),
    "icon.ico": saved(Image.fromarray(np.resize(RGB, (16, 16, 3))), "ICO"),
    "targa.tga": saved(Image.fromarray(RGB), "TGA"),
}

FOLDER.mkdir(parents=True, exist_ok=True)
for old in FOLDER.iterdir():
    old.unlink()
for name, data in files.items():
    (FOLDER / name).write_bytes(data)
    Image.fromarray(np.ascontiguousarray(read(data))).save(FOLDER / f"{name}.expected.png")
for name, (pixels, colour, bits, value, more) in gamma.items():
    data = png(pixels, colour, bits, before=[*more, (b"gAMA", struct.pack(">I", round(value * 100000)))])
    (FOLDER / name).write_bytes(data)
    plain = more or value == 0.45455
    expected = pixels if plain else gamma_to_srgb(pixels / (65535 if bits == 16 else 255), value)
    expected = np.repeat(expected, 3, 2) if expected.shape[2] == 1 else expected
    Image.fromarray(expected).save(FOLDER / f"{name}.expected.png")
for name, data in refused.items():
    Image.open(BytesIO(data)).load()
    (FOLDER / name).write_bytes(data)
(FOLDER / "refused.json").write_text(json.dumps(sorted(refused), indent=1) + "\n")
