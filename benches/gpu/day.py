"""Measures a GPU beside PyTorch in one unattended run.

    python3 day.py --out DIR [--minutes 12] [--device vulkan] [--parts device sd15 …] [--tiny]

Runs from the package that `package.py` makes. Parts come in order of worth, each with a time limit.
Results are written after every measurement, to DIR/gpu-day.json and DIR/gpu-day.md: a run that is cut
short keeps them. `--tiny` is the rehearsal, with tiny models, on any device; parts that need a real
card are marked as left out.
"""

import argparse
import json
import multiprocessing
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOLERANCE = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1}


class Stopped(Exception):
    """A part's time is up; with what a command had said by then."""

    def __init__(self, message: str, said: str = ""):
        super().__init__(message)
        self.said = said


class Failed(Exception):
    """A command or a worker ended with an error; with what it had said."""

    def __init__(self, message: str, said: str = ""):
        super().__init__(message)
        self.said = said


class Day:
    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.bin = args, args.out, HERE / "bin"
        self.work = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * args.minutes
        self.results = {"device": args.device, "parts": {}}

    # Results

    def put(self, part: str, name: str, value) -> None:
        self.results["parts"].setdefault(part, {})[name] = value
        shown = json.dumps(value)
        print(f"{part}: {name}: {shown if len(shown) < 400 else shown[:400] + '…'}", flush=True)
        self.write()

    def write(self) -> None:
        for name, text in (
            ("gpu-day.json", json.dumps(self.results, indent=1)),
            ("gpu-day.md", markdown(self.results)),
        ):
            path = self.out / (name + ".part")
            path.write_text(text)
            path.replace(self.out / name)

    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, name: str, limit: float, work) -> None:
        """Runs `work` for at most `limit` seconds; what goes wrong is a result, too."""
        if self.args.parts and name not in self.args.parts:
            return
        if self.left() < 10:
            self.put(name, "left out", "no time left")
            return
        began, self.limit = time.monotonic(), min(time.monotonic() + limit, self.end)
        try:
            work()
        except Stopped as stopped:
            self.put(name, "stopped", str(stopped))
        except Exception as error:  # noqa: BLE001: the other parts go on
            traceback.print_exc()
            self.put(name, "failed", f"{type(error).__name__}: {error}"[:2000])
        self.put(name, "seconds", round(time.monotonic() - began, 1))

    # Commands

    def run(self, command: list, limit: float | None = None, **environment: str) -> str:
        seconds = self.limit - time.monotonic()
        if limit is not None:
            seconds = min(seconds, limit)
        if seconds <= 0:
            raise Stopped(f"no time left for {Path(str(command[0])).name}")
        command = [str(word) for word in command]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds,
                env=os.environ | environment, cwd=HERE,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")
            error = (late.stderr or b"").decode(errors="replace")
            message = f"{' '.join(command)[:200]}: not done after {seconds:.0f} s; {said[-300:]} {error[-300:]}"
            raise Stopped(message, said) from None
        if done.returncode:
            message = f"{' '.join(command)[:300]}\n{done.stdout[-1000:]}\n{done.stderr[-1500:]}"
            raise Failed(message, done.stdout)
        return done.stdout

    def apart(self, function, *arguments):
        """Calls `function` in a process of its own, whose memory on the card goes with it."""
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                seconds = max(self.limit - time.monotonic(), 0.1)
                return pool.apply_async(function, arguments).get(seconds)
            except multiprocessing.TimeoutError:
                raise Stopped(f"no time left for {function.__name__}") from None

    def dinv(self, *words, **environment: str) -> float:
        """Runs the program on the device and gives the seconds."""
        began = time.monotonic()
        self.run([self.bin / "dinv", *words], **environment)
        return time.monotonic() - began


class Worker:
    """A process that works once for every line it is sent."""

    def __init__(self, day: Day, command: list, **environment: str):
        self.day, self.lines = day, queue.Queue()
        command = [str(word) for word in command]
        self.errors = open(day.work / "worker.err", "w+")
        self.before = memory_used()
        self.peak = self.before
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | environment, cwd=HERE,
        )
        threading.Thread(target=self.read, daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()
        began = time.monotonic()
        self.line("ready")
        self.opened = time.monotonic() - began

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def watch(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, memory_used())
            time.sleep(0.2)

    def line(self, start: str) -> str:
        try:
            line = self.lines.get(timeout=max(self.day.limit - time.monotonic(), 0.1))
        except queue.Empty:
            self.close()
            raise Stopped("no time left for a worker") from None
        if not line.startswith(start) or not line:
            self.errors.seek(0)
            said = self.errors.read()[-1500:]
            self.close()
            raise Failed(f"a worker ended: {line} {said}")
        return line

    def work(self, what: str = "") -> tuple[float, list]:
        began = time.perf_counter()
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.line("[")
        seconds = time.perf_counter() - began
        return seconds, json.loads(re.sub(r"\binf\b", "Infinity", line))  # as Rust prints it

    def measure(self, what: str, repeats: int) -> dict:
        """The first call, which compiles, by itself; then the others."""
        first, result = self.work(what)
        times = []
        for _ in range(repeats):
            times.append(self.work(what)[0])
            if time.monotonic() > self.day.limit - 5:
                break
        time.sleep(0.3)  # so that the memory is looked at once more
        return {
            "opened_s": round(self.opened, 1),
            "first_s": round(first, 3),
            "median_s": round(statistics.median(times), 5),
            "fastest_s": round(min(times), 5),
            "memory_gb": round((self.peak - self.before) / 1024, 2),
            "result": result,
        }

    def close(self) -> None:
        try:
            self.process.stdin.close()
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def memory_used() -> int:
    """MiB used on the card by everything; 0 where there is none to ask."""
    if not shutil.which("nvidia-smi"):
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    return int(done.stdout.split()[0]) if done.returncode == 0 else 0


# The parts


def device(day: Day) -> None:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        day.put("device", "card", day.run(query).strip())
    said = day.run([day.bin / "dinv", "doctor", "--device", day.args.device, "--json"], limit=60)
    day.put("device", "doctor", json.loads(said))
    environment = {"DINV_TEST_DEVICE": day.args.device, "DINV_TEST_GOLDEN": str(HERE / "golden")}
    said = day.run([day.bin / "gpu-tests", "gpu::", "--test-threads", "4"], limit=110, **environment)
    passed = [line for line in said.splitlines() if line.startswith("test ")]
    day.put("device", "tiny pipelines as on the CPU", passed)


def worker_command(day: Day, way: str, model: Path, inputs: Path, what: str) -> list:
    if way.startswith("torch"):
        flags = {"torch": [], "torch-cl": ["--channels-last"], "torch-compiled": ["--compile"]}[way]
        target = "cpu" if day.args.tiny else "cuda"
        script = HERE / "compare/torch_step.py"
        return [sys.executable, script, model, inputs, what, "--device", target, *flags]
    return [day.bin / "step", model, inputs, what, "--device", day.args.device]


def write_inputs(day: Day, part: str, model: Path, pixels: int) -> Path:
    sys.path.insert(0, str(HERE / "compare"))
    import compare

    inputs = day.work / f"{part}.safetensors"
    compare.write_inputs(inputs, model, pixels, 1, 10)
    return inputs


def compare(day: Day, part: str, model: Path, pixels: int, ways: list, whats=("call", "step"),
            dtype: str = "f16", repeats: int = 20) -> None:
    """Seconds, memory and results of calls and steps; the first of the ways is the measure."""
    inputs = write_inputs(day, part, model, pixels)
    if day.args.tiny:
        dtype = "f32"  # PyTorch's CPU has no convolutions in f16
    bases: dict[str, dict] = {}
    for way in ways:
        command, *settings = way.split()
        environment = dict(setting.split("=") for setting in settings)
        command = [*worker_command(day, command, model, inputs, "step"), "--dtype", dtype]
        worker = None
        try:
            worker = Worker(day, command, **environment)
            for what in whats:
                found = worker.measure(what, repeats)
                if way == ways[0]:
                    bases[what] = found
                elif what in bases:
                    against(found, bases[what], dtype)
                day.put(part, f"{what}, {dtype}, {way}", found)
        except Exception as error:  # noqa: BLE001: the other ways go on
            day.put(part, f"{dtype}, {way}", {"failed": f"{type(error).__name__}: {error}"[:1500]})
        finally:
            if worker is not None:
                worker.close()


def against(found: dict, base: dict, dtype: str) -> None:
    """Ratios, and whether both found the same."""
    pairs = list(zip(found["result"], base["result"]))
    found["error"] = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
    found["agrees"] = found["error"] <= TOLERANCE[dtype]
    found["time_ratio"] = round(found["median_s"] / base["median_s"], 3)
    if base["memory_gb"]:
        found["memory_ratio"] = round(found["memory_gb"] / base["memory_gb"], 3)


def profile(day: Day, part: str, model: Path, pixels: int, dtype: str) -> None:
    """Which kernels one step spends its time in."""
    inputs = write_inputs(day, part, model, pixels)
    log = day.work / f"{part}.log"
    log.unlink(missing_ok=True)
    environment = {"CUBECL_DEBUG_LOG": str(log), "CUBECL_DEBUG_OPTION": "profile-medium"}
    worker = Worker(day, [*worker_command(day, "dinv", model, inputs, "step"), "--dtype", dtype], **environment)
    first, _ = worker.work()
    worker.work()
    mark = log.stat().st_size
    seconds, _ = worker.work()
    worker.close()
    with open(log, errors="replace") as file:
        file.seek(mark)
        text = file.read()
    (day.out / f"{part}-profile.log").write_text(text[-12_000_000:])
    day.put(part, "profiled step", {"seconds": round(seconds, 3), "first_s": round(first, 1)} | by_kernel(text))


def by_kernel(text: str) -> dict:
    """Launches, and milliseconds on the card by kernel, the most first."""
    unit = {"ns": 1e-6, "µs": 1e-3, "ms": 1.0, "s": 1e3}
    times: dict[str, list] = {}
    for line in text.splitlines():
        found = re.match(r"\|\s*([\d.]+)(ns|µs|ms|s)\s*\|\s*(.*)", line)
        if not found:
            continue
        words = [re.sub(r"_[0-9a-f]{8}$", "", word) for word in found[3].split(" | ")]
        name = words[0]
        if name == "KernelBinop":
            name = words[1]
        elif name.startswith("MatmulEntry") or "Conv" in name:
            name = " ".join(word for word in words if word.endswith("Family"))[:40] + found[3][-8:]
        times.setdefault(name, []).append(float(found[1]) * unit[found[2]])
    rows = sorted(((sum(t), len(t), name) for name, t in times.items()), reverse=True)
    kernels = {name: [round(total, 2), count] for total, count, name in rows[:40]}
    return {"launches": sum(row[1] for row in rows), "ms": round(sum(row[0] for row in rows), 1), "kernels": kernels}


def random_model(day: Day, name: str) -> Path:
    folder, part = day.work / name, day.work / f"{name}.part"
    if not folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        target = "cpu" if day.args.tiny else "cuda"
        flags = ["--dtype", "f32" if day.args.tiny else "f16", "--device", target]
        day.run([sys.executable, HERE / "compare/make_weights.py", name, part, *flags])
        part.rename(folder)
    return folder


def sd15(day: Day) -> None:
    if day.args.tiny:
        compare(day, "sd15", random_model(day, "demo"), 64, ["torch", "dinv"], repeats=3)
        return
    compare(day, "sd15", random_model(day, "sd15"), 512, ["torch", "dinv"])


def profiled(day: Day) -> None:
    name, pixels, dtype = ("demo", 64, "f32") if day.args.tiny else ("sd15", 512, "f16")
    profile(day, "profile", random_model(day, name), pixels, dtype)


def sdxl(day: Day) -> None:
    if day.args.tiny:
        day.put("sdxl", "left out", "takes a real card")
        return
    compare(day, "sdxl", random_model(day, "sdxl"), 1024, ["torch", "dinv"], ("step", "call"), repeats=6)


def compiled(day: Day) -> None:
    if day.args.tiny:
        day.put("compiled", "left out", "takes a real card")
        return
    compare(day, "compiled", random_model(day, "sd15"), 512, ["torch", "torch-cl", "torch-compiled"], ("step",))


def picture(day: Day) -> None:
    """A drawing of the whole pipeline from given latents, by diffusers and by this crate."""
    import numpy as np
    from PIL import Image

    if day.args.tiny:
        folder, seconds = HERE / "golden/pipeline", day.apart(drawn_by_torch, day.work, None)
    else:
        folder, seconds = day.work / "pipeline", day.apart(drawn_by_torch, day.work, random_model(day, "sd15"))
    day.put("picture", f"PyTorch, seconds for {PICTURE_STEPS} steps and decoding", seconds)
    out = day.work / "picture.png"
    seconds = day.dinv(
        "generate", "--model", folder, "--prompt", PROMPT, "--negative-prompt", NEGATIVE,
        "--num-inference-steps", PICTURE_STEPS, "--guidance-scale", 5, "--scheduler", "ddim",
        "--init-latents", day.work / "init.safetensors", "-o", out, "--overwrite", "--quiet",
        "--device", day.args.device, "--dtype", "f32" if day.args.tiny else "f16",
    )
    day.put("picture", "dinv, seconds with opening and compiling", round(seconds, 2))
    expected, found = (
        np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (day.work / "expected.png", out)
    )
    Image.fromarray(np.concatenate([expected, found], 1).astype(np.uint8)).save(day.out / "picture.png")
    difference = np.abs(found - expected)
    day.put("picture", "difference of 255", {"largest": int(difference.max()), "mean": round(float(difference.mean()), 3)})


PICTURE_STEPS, PROMPT, NEGATIVE = 20, "a red house on a green hill, at sunset", "blurry"


def drawn_by_torch(work: Path, model: Path | None) -> float:
    """Draws from random latents, which are written, with the random `model` or the tiny one; seconds."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file

    if model is None:
        target, dtype = "cpu", torch.float32
        pipeline = StableDiffusionPipeline.from_pretrained(HERE / "golden/pipeline", safety_checker=None)
    else:
        target, dtype = "cuda", torch.float16
        pipeline = random_pipeline(work, model)
        pipeline.save_pretrained(work / "pipeline")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline = pipeline.to(target, dtype)
    pipeline.set_progress_bar_config(disable=True)
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(15))
    save_file({"latents": latents}, work / "init.safetensors")
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        drawn = pipeline(
            PROMPT, negative_prompt=NEGATIVE, latents=latents.to(target, dtype),
            num_inference_steps=PICTURE_STEPS, guidance_scale=5.0, output_type="pil",
        ).images[0]
        seconds = time.monotonic() - began
    drawn.save(work / "expected.png")
    return round(seconds, 2)


def random_pipeline(work: Path, model: Path):
    """Stable Diffusion 1.5 whole, with random weights and a made-up vocabulary."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(HERE / "reference"))
    from parity import CLIP_L, SD_NOISE, make_tokenizer, vae_config

    torch.manual_seed(1)
    with torch.device("cuda"), torch.no_grad():
        vae = AutoencoderKL(**vae_config(StableDiffusionPipeline)).eval().requires_grad_(False)
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L, eos_token_id=49407))
        # So that pictures are neither flat nor clipped.
        decoded = vae.decode(torch.randn(1, 4, 32, 32)).sample
        vae.decoder.conv_out.weight.mul_(0.3 / decoded.std())
        vae.decoder.conv_out.bias.zero_()
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float16)
    return StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.half(), unet=unet,
        tokenizer=make_tokenizer(work / "vocabulary", "<|endoftext|>"), scheduler=DDIMScheduler(**SD_NOISE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def kernels(day: Day) -> None:
    """Kernels by themselves, and what the card does at best."""
    if not day.args.tiny:
        day.put("kernels", "card", day.apart(ceilings))
    scale = ["--scale", "16", "--seconds", "0.01"] if day.args.tiny else []
    for group in day.args.kernels:
        command = [day.bin / "step", "kernels", group, "--device", day.args.device, *scale]
        try:
            said = day.run(command, limit=120)
        except (Stopped, Failed) as error:
            day.put("kernels", f"{group} ended early", str(error)[:1000])
            said = error.said
        lines = [re.sub(r": (inf|NaN)\b", ": null", line) for line in said.splitlines()]
        rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        day.put("kernels", group, rows or f"nothing: {said[:300]}")


def ceilings() -> dict:
    import torch

    def seconds(work) -> float:
        work()
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    found = {}
    for name, dtype in (("f16", torch.float16), ("f32", torch.float32)):
        x = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        y = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        found[f"{name} product, TFLOP/s"] = round(2 * 8192**3 / seconds(lambda: x @ y) / 1e12, 1)
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    found["copy, GB/s"] = round(2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e9)
    return found


DEMO = {
    "a": "a large red castle in the middle on grass by day with a clear sky, flat illustration",
    "a-prime": "a large red castle in the middle on grass at sunset with a clear sky, flat illustration",
    "b": "a large blue boat on the left on water by day with birds, flat illustration",
}


def demo(day: Day) -> None:
    """The built-in example on the device and on the CPU."""
    import numpy as np
    from PIL import Image

    model = HERE / "demo"
    if not model.exists():
        day.put("demo", "left out", "not in this package")
        return
    captions = []
    for name, caption in DEMO.items():
        captions += [f"--{name}", model / "images" / f"{name.replace('-', '_')}.png", f"--caption-{name}", caption]
    expected = None
    for target, dtype in (("cpu", "f32"), (day.args.device, "f32"), (day.args.device, "f16")):
        out = day.work / f"demo-{target}-{dtype}"
        flags = ["--device", target, "--dtype", dtype, "--overwrite", "-o", out, *captions]
        if day.args.tiny:
            flags += ["--steps", "2", "--num-inference-steps", "2"]
        seconds = day.dinv("analogy", "--model", model / "model", *flags)
        day.put("demo", f"{target} {dtype}, seconds", round(seconds, 2))
        shutil.copy(out / "sheet.png", day.out / f"demo-{target}-{dtype}.png")
        found = np.asarray(Image.open(out / "b_prime.png").convert("RGB")).astype(int)
        if expected is None:
            expected = found
            continue
        difference = np.abs(found - expected)
        against_cpu = {"largest": int(difference.max()), "mean": round(float(difference.mean()), 3)}
        day.put("demo", f"{target} {dtype} against the CPU, of 255", against_cpu)


def markdown(results: dict) -> str:
    lines = [f"# A GPU: {results['device']}", ""]
    for part, found in results["parts"].items():
        lines += [f"## {part}", ""]
        rows = {name: value for name, value in found.items() if isinstance(value, dict) and "median_s" in value}
        if rows:
            lines += [
                "| | time | ratio | memory | ratio | opened | first | agrees |",
                "|---|---|---|---|---|---|---|---|",
            ]
        for name, row in rows.items():
            lines.append(
                f"| {name} | {1e3 * row['median_s']:.1f} ms | {row.get('time_ratio', 1)} | {row['memory_gb']} GB "
                f"| {row.get('memory_ratio', 1)} | {row['opened_s']} s | {row['first_s']:.1f} s | {row.get('agrees', '')} |"
            )
        if rows:
            lines.append("")
        for name, value in found.items():
            if name in rows:
                continue
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines += ["", f"### {name}", "", "| what | ms | TFLOP/s | GB/s | error |", "|---|---|---|---|---|"]
                for row in value:
                    if "failed" in row:
                        lines.append(f"| {row['what']} | {row['failed'][:60]} | | | |")
                    else:
                        lines.append(f"| {row['what']} | {row['ms']} | {row['tflops']} | {row['gbs']} | {row['error'] if row['error'] is None else format(row['error'], '.0e')} |")
                lines.append("")
            else:
                lines.append(f"- {name}: {json.dumps(value)}")
        lines.append("")
    return "\n".join(lines)


def surroundings() -> None:
    """Puts the package's libraries and Python packages first, and names NVIDIA's driver to the loader."""
    def ahead(name: str, folder: Path) -> None:
        os.environ[name] = os.pathsep.join(filter(None, [str(folder), os.environ.get(name, "")]))

    ahead("LD_LIBRARY_PATH", HERE / "lib")
    ahead("PYTHONPATH", HERE / "python")
    sys.path.insert(0, str(HERE / "python"))
    usual = [Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d")]
    if "VK_DRIVER_FILES" not in os.environ and not any(list(p.glob("nvidia*.json")) for p in usual):
        found = Path("/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json")
        if found.exists():
            os.environ["VK_DRIVER_FILES"] = str(found)


# In order of worth, with their limits in seconds.
PARTS = {
    "sd15": (200, sd15),
    "device": (150, device),
    "demo": (180, demo),
    "profile": (60, profiled),
    "picture": (150, picture),
    "sdxl": (240, sdxl),
    "kernels": (300, kernels),
    "compiled": (200, compiled),
}


def main() -> None:
    surroundings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-day"), help="for random models: 20 GB")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--device", default="vulkan")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--kernels", nargs="+", default=["launch", "layers", "memory", "matmul", "conv"])
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models")
    day = Day(parser.parse_args())
    for name, (limit, work) in PARTS.items():
        day.part(name, limit, lambda: work(day))
    print((day.out / "gpu-day.md").read_text())


if __name__ == "__main__":
    main()
