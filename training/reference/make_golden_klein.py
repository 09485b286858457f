"""Makes tests/golden/klein: a tiny FLUX.2 klein base with random weights, its Qwen3 and tokenizer among them,
what diffusers and transformers make of it, and what the PyTorch reference of the optimisation loop learns on
it. The distilled klein is the same with `is_distilled`.

    python training/reference/make_golden_klein.py

Made with diffusers 0.42.1, transformers 5.24.0 and torch 2.15.0.
"""

import json
import shutil
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import numpy
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from learn_reference import Pair, Reference, Settings, learn
from make_golden_families import BATCH, CAPTIONS, NEGATIVE, PROMPT, SIDE
from make_golden_learning import randomise
from make_golden_sd3 import LONG_PROMPT, normal
from make_golden_tokenizer import CORPUS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from text import QWEN_TEMPLATE  # noqa: E402

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "klein"
LENGTH, LAYERS, STEPS = 512, (9, 18, 27), 5
CHANNELS, LATENT_SIDE = 8, 4  # of the autoencoder, and of what the transformer denoises
WIDE = LATENT_SIDE, LATENT_SIDE + 2  # height and width of latents that are not square
START = "blue house"  # the words that D̃ starts at
TEXTS = ["", "a red house", PROMPT, LONG_PROMPT, "it's 1920x1080,  two\nlines\t tabs", "naïve Straße 雪の城 👍🏽",
         "a <|im_end|> b <think>", "nai\u0308ve <|endoftext|>!?...", "x" * 40]


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs counted here, since the `tokenizers` trainer breaks ties at random."""
    backend = Qwen2Tokenizer().backend_tokenizer
    pieces = backend.pre_tokenizer.pre_tokenize_str(CORPUS.replace("\n", " ") + "\n\nuser\nassistant\n")
    words = [list(word) for word, _ in pieces]
    merges = []
    while len(merges) < 160:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        (left, right), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        merges.append((left, right))
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == [left, right]:
                    word[i - 1 : i + 1] = [left + right]
    tokens = dict.fromkeys(sorted(ByteLevel.alphabet()) + [left + right for left, right in merges])
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    special = lambda name, is_special: AddedToken(name, special=is_special, normalized=False)
    tokenizer.add_tokens([special(name, True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([special(name, False) for name in ("<think>", "</think>")])
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def make_pipeline() -> Flux2KleinPipeline:
    tokenizer = make_tokenizer()
    # Heads that are wider together than the hidden states, fewer for keys, layers behind the last that is read.
    qwen = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS[-1] + 1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False,
    ))
    network = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=len(LAYERS) * 16, axes_dims_rope=(2, 4, 4, 6),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, batch_norm_eps=0.01,
    )
    vae = randomise(vae, 92)
    vae.bn.running_mean.copy_(0.3 * normal(93, 4 * CHANNELS))
    vae.bn.running_var.copy_(normal(94, 4 * CHANNELS).abs() + 0.1)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.half(), text_encoder=randomise(qwen, 90).half(), tokenizer=tokenizer,
        transformer=randomise(network, 91).half(), is_distilled=False,
    )


def opened() -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(OUT, torch_dtype=torch.float32, local_files_only=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def statistics(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(var + vae.config.batch_norm_eps)


def normalised(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents as the transformer denoises them."""
    mean, deviation = statistics(vae)
    return (Flux2KleinPipeline._patchify_latents(latents) - mean) / deviation


def predict(network, latents, times, states) -> torch.Tensor:
    """The prediction of a transformer for latents that are not packed to tokens."""
    tokens = network(
        hidden_states=Flux2KleinPipeline._pack_latents(latents), encoder_hidden_states=states,
        timestep=times / 1000, img_ids=Flux2KleinPipeline._prepare_latent_ids(latents),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(states),
    ).sample
    return tokens.permute(0, 2, 1).reshape(latents.shape)


class Encoder:
    """Qwen3 with difference tokens behind the words of its template."""

    def __init__(self, pipeline: Flux2KleinPipeline):
        self.tokenizer, self.text_model = pipeline.tokenizer, pipeline.text_encoder

    def __call__(self, prompts: list) -> torch.Tensor:
        rows, masks = [], []
        table, fill = self.text_model.get_input_embeddings(), self.tokenizer.pad_token_id
        for words, tokens in prompts:
            before, after = chat(self.tokenizer, words + "\0").split("\0")
            ids = [self.tokenizer(text).input_ids for text in (before, after)]
            end = len(ids[0]) + len(tokens) + len(ids[1])
            after = table(torch.tensor(ids[1] + [fill] * (LENGTH - end)))
            rows.append(torch.cat([table(torch.tensor(ids[0])), tokens, after]))
            masks.append(torch.arange(LENGTH) < end)
        output = self.text_model(
            inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks).long(), output_hidden_states=True
        )
        return torch.cat([output.hidden_states[k] for k in LAYERS], -1)


class ReferenceKlein(Reference):
    """The parts of FLUX.2 klein base, without joint space."""

    def __init__(self, pipeline: Flux2KleinPipeline):
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.encoders, self.joints = [Encoder(pipeline)], []

    def start(self, settings: Settings, widths: list[int]) -> list[torch.Tensor]:
        encoder = self.encoders[0]
        ids = list(islice(cycle(encoder.tokenizer(START).input_ids), settings.num_tokens))
        return [encoder.text_model.get_input_embeddings()(torch.tensor(ids))]

    def latents(self, image: numpy.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(image.astype(numpy.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        return normalised(self.vae, self.vae.encode(pixels).latent_dist.mode())

    def noised(self, latents, epsilon, t):
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * epsilon, epsilon - latents

    def conditions(self, prompts: list, size) -> tuple[torch.Tensor, None]:
        return self.encoders[0]([(words, tokens[0]) for words, tokens in prompts]), None

    def predict(self, noisy, t, states, _):
        return predict(self.transformer, noisy, t, states)


def chat(tokenizer: Qwen2Tokenizer, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def network_of(pipeline: Flux2KleinPipeline) -> dict:
    """A prediction for two latents that are not square, and gradients to all that it depends on."""
    latents = normal(95, 2, 4 * CHANNELS, *WIDE).requires_grad_()
    states, times = normal(96, 2, 7, 48).requires_grad_(), torch.tensor([1000.0, 12.25])
    output = predict(pipeline.transformer, latents, times, states)
    towards = normal(97, *output.shape)
    (output * towards).sum().backward()
    tensors = {"latents": latents, "states": states, "times": times, "output": output, "towards": towards,
               "states.grad": states.grad, "latents.grad": latents.grad}
    return {f"network.{name}": x for name, x in tensors.items()}


def tower_of(pipeline: Flux2KleinPipeline) -> dict:
    """Hidden states of two prompts of unequal length, given by embeddings, the last behind the final norm."""
    layers, lengths = (1, 5, LAYERS[-1] + 1), (13, 9)
    embeds = normal(98, 2, 20, 16).requires_grad_()
    mask = torch.stack([torch.arange(20) < length for length in lengths]).long()
    output = pipeline.text_encoder(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    states = torch.cat([output.hidden_states[k] for k in layers], -1)
    towards = normal(99, *states.shape)
    (states * towards).sum().backward()
    tensors = {"embeds": embeds, "states": states, "towards": towards, "embeds.grad": embeds.grad}
    return {f"tower.{name}": x for name, x in tensors.items()}


def drawn_by(pipeline: Flux2KleinPipeline) -> dict:
    outputs = {}
    for name, seed, (height, width) in (("", 100, (LATENT_SIDE,) * 2), ("wide.", 101, WIDE)):
        latents = normal(seed, 1, 4 * CHANNELS, height, width)
        outputs[f"{name}latents"] = latents
        for kind in ("", "distilled."):
            pipeline.register_to_config(is_distilled=bool(kind))
            drawn = pipeline(
                prompt=PROMPT, num_inference_steps=4, guidance_scale=4.0, height=4 * height, width=4 * width,
                latents=latents, output_type="latent",
            ).images
            outputs[f"{kind}{name}drawn"] = normalised(pipeline.vae, drawn)
            pixels = pipeline.vae.decode(drawn).sample
            outputs[f"{kind}{name}picture"] = (pixels / 2 + 0.5).clamp(0, 1)
    pipeline.register_to_config(is_distilled=False)
    return outputs


def outputs_of(pipeline: Flux2KleinPipeline) -> dict:
    outputs = drawn_by(pipeline)
    for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
        states, _ = pipeline.encode_prompt(text, "cpu")
        # Both ends; the last rows are padding, which the transformer sees.
        outputs[f"{prefix}prompt_embeds"] = torch.cat([states[:, :64], states[:, -16:]], 1)
    for tokens in (16, 24, 1024, 4096, 5000):
        for steps in (1, 4, 50):
            mu = compute_empirical_mu(tokens, steps)
            pipeline.scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
            outputs[f"sigmas.{tokens}.{steps}"] = pipeline.scheduler.sigmas.clone()
    pixels = pipeline.image_processor.preprocess(Image.open(OUT / "a.png"))
    outputs["encoded"] = normalised(pipeline.vae, pipeline.vae.encode(pixels).latent_dist.mode())
    return outputs


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make_pipeline().save_pretrained(OUT)
    coarse = numpy.random.default_rng(8).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
    for letter, image in zip(("a", "a_prime"), pictures):
        Image.fromarray(image).save(OUT / f"{letter}.png")
    pipeline = opened()
    ids = {text: pipeline.tokenizer(chat(pipeline.tokenizer, text)).input_ids for text in TEXTS}
    (OUT / "ids.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    with torch.no_grad():
        outputs = outputs_of(pipeline)
    outputs |= network_of(pipeline) | tower_of(pipeline)
    save_file({name: x.detach().contiguous() for name, x in outputs.items()}, OUT / "io.safetensors")
    times = 1000 * torch.rand((STEPS, BATCH), generator=torch.Generator().manual_seed(102))
    times[0] = torch.tensor([1000.0, 0.5])
    noise = normal(103, STEPS, BATCH, 4 * CHANNELS, LATENT_SIDE, LATENT_SIDE)
    settings = Settings(num_tokens=3, learning_rate=1e-2, lambda_clip=0.0)
    trace = learn(ReferenceKlein(pipeline), Pair(*pictures, *CAPTIONS), settings, times, noise)
    del trace["seconds"]
    save_file(trace, OUT / "trace.safetensors")
    print(f"loss {trace['loss'][0]:.4f} to {trace['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()
