"""Packs `day.py` and all that it runs for a machine with a GPU, no network and no Rust.

    python3 benches/gpu/package.py [--out target/gpu-day.tar.xz] [--without-demo]

The package holds the programs of this checkout, built with the features `vulkan` and `webgpu`, Vulkan's
loader, the Python packages that a machine with PyTorch and transformers lacks (`pip download`), the
tiny models of the tests, and the demo model. There:

    tar -xJf gpu-day.tar.xz && python3 gpu-day/day.py --out results
"""

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 60 << 20  # bytes
WHEELS = ["diffusers==0.42.1", "importlib_metadata", "zipp"]
# Vulkan's loader, and what NVIDIA's driver loads where there is no display.
LIBRARIES = {
    "libvulkan.so.1": "libvulkan1", "libEGL.so.1": "libegl1", "libGLX.so.0": "libglx0",
    "libGLdispatch.so.0": "libglvnd0", "libGL.so.1": "libgl1", "libOpenGL.so.0": "libopengl0",
}
PLACES = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
# What the built-in example reads: no other U-Net, and no captioner, since its captions are given.
DEMO = ["model", "images"]
LEFT_OUT = ["unet_instruct_pix2pix", "unet_inpaint", "captioner"]


def build(features: str) -> dict[str, Path]:
    """The executables by the name of their target."""
    command = [
        "cargo", "build", "--release", "--features", features, "--message-format", "json-render-diagnostics",
        "--bin", "dinv", "--bench", "compare", "--test", "library",
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {m["target"]["name"]: Path(m["executable"]) for m in messages if m.get("executable")}


def collect(folder: Path, demo: bool, features: str) -> None:
    found = build(features)
    (folder / "bin").mkdir(parents=True)
    for target, name in (("dinv", "dinv"), ("compare", "step"), ("library", "gpu-tests")):
        subprocess.run(["strip", "-o", folder / "bin" / name, found[target]], check=True)
    shutil.copy(ROOT / "benches/gpu/day.py", folder)
    (folder / "compare").mkdir()
    for name in ("compare.py", "make_weights.py", "torch_step.py"):
        shutil.copy(ROOT / "benches/compare" / name, folder / "compare")
    (folder / "reference").mkdir()
    shutil.copy(ROOT / "training/reference/parity.py", folder / "reference")
    for name in ("learning", "pipeline"):
        shutil.copytree(ROOT / "tests/golden" / name, folder / "golden" / name)
    (folder / "lib").mkdir()
    for name, package in LIBRARIES.items():
        found = next((path for place in PLACES if (path := Path(place, name)).exists()), None)
        if found is None:
            sys.exit(f"{name} is not installed here: `apt-get install {package}` on Debian")
        shutil.copy(found, folder / "lib" / name)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, *WHEELS]
        subprocess.run(pip, check=True)
        for wheel in Path(wheels).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder / "python")
    if demo:
        for name in DEMO:
            ignore = shutil.ignore_patterns(*LEFT_OUT)
            shutil.copytree(ROOT / "demo" / name, folder / "demo" / name, ignore=ignore)


def compressed(folder: Path, out: Path) -> None:
    """An archive; `.tar` without compression, which takes minutes."""
    if out.suffix == ".tar":
        with tarfile.open(out, "w") as archive:
            archive.add(folder, "gpu-day")
        return
    # The programs are alike: a dictionary that holds them all.
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 512 << 20},
    ]
    with lzma.open(out, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(folder, "gpu-day")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "target/gpu-day.tar.xz")
    parser.add_argument("--features", default="vulkan,webgpu", help="`webgpu` rehearses without a card")
    parser.add_argument("--without-demo", action="store_true", help="40 MB less")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "gpu-day")
        collect(folder, not args.without_demo, args.features)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        compressed(folder, args.out)
        size = args.out.stat().st_size
        parts = {path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) or path.stat().st_size for path in folder.iterdir()}
    print(f"{args.out}: {size / 2**20:.1f} MiB, of " + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in parts.items()))
    if size > MOST:
        sys.exit(f"more than {MOST >> 20} MiB: leave the demo model out (--without-demo)")


if __name__ == "__main__":
    main()
