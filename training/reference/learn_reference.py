"""The optimisation loop in PyTorch, on diffusers' and transformers' own models.

The same formulas as method/learn.rs, written independently of it: reads timesteps and noise from a
replay file (such as `dinv learn --trace` writes), and writes a trace with the loss terms of every
step and the tokens after it. One pair, prompt mode `caption`, no augmentation.

    python training/reference/learn_reference.py --model demo/model --a a.png --a-prime b.png \
        --caption-a "…" --caption-a-prime "…" --replay trace.safetensors --trace torch.safetensors
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


@dataclass
class Settings:
    """The names of `LearnConfig`; the learning rate and λ_clip are VISII's."""

    num_tokens: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    lambda_mse: float = 4.0
    lambda_before: float = 1.0
    lambda_clip: float = 0.1
    alpha: float = 0.8
    clip_reading: str = "prompts"


@dataclass
class Pair:
    """Pictures A and A′ as arrays [h, w, 3] of bytes, and their captions."""

    a: numpy.ndarray
    a_prime: numpy.ndarray
    caption_a: str
    caption_a_prime: str


class WithDifference:
    """Puts difference tokens in the place of marked positions at a text encoder's input."""

    def __init__(self, text_model):
        table = next(m for name, m in text_model.named_modules() if name.endswith("token_embedding"))
        table.register_forward_hook(self.replace)
        self.places = None

    def replace(self, _module, _inputs, output):
        if self.places is None:
            return output
        output = output.clone()
        for row, (start, tokens) in enumerate(self.places):
            if len(tokens) == 0:
                continue
            output[row, start : start + len(tokens)] = tokens
        return output


class TextEncoder:
    """A tokenizer and its text tower, which difference tokens can be put into."""

    def __init__(self, tokenizer: CLIPTokenizer, text_model):
        self.tokenizer, self.text_model = tokenizer, text_model
        self.input = WithDifference(text_model)

    def place(self, prompts: list, length: int | None) -> torch.Tensor:
        """Ids of prompts (words and tokens): start, words, room for the tokens, end, padding."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows, self.input.places = [], []
        for words, tokens in prompts:
            ids = self.tokenizer(words, add_special_tokens=False).input_ids
            row = [start, *ids, *[0] * len(tokens), end]
            rows.append(row + [self.tokenizer.pad_token_id] * ((length or 0) - len(row)))
            self.input.places.append((1 + len(ids), tokens))
        return torch.tensor(rows)

    def __call__(self, prompts: list):
        ids = self.place(prompts, self.tokenizer.model_max_length)
        return self.text_model(ids, output_hidden_states=True)


class JointSpace:
    """CLIP with both projections."""

    def __init__(self, folder: Path):
        self.clip = CLIPModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.clip.requires_grad_(False)
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.encoder = TextEncoder(CLIPTokenizer.from_pretrained(folder), self.clip.text_model)

    def features(self, words: str, tokens: torch.Tensor) -> torch.Tensor:
        output = self.clip.get_text_features(self.encoder.place([(words, tokens)], None))
        return output if torch.is_tensor(output) else output.pooler_output

    def image_features(self, image: numpy.ndarray) -> torch.Tensor:
        pixels = self.processor(Image.fromarray(image), return_tensors="pt").pixel_values
        output = self.clip.get_image_features(pixels)
        return output if torch.is_tensor(output) else output.pooler_output

    def delta(self, pair: Pair, alpha: float) -> torch.Tensor:
        unit = lambda x: x / x.norm()
        text = lambda words: unit(self.features(words, torch.empty(0)))
        image = unit(unit(self.image_features(pair.a_prime)) - unit(self.image_features(pair.a)))
        text = unit(text(pair.caption_a_prime) - text(pair.caption_a))
        theta = math.acos(float((image * text).sum().clamp(-1, 1)))
        weights = math.sin((1 - alpha) * theta), math.sin(alpha * theta)
        return (weights[0] * image + weights[1] * text) / math.sin(theta)

    def clip_loss(self, pair: Pair, tokens: torch.Tensor, delta: torch.Tensor, reading: str):
        """One minus the cosine with the delta, of the tokens read alone or of what they change in the prompts."""
        if reading == "alone":
            return 1 - F.cosine_similarity(self.features("", tokens), delta).mean()
        cosines = []
        for words, sign in ((pair.caption_a, 1), (pair.caption_a_prime, -1)):
            with_tokens = F.normalize(self.features(words, sign * tokens), dim=-1)
            without = F.normalize(self.features(words, torch.empty(0)), dim=-1)
            cosines.append(F.cosine_similarity(with_tokens - without, sign * delta))
        return 1 - torch.cat(cosines).mean()


class Reference:
    """A pipeline's frozen models; `clip` holds the joint space of each of its text encoders."""

    def __init__(self, model: Path, clip: list[Path] | None = None):
        part = lambda cls, name: cls.from_pretrained(model / name, torch_dtype=torch.float32).eval()
        self.unet = part(UNet2DConditionModel, "unet")
        self.vae = part(AutoencoderKL, "vae")
        self.scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
        towers = [part(CLIPTextModel, "text_encoder")]
        self.is_xl = (model / "text_encoder_2").is_dir()
        if self.is_xl:
            towers.append(part(CLIPTextModelWithProjection, "text_encoder_2"))
        for module in (self.unet, self.vae, *towers):
            module.requires_grad_(False)
        suffixes = ["", "_2"][: len(towers)]
        tokenizers = [CLIPTokenizer.from_pretrained(model / f"tokenizer{s}") for s in suffixes]
        self.encoders = [TextEncoder(*pair) for pair in zip(tokenizers, towers)]
        self.joints = self.joint_spaces(clip or [model / f"clip{s}" for s in suffixes])

    def joint_spaces(self, folders: list[Path]) -> list[JointSpace]:
        return [JointSpace(folder) for folder in folders]

    def start(self, settings: Settings, widths: list[int]) -> list[torch.Tensor]:
        """The tokens before the first step, for each text encoder that they are learned for."""
        return [torch.zeros(settings.num_tokens, width) for width in widths]

    def latents(self, image: numpy.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(image.astype(numpy.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean = self.vae.encode(pixels).latent_dist.mean
        shift = self.vae.config.shift_factor or 0.0
        return (mean - shift) * self.vae.config.scaling_factor

    def conditions(self, prompts: list, size: tuple[int, int]) -> tuple[torch.Tensor, dict | None]:
        """Hidden states and SDXL's added conditions of prompts: words, and tokens per encoder."""
        outputs = [
            encoder([(words, tokens[number]) for words, tokens in prompts])
            for number, encoder in enumerate(self.encoders)
        ]
        if not self.is_xl:
            return outputs[0].last_hidden_state, None
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        time_ids = time_ids.expand(len(prompts), -1)
        return states, {"text_embeds": outputs[-1].text_embeds, "time_ids": time_ids}

    def noised(self, latents, epsilon, t) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents, and what the network should predict of them."""
        noisy = self.scheduler.add_noise(latents, epsilon, t)
        if self.scheduler.config.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, epsilon, t)
        return noisy, epsilon

    def predict(self, noisy, t, states, added) -> torch.Tensor:
        return self.unet(noisy, t, states, added_cond_kwargs=added).sample


def repeated(added, batch: int):
    """Each row of what the network is told besides the hidden states, `batch` times in a row."""
    if isinstance(added, dict):
        return {name: repeated(x, batch) for name, x in added.items()}
    return added if added is None else added.repeat_interleave(batch, 0)


def learn(model: Reference, pair: Pair, settings: Settings, timesteps, noise) -> dict:
    """The trace of as many steps as there are timesteps."""
    with torch.no_grad():
        z_a, z_a_prime = model.latents(pair.a), model.latents(pair.a_prime)
        deltas = [joint.delta(pair, settings.alpha) for joint in model.joints]
    widths = [encoder.text_model.config.hidden_size for encoder in model.encoders]
    tokens = [x.detach().clone().requires_grad_() for x in model.start(settings, widths)]
    optimiser = torch.optim.AdamW(
        tokens, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps, batch = timesteps.shape
    latents = torch.cat([z_a_prime.expand(batch, -1, -1, -1), z_a.expand(batch, -1, -1, -1)])
    terms, record, seconds = [], [[] for _ in tokens], []
    for step in range(steps):
        began = time.perf_counter()
        t, epsilon = timesteps[step].repeat(2), noise[step].repeat(2, 1, 1, 1)
        noisy, target = model.noised(latents, epsilon, t)
        prompts = [(pair.caption_a, tokens), (pair.caption_a_prime, [-x for x in tokens])]
        states, added = model.conditions(prompts, pair.a.shape[:2])
        states = states.repeat_interleave(batch, 0)
        added = repeated(added, batch)
        prediction = model.predict(noisy, t, states, added)
        after = F.mse_loss(prediction[:batch], target[:batch])
        before = F.mse_loss(prediction[batch:], target[batch:])
        clip = torch.stack([
            joint.clip_loss(pair, x, delta, settings.clip_reading)
            for joint, x, delta in zip(model.joints, tokens, deltas)
        ]).mean() if model.joints else torch.zeros(())
        explained = after + settings.lambda_before * before
        loss = settings.lambda_mse * explained + settings.lambda_clip * clip
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        terms.append([x.item() for x in (loss, after, before, clip)])
        for kept, x in zip(record, tokens):
            kept.append(x.detach().clone())
        seconds.append(time.perf_counter() - began)
    loss, after, before, clip = torch.tensor(terms).T.contiguous()
    names = ["tokens", "tokens.1"]
    return {
        "timesteps": timesteps.contiguous(),
        "noise": noise.contiguous(),
        "loss": loss.clone(),
        "after": after.clone(),
        "before": before.clone(),
        "clip": clip.clone(),
        **{name: torch.stack(kept) for name, kept in zip(names, record)},
        "seconds": torch.tensor(seconds),
    }


def save_traces(model: Reference, pair: Pair, timesteps, noise, out: Path) -> None:
    """trace.safetensors, with the CLIP loss as published, and trace_prompts.safetensors, which reads the
    prompts and is replayed from the former."""
    for reading, name in (("alone", "trace"), ("prompts", "trace_prompts")):
        settings = Settings(num_tokens=3, learning_rate=1e-2, clip_reading=reading)
        trace = learn(model, pair, settings, timesteps, noise)
        del trace["seconds"]
        if reading == "prompts":
            del trace["timesteps"], trace["noise"]
        elif torch.equal(noise, noise.half().float()):
            trace["noise"] = trace["noise"].half()
        save_file(trace, out / f"{name}.safetensors")
        print(f"  {reading}: loss {trace['loss'][0]:.4f} to {trace['loss'][-1]:.4f}")


def read_picture(path: Path) -> numpy.ndarray:
    return numpy.array(Image.open(path).convert("RGB"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both this script and the comparison need."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clip", type=Path, action="append", help="SDXL: twice, in the encoders' order")
    parser.add_argument("--a", type=Path, required=True)
    parser.add_argument("--a-prime", type=Path, required=True)
    parser.add_argument("--caption-a", required=True)
    parser.add_argument("--caption-a-prime", required=True)
    parser.add_argument("--threads", type=int, default=2)
    for name, value in vars(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)


def run(args: argparse.Namespace, replay: Path, trace: Path) -> dict:
    torch.set_num_threads(args.threads)
    model = Reference(args.model, args.clip)
    pictures = [read_picture(path) for path in (args.a, args.a_prime)]
    side = model.unet.config.sample_size * 2 ** (len(model.vae.config.block_out_channels) - 1)
    for path, picture in zip((args.a, args.a_prime), pictures):
        if picture.shape[:2] != (side, side):
            raise SystemExit(f"{path}: expected {side}×{side} pixels, so that nothing is resized")
    pair = Pair(*pictures, args.caption_a, args.caption_a_prime)
    settings = Settings(**{name: getattr(args, name) for name in vars(Settings())})
    arrays = load_file(replay)
    result = learn(model, pair, settings, arrays["timesteps"], arrays["noise"])
    save_file(result, trace)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--replay", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    args = parser.parse_args()
    result = run(args, args.replay, args.trace)
    seconds = result["seconds"]
    print(f"{len(seconds)} steps, median {1000 * seconds.median():.1f} ms")


if __name__ == "__main__":
    main()
