"""The worker of `compare.py` in PyTorch: one optimisation step, or one call of the denoiser, a line.

    python benches/compare/torch_step.py MODEL INPUTS step|call [--channels-last]
        [--device cuda] [--dtype f16|bf16] [--compile]

Runs on as many threads as OMP_NUM_THREADS says. Says `ready` when the models are open; for every
line read it works once and prints the loss and the norm of the gradient (for `call`: the mean
square of the prediction, and 0).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

LEARNING_RATE, LAMBDA_MSE, LAMBDA_CLIP = 1e-3, 4.0, 0.1
LOSS_SCALE = 1024.0  # gradients fall below the range of f16
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class TextEncoder:
    """A text encoder that reads token embeddings in the place of marked positions."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        model = CLIPTextModelWithProjection.from_pretrained(folder, torch_dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        table = next(m for n, m in model.named_modules() if n.endswith("token_embedding"))
        table.register_forward_hook(self.replace)
        self.rows = None

    def replace(self, _module, _inputs, output):
        output = output.clone()
        for row, (start, tokens) in enumerate(self.rows):
            output[row, start : start + len(tokens)] = tokens.to(output.dtype)
        return output

    def __call__(self, ids, rows):
        self.rows = rows
        return self.model(ids, output_hidden_states=True)


def opened(cls: type, folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen network of diffusers, which holds its weights once."""
    with torch.device("meta"):
        network = cls.from_config(cls.load_config(folder))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors", device)
    network.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True, strict=False)
    return network.eval().requires_grad_(False)


class TransformerStep:
    """A flow-matching transformer by itself: the gradient is that of what it is told."""

    def __init__(self, args: argparse.Namespace):
        self.dtype = DTYPES[args.dtype]
        config = json.loads((args.model / "transformer/config.json").read_text())
        self.is_flux = config["_class_name"] == "FluxTransformer2DModel"
        cls = FluxTransformer2DModel if self.is_flux else SD3Transformer2DModel
        network = opened(cls, args.model / "transformer", args.device, self.dtype)
        self.call = torch.compile(network) if args.compile else network
        self.inputs = load_file(args.inputs, args.device)

    def error(self, told: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """The mean square of the prediction's distance from `target`."""
        noisy, times = self.inputs["noisy"].to(self.dtype), self.inputs["timesteps"]
        context, pooled = (x.to(self.dtype) for x in told)
        if not self.is_flux:
            predicted = self.call(noisy, context, pooled, times).sample
            return (predicted.float() - target).square().mean()
        pack = lambda x: FluxPipeline._pack_latents(x, *x.shape)
        rows, columns = (side // 2 for side in noisy.shape[2:])
        places = FluxPipeline._prepare_latent_image_ids(1, rows, columns, noisy.device, self.dtype)
        predicted = self.call(
            pack(noisy), context, pooled, times / 1000, places, context.new_zeros(context.shape[1], 3), torch.ones_like(times)
        ).sample
        return (predicted.float() - pack(target)).square().mean()

    def once(self) -> tuple[float, float]:
        told = [self.inputs[name] for name in ("context", "pooled")]
        with torch.no_grad():
            return self.error(told, torch.zeros_like(self.inputs["target"])).item(), 0.0

    def step(self) -> tuple[float, float]:
        told = [self.inputs[name].clone().requires_grad_() for name in ("context", "pooled")]
        loss = self.error(told, self.inputs["target"])
        (loss * LOSS_SCALE).backward()
        norm = torch.cat([x.grad.flatten() / LOSS_SCALE for x in told]).norm()
        return loss.item(), norm.item()


class Step:
    def __init__(self, args: argparse.Namespace):
        model, device, self.dtype = args.model, args.device, DTYPES[args.dtype]
        self.unet = opened(UNet2DConditionModel, model / "unet", device, self.dtype)
        if args.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)
        self.call = torch.compile(self.unet) if args.compile else self.unet
        self.inputs = load_file(args.inputs, device)
        folders = sorted(model.glob("text_encoder*"))
        self.text_encoders = [TextEncoder(folder, device, self.dtype) for folder in folders]
        number = range(len(self.text_encoders))
        self.tokens = [self.inputs[f"tokens.{i}"].clone().requires_grad_() for i in number]
        self.optimiser = torch.optim.AdamW(self.tokens, lr=LEARNING_RATE, weight_decay=0.01)

    def predict(self, states, added=None):
        noisy, t = self.inputs["noisy"], self.inputs["timesteps"]
        draws = len(noisy) // len(states)
        states = states.repeat_interleave(draws, 0)
        if added is not None:
            added = {name: x.repeat_interleave(draws, 0) for name, x in added.items()}
            added = {name: x.to(self.dtype) for name, x in added.items()}
        noisy, states = noisy.to(self.dtype), states.to(self.dtype)
        return self.call(noisy, t, states, added_cond_kwargs=added).sample.float()

    def once(self) -> tuple[float, float]:
        added = None
        if "text_embeds" in self.inputs:
            added = {name: self.inputs[name] for name in ("text_embeds", "time_ids")}
        with torch.no_grad():
            return self.predict(self.inputs["context"], added).square().mean().item(), 0.0

    def step(self) -> tuple[float, float]:
        inputs, sdxl = self.inputs, len(self.text_encoders) > 1
        ids, alone = inputs["ids"].long(), inputs["ids_alone"].long()
        states, clip = [], []
        for number, (encoder, tokens) in enumerate(zip(self.text_encoders, self.tokens)):
            starts = inputs["starts"].tolist()
            output = encoder(ids, [(starts[0], tokens), (starts[1], -tokens)])
            states.append(output.hidden_states[-2] if sdxl else output.last_hidden_state)
            pooled = output.text_embeds
            features = encoder(alone, [(1, tokens)]).text_embeds.float()
            clip.append(1 - F.cosine_similarity(features, inputs[f"delta.{number}"]).mean())
        added = {"text_embeds": pooled, "time_ids": inputs["time_ids"]} if sdxl else None
        squares = (self.predict(torch.cat(states, -1), added) - inputs["target"]).square()
        after, before = (half.mean() for half in squares.chunk(2))
        loss = LAMBDA_MSE * (after + before) + LAMBDA_CLIP * torch.stack(clip).mean()
        self.optimiser.zero_grad()
        (loss * LOSS_SCALE).backward()
        for tokens in self.tokens:
            tokens.grad /= LOSS_SCALE
        norm = torch.cat([tokens.grad.flatten() for tokens in self.tokens]).norm()
        self.optimiser.step()
        return loss.item(), norm.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("what", choices=("step", "call"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--compile", action="store_true", help="the denoiser through torch.compile")
    args = parser.parse_args()
    step = TransformerStep(args) if (args.model / "transformer").exists() else Step(args)
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip() or args.what  # a line may name something else to be done
        result = step.step() if what == "step" else step.once()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
