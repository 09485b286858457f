"""Trains the transformer of `demo-z-image`, a small Z-Image, on stored latents and the frozen Qwen3 of train_qwen.py.

    python train_z_image.py --work WORK --model ../demo/model --out ../demo/z-image            # resumes by itself
    python train_z_image.py --work WORK --model ../demo/model --out ../demo/z-image --export   # transformer/, vae/, scheduler/, model_index.json

The autoencoder is that of `--model`, so that the backbones are compared on the same latents.
"""

import json
import pathlib

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

import common
import flow
from train_qwen import WIDTH, chat, padded
from train_unet import EMPTY_PROMPT, once

LENGTHS = (32, 64)  # of prompts with their pads; Z-Image pads to multiples of 32
LONG = 0.25  # share of batches whose prompts pad to 64 tokens


def build() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        in_channels=4, dim=192, n_layers=10, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12], axes_lens=[1024, 64, 64],
    )
    # Every modulated block starts as a fifth of itself, whatever the time.
    for block in [*network.noise_refiner, *network.layers]:
        linear = block.adaLN_modulation[-1]
        torch.nn.init.zeros_(linear.weight)
        scale, gate = torch.zeros(network.dim), torch.full((network.dim,), 0.2)
        linear.bias.data = torch.cat([scale, gate, scale, gate])
    torch.nn.init.zeros_(network.all_final_layer["2-1"].linear.weight)
    torch.nn.init.zeros_(network.all_final_layer["2-1"].linear.bias)
    return network


class Prompts:
    """The frozen text encoder and its tokenizer."""

    def __init__(self, folder: pathlib.Path, device: str):
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).to(device)
        self.empty = chat(self.tokenizer, "")

    @torch.no_grad()
    def states(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """[length, WIDTH] of each; attention is causal, so that the pads behind a row do not matter to it."""
        ids = padded(rows, self.tokenizer.pad_token_id).to(self.encoder.device)
        output = self.encoder.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return [states[: len(row)] for states, row in zip(output.hidden_states[-2], rows)]


def velocity(network, noisy: torch.Tensor, sigma: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
    output = network(list(noisy.unsqueeze(2)), 1 - sigma, states, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def main():
    args = flow.arguments(__doc__, steps=6000, batch=48, lr=3e-3, seed=61).parse_args()
    torch.manual_seed(args.seed)
    network = build()
    print("parameters:", sum(p.numel() for p in network.parameters()), flush=True)
    run = common.Run("z_image", args, network, ema=0.998)
    prompts = Prompts(args.out, args.device)
    if args.export:
        ZImagePipeline(
            scheduler=flow.scheduler(), vae=flow.autoencoder(args).half(), text_encoder=prompts.encoder.half(), tokenizer=prompts.tokenizer,
            transformer=run.ema.half(),
        ).save_pretrained(args.out)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return

    latents = flow.Latents(args)
    ids = lambda: [[chat(prompts.tokenizer, text) for text in variants] for variants in latents.captions()]
    rows = once(args.work / f"qwen_ids{latents.part}.pt", "cpu", ids)
    fitting = [[(i, row) for i, variants in enumerate(rows) for row in variants if low < len(row) <= high] for low, high in zip((0, *LENGTHS), LENGTHS)]
    for step in run.loop():
        run.seed()
        chosen = fitting[int(torch.rand(()) < LONG)]
        picks = [chosen[i] for i in torch.randint(len(chosen), (args.batch,)).tolist()]
        index = torch.tensor([i for i, _ in picks], device=args.device)
        told = [prompts.empty if empty else row for (_, row), empty in zip(picks, torch.rand(args.batch) < EMPTY_PROMPT)]
        noisy, sigma, target = flow.noised(latents.draw(index))
        with common.autocast(args.device):
            predicted = velocity(network, noisy, sigma, prompts.states(told))
        flow.update(run, predicted, target)


if __name__ == "__main__":
    main()
