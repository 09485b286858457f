"""Trains the transformer of `demo-sd3`, a small Stable Diffusion 3.5, on stored latents and the frozen encoders of
train_sd3_encoders.py.

    python train_sd3.py --work WORK --model ../demo/model --out ../demo/sd3            # resumes by itself
    python train_sd3.py --work WORK --model ../demo/model --out ../demo/sd3 --export   # transformer/, vae/, scheduler/, model_index.json

Like the original, it often sees zeros in place of T5's states, so that it also listens to CLIP and draws
without T5.
"""

import json
import pathlib

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import common
import flow
from text import MAX_LENGTH
from train_clip import WIDTH
from train_sd3_encoders import NARROW, T5_LENGTH, ids_of
from train_unet import EMPTY_PROMPT, once

WITHOUT_T5 = 0.464  # share of batches, as in the original (Esser et al. 2024, section 5.3.3)


def build() -> SD3Transformer2DModel:
    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=7, num_attention_heads=5, attention_head_dim=32,
        joint_attention_dim=WIDTH + NARROW, caption_projection_dim=160, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
        dual_attention_layers=(0, 1, 2), qk_norm="rms_norm",
    )
    # Every modulated block starts as a fifth of itself, whatever the time and the prompt.
    for name, linear in network.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear")):
            torch.nn.init.zeros_(linear.weight)
            parts = torch.zeros(linear.out_features).view(-1, network.inner_dim)
            parts[2::3] = 0.2  # shift, scale and gate of each of its layers; the last block's context has no gate
            linear.bias.data = parts.flatten()
    torch.nn.init.zeros_(network.proj_out.weight)
    torch.nn.init.zeros_(network.proj_out.bias)
    return network


class Prompts:
    """The frozen text encoders and their tokenizers."""

    def __init__(self, folder: pathlib.Path, device: str):
        part = lambda cls, name: cls.from_pretrained(folder / name, torch_dtype=torch.float32).to(device)
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{s}") for s in ("", "_2")]
        self.clips = [part(CLIPTextModelWithProjection, f"text_encoder{s}") for s in ("", "_2")]
        self.tokenizer_3 = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
        self.t5 = part(T5EncoderModel, "text_encoder_3")

    def ids(self, texts: list[str]) -> torch.Tensor:
        """[b, MAX_LENGTH + T5_LENGTH]; both CLIPs have one vocabulary."""
        return torch.cat([ids_of(self.tokenizers[0], texts, MAX_LENGTH), ids_of(self.tokenizer_3, texts, T5_LENGTH)], 1).to(torch.int16)

    @torch.no_grad()
    def conditions(self, ids: torch.Tensor, with_t5: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [b, MAX_LENGTH + T5_LENGTH, WIDTH + NARROW], as the pipeline puts them together, and the pooled prompts."""
        clip, t5 = ids.long().to(self.t5.device).split([MAX_LENGTH, T5_LENGTH], 1)
        outputs = [encoder(input_ids=clip, output_hidden_states=True) for encoder in self.clips]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        further = self.t5(t5).last_hidden_state if with_t5 else states.new_zeros(len(ids), T5_LENGTH, WIDTH + NARROW)
        return torch.cat([states, further], 1), torch.cat([output.text_embeds for output in outputs], -1)


def main():
    args = flow.arguments(__doc__, steps=5000, batch=32, lr=3e-3, seed=71).parse_args()
    torch.manual_seed(args.seed)
    network = build()
    print("parameters:", sum(p.numel() for p in network.parameters()), flush=True)
    run = common.Run("sd3", args, network, ema=0.998)
    prompts = Prompts(args.out, args.device)
    if args.export:
        (one, two), (tokenizer, tokenizer_2) = prompts.clips, prompts.tokenizers
        StableDiffusion3Pipeline(
            scheduler=flow.scheduler(), vae=flow.autoencoder(args).half(), transformer=run.ema.half(),
            text_encoder=one.half(), text_encoder_2=two.half(), text_encoder_3=prompts.t5.half(),
            tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=prompts.tokenizer_3,
        ).save_pretrained(args.out)
        recommended = args.out / "dinv.json"
        if not recommended.exists():
            recommended.write_text(json.dumps({"resolution": 128, "max_sequence_length": T5_LENGTH}, indent=2) + "\n")
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return

    latents = flow.Latents(args)
    ids = once(args.work / f"sd3_ids{latents.part}.pt", "cpu", lambda: prompts.ids([text for variants in latents.captions() for text in variants]))
    empty = prompts.ids([""])
    for _ in run.loop():
        run.seed()
        index, variant = torch.randint(len(latents.scenes), (args.batch,)), torch.randint(flow.VARIANTS, (args.batch,))
        told = torch.where((torch.rand(args.batch) < EMPTY_PROMPT)[:, None], empty, ids[index * flow.VARIANTS + variant])
        states, pooled = prompts.conditions(told, with_t5=bool(torch.rand(()) >= WITHOUT_T5))
        noisy, sigma, target = flow.noised(latents.draw(index.to(args.device)))
        with common.autocast(args.device):
            predicted = network(noisy, states, pooled, 1000 * sigma, return_dict=False)[0]
        flow.update(run, predicted, target)


if __name__ == "__main__":
    main()
