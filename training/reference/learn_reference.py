"""The optimisation loop in PyTorch, on diffusers' and transformers' own models.

The same formulas as src/learn.rs, written independently of it: reads timesteps and noise from a
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
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer


@dataclass
class Settings:
    """The names and defaults of `LearnConfig`."""

    num_tokens: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    lambda_mse: float = 4.0
    lambda_clip: float = 0.1
    alpha: float = 0.8


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
            output[row, start : start + len(tokens)] = tokens
        return output


class Reference:
    def __init__(self, model: Path, clip: Path | None = None):
        part = lambda cls, name: cls.from_pretrained(model / name, torch_dtype=torch.float32).eval()
        self.unet = part(UNet2DConditionModel, "unet")
        self.vae = part(AutoencoderKL, "vae")
        self.text_encoder = part(CLIPTextModel, "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
        clip = clip or model / "clip"
        self.clip = CLIPModel.from_pretrained(clip, torch_dtype=torch.float32).eval()
        self.processor = CLIPImageProcessor.from_pretrained(clip)
        for module in (self.unet, self.vae, self.text_encoder, self.clip):
            module.requires_grad_(False)
        self.encoder_input = WithDifference(self.text_encoder)
        self.clip_input = WithDifference(self.clip.text_model)

    def latents(self, image: numpy.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(image.astype(numpy.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean = self.vae.encode(pixels).latent_dist.mean
        shift = self.vae.config.shift_factor or 0.0
        return (mean - shift) * self.vae.config.scaling_factor

    def ids(self, words: str, num_tokens: int, length: int | None) -> tuple[list[int], int]:
        """Start, words, room for the tokens, end, padding; and where the room begins."""
        ids = self.tokenizer(words, add_special_tokens=False).input_ids
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        row = [start, *ids, *[0] * num_tokens, end]
        row += [self.tokenizer.pad_token_id] * ((length or 0) - len(row))
        return row, 1 + len(ids)

    def hidden_states(self, prompts: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        rows = [self.ids(words, len(tokens), length) for words, tokens in prompts]
        self.encoder_input.places = [
            (start, tokens) for (_, start), (_, tokens) in zip(rows, prompts)
        ]
        return self.text_encoder(torch.tensor([row for row, _ in rows])).last_hidden_state

    def features(self, words: str, tokens: torch.Tensor | None = None) -> torch.Tensor:
        count = 0 if tokens is None else len(tokens)
        row, start = self.ids(words, count, None)
        self.clip_input.places = None if tokens is None else [(start, tokens)]
        output = self.clip.get_text_features(torch.tensor([row]))
        return output if torch.is_tensor(output) else output.pooler_output

    def image_features(self, image: numpy.ndarray) -> torch.Tensor:
        pixels = self.processor(Image.fromarray(image), return_tensors="pt").pixel_values
        output = self.clip.get_image_features(pixels)
        return output if torch.is_tensor(output) else output.pooler_output

    def delta(self, pair: Pair, alpha: float) -> torch.Tensor:
        unit = lambda x: x / x.norm()
        image = unit(unit(self.image_features(pair.a_prime)) - unit(self.image_features(pair.a)))
        text = unit(unit(self.features(pair.caption_a_prime)) - unit(self.features(pair.caption_a)))
        theta = math.acos(float((image * text).sum().clamp(-1, 1)))
        weights = math.sin((1 - alpha) * theta), math.sin(alpha * theta)
        return (weights[0] * image + weights[1] * text) / math.sin(theta)


def learn(model: Reference, pair: Pair, settings: Settings, timesteps, noise) -> dict:
    """The trace of as many steps as there are timesteps."""
    with torch.no_grad():
        z_a, z_a_prime = model.latents(pair.a), model.latents(pair.a_prime)
        delta = model.delta(pair, settings.alpha)
    width = model.text_encoder.config.hidden_size
    tokens = torch.zeros(settings.num_tokens, width, requires_grad=True)
    optimiser = torch.optim.AdamW(
        [tokens], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps, batch = timesteps.shape
    latents = torch.cat([z_a_prime.expand(batch, -1, -1, -1), z_a.expand(batch, -1, -1, -1)])
    terms, record, seconds = [], [], []
    for step in range(steps):
        began = time.perf_counter()
        t, epsilon = timesteps[step].repeat(2), noise[step].repeat(2, 1, 1, 1)
        noisy = model.scheduler.add_noise(latents, epsilon, t)
        if model.scheduler.config.prediction_type == "v_prediction":
            target = model.scheduler.get_velocity(latents, epsilon, t)
        else:
            target = epsilon
        states = model.hidden_states([(pair.caption_a, tokens), (pair.caption_a_prime, -tokens)])
        states = states.repeat_interleave(batch, 0)
        prediction = model.unet(noisy, t, states).sample
        after = F.mse_loss(prediction[:batch], target[:batch])
        before = F.mse_loss(prediction[batch:], target[batch:])
        clip = 1 - F.cosine_similarity(model.features("", tokens), delta).mean()
        loss = settings.lambda_mse * (after + before) + settings.lambda_clip * clip
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        terms.append([x.item() for x in (loss, after, before, clip)])
        record.append(tokens.detach().clone())
        seconds.append(time.perf_counter() - began)
    loss, after, before, clip = torch.tensor(terms).T.contiguous()
    return {
        "timesteps": timesteps.contiguous(),
        "noise": noise.contiguous(),
        "loss": loss.clone(),
        "after": after.clone(),
        "before": before.clone(),
        "clip": clip.clone(),
        "tokens": torch.stack(record),
        "seconds": torch.tensor(seconds),
    }


def read_picture(path: Path) -> numpy.ndarray:
    return numpy.array(Image.open(path).convert("RGB"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both this script and the comparison need."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clip", type=Path)
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
