"""Makes tests/golden/sd3 and tests/golden/mmdit: a tiny Stable Diffusion 3.5 (medium) with random
weights, its three text encoders among them, what diffusers makes of it, what the PyTorch reference of
the optimisation loop learns on it; and the network of Stable Diffusion 3 medium by itself.

    python training/reference/make_golden_sd3.py

Made with diffusers 0.42.1, transformers 5.24.0 and torch 2.15.0.
"""

import json
import shutil
from pathlib import Path

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from learn_reference import Pair, Reference, TextEncoder, save_traces
from make_golden_families import (
    BATCH,
    CAPTIONS,
    LEARNING_STEPS,
    NEGATIVE,
    PROMPT,
    SIDE,
    decode,
    draw,
    make_clip,
    make_tokenizer,
    text_encoder_of,
)
from make_golden_learning import randomise

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
CHANNELS, LATENT_SIDE, T5_LENGTH = 16, 8, 256
SHORT = 40  # another number of T5's tokens
WIDE = LATENT_SIDE, LATENT_SIDE + 4  # height and width of latents that are not square
LONG_PROMPT = "An oil-painting of 12 blue houses; night, by the lakeside? (Zürich)"


def make_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """SentencePiece's unigram: letters, and pieces that overlap."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'()-"]
    words = ["▁a", "▁an", "▁blue", "▁house", "ouse", "▁hous", "es", "▁by", "▁lake", "side", "▁red",
             "▁night", "ght", "in", "ing", "paint", "▁pa", "oil", "▁o", "▁at", "▁of", "la", "ke"]
    scores = [(piece, -6.0 - i / 50) for i, piece in enumerate(pieces)]
    scores += [(word, -3.0 - i / 10) for i, word in enumerate(words)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=special + scores, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_t5(tokenizer: T5Tokenizer, seed: int) -> T5EncoderModel:
    """Heads that are wider together than the hidden states; buckets that 256 positions overrun."""
    config = T5Config(
        vocab_size=len(tokenizer) + 5, d_model=40, d_kv=8, num_heads=6, d_ff=28, num_layers=3,
        relative_attention_num_buckets=12, relative_attention_max_distance=40,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
    )
    return randomise(T5EncoderModel(config), seed).half()


def make_network(seed: int, **config) -> SD3Transformer2DModel:
    network = SD3Transformer2DModel(**{
        "sample_size": LATENT_SIDE, "patch_size": 2, "in_channels": CHANNELS, "num_layers": 4,
        "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 40,
        "caption_projection_dim": 24, "pooled_projection_dim": 12 + 10, "out_channels": CHANNELS,
        "pos_embed_max_size": 9, **config,
    })
    return randomise(network, seed)


def make_pipeline(out: Path) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: the first half of the blocks attends twice, queries and keys are
    normalised."""
    tokenizer = make_tokenizer("files", out / "tokenizer")
    tokenizer_2 = make_tokenizer("bang", out / "tokenizer_2")
    tokenizer_3 = make_t5_tokenizer(out / "tokenizer_3")
    clip = make_clip(tokenizer, out / "clip", "files", 50, hidden_act="quick_gelu")
    clip_2 = make_clip(
        tokenizer_2, out / "clip_2", "bang", 51, hidden_size=20, num_hidden_layers=3,
        hidden_act="gelu", projection_dim=10,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
        force_upcast=True,
    )
    return StableDiffusion3Pipeline(
        transformer=make_network(52, qk_norm="rms_norm", dual_attention_layers=(0, 1)).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(vae, 53).half(),
        text_encoder=text_encoder_of(clip, CLIPTextModelWithProjection), tokenizer=tokenizer,
        text_encoder_2=text_encoder_of(clip_2, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer_2,
        text_encoder_3=make_t5(tokenizer_3, 54), tokenizer_3=tokenizer_3,
    )


class PlainEncoder:
    """T5, which reads the words alone."""

    def __init__(self, tokenizer: T5Tokenizer, tower: T5EncoderModel):
        self.tokenizer, self.tower = tokenizer, tower

    def __call__(self, prompts: list) -> torch.Tensor:
        ids = self.tokenizer(
            [words for words, _ in prompts], padding="max_length", max_length=T5_LENGTH,
            truncation=True, return_tensors="pt",
        ).input_ids
        return self.tower(ids).last_hidden_state


class ReferenceSd3(Reference):
    """The parts of Stable Diffusion 3."""

    def __init__(self, model: Path):
        part = lambda cls, name: cls.from_pretrained(model / name, torch_dtype=torch.float32).eval()
        self.transformer = part(SD3Transformer2DModel, "transformer")
        self.vae = part(AutoencoderKL, "vae")
        suffixes = ["", "_2"]
        towers = [part(CLIPTextModelWithProjection, f"text_encoder{s}") for s in suffixes]
        t5 = part(T5EncoderModel, "text_encoder_3")
        for module in (self.transformer, self.vae, t5, *towers):
            module.requires_grad_(False)
        tokenizers = [CLIPTokenizer.from_pretrained(model / f"tokenizer{s}") for s in suffixes]
        self.encoders = [TextEncoder(*pair) for pair in zip(tokenizers, towers)]
        self.plain = PlainEncoder(T5Tokenizer.from_pretrained(model / "tokenizer_3"), t5)
        self.joints = self.joint_spaces([model / f"clip{s}" for s in suffixes])

    def noised(self, latents, epsilon, t):
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * epsilon, epsilon - latents

    def conditions(self, prompts: list, size) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [
            encoder([(words, tokens[number]) for words, tokens in prompts])
            for number, encoder in enumerate(self.encoders)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        t5 = self.plain(prompts)
        states = torch.nn.functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        return torch.cat([states, t5], 1), pooled

    def predict(self, noisy, t, states, pooled):
        return self.transformer(noisy, states, pooled, t).sample


def outputs_of_t5(pipeline: StableDiffusion3Pipeline, out: Path) -> dict:
    """Hidden states of a short and a long prompt, and the ids of both as JSON."""
    texts = [PROMPT, LONG_PROMPT, "", "a  red\thouse\n"]
    ids = pipeline.tokenizer_3(
        texts, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    expected = [row[: row.tolist().index(1) + 1].tolist() for row in ids]
    (out / "t5_ids.json").write_text(json.dumps(dict(zip(texts, expected)), ensure_ascii=False))
    states = pipeline.text_encoder_3(ids).last_hidden_state
    return {"t5.short": states[:1], "t5.long": states[1:2], "t5.none": states[2:3]}


def outputs_of(pipeline: StableDiffusion3Pipeline, latents: dict, out: Path) -> dict:
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
             "negative_pooled_prompt_embeds"]
    encode = lambda: dict(zip(names, pipeline.encode_prompt(
        PROMPT, PROMPT, PROMPT, negative_prompt=NEGATIVE, device="cpu"
    )))
    outputs = {**encode(), **outputs_of_t5(pipeline, out)}
    square, wide = latents["latents"], latents["wide.latents"]
    times = torch.tensor([999.0, 312.5])
    conditions = [torch.cat([outputs[f"{kind}"], outputs[f"negative_{kind}"]]) for kind in
                  ("prompt_embeds", "pooled_prompt_embeds")]
    outputs["network.output"] = pipeline.transformer(wide.repeat(2, 1, 1, 1), *conditions, times).sample
    common = {"prompt": PROMPT, "num_inference_steps": 4, "max_sequence_length": T5_LENGTH}
    square_size = {"height": SIDE, "width": SIDE}
    wide_size = {"height": WIDE[0] * 2, "width": WIDE[1] * 2}
    outputs["drawn"] = draw(pipeline, square, guidance_scale=4.0, **common, **square_size)
    outputs["sigmas"] = pipeline.scheduler.sigmas.clone()
    outputs["picture"] = picture(pipeline, outputs["drawn"])
    outputs["wide.drawn"] = draw(
        pipeline, wide, guidance_scale=4.0, negative_prompt=NEGATIVE, **common, **wide_size
    )
    outputs["wide.picture"] = picture(pipeline, outputs["wide.drawn"])
    outputs["drawn_without_guidance"] = draw(
        pipeline, square, guidance_scale=1.0, **common, **square_size
    )
    short = {**common, "max_sequence_length": SHORT, "guidance_scale": 4.0, **square_size}
    outputs["short.drawn"] = draw(pipeline, square, **short)
    pixels = pipeline.image_processor.preprocess(Image.open(out / "a.png"))
    config = pipeline.vae.config
    mean = pipeline.vae.encode(pixels).latent_dist.mean
    outputs["encoded"] = (mean - config.shift_factor) * config.scaling_factor
    t5, tokenizer = pipeline.text_encoder_3, pipeline.tokenizer_3
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    outputs |= {f"without_t5.{name}": value for name, value in encode().items()}
    outputs["without_t5.drawn"] = draw(pipeline, square, guidance_scale=4.0, **common, **square_size)
    outputs["short.without_t5.drawn"] = draw(pipeline, square, **short)
    pipeline.text_encoder_3, pipeline.tokenizer_3 = t5, tokenizer
    for steps in (1, 5, 28):
        pipeline.scheduler.set_timesteps(steps)
        outputs[f"sigmas.{steps}"] = pipeline.scheduler.sigmas.clone()
    return outputs


def picture(pipeline, latents: torch.Tensor) -> torch.Tensor:
    shift = pipeline.vae.config.shift_factor * pipeline.vae.config.scaling_factor
    return decode(pipeline, latents + shift)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_sd3(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    make_pipeline(out).save_pretrained(out)
    coarse = numpy.random.default_rng(5).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
    for letter, image in zip(("a", "a_prime"), pictures):
        Image.fromarray(image).save(out / f"{letter}.png")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        out, torch_dtype=torch.float32, local_files_only=True
    )
    latents = {
        "latents": normal(60, 1, CHANNELS, LATENT_SIDE, LATENT_SIDE),
        "wide.latents": normal(61, 1, CHANNELS, *WIDE),
    }
    with torch.no_grad():
        outputs = {**latents, **outputs_of(pipeline, latents, out)}
    save_file({name: x.contiguous() for name, x in outputs.items()}, out / "io.safetensors")
    generator = torch.Generator().manual_seed(62)
    times = 1000 * torch.rand((LEARNING_STEPS, BATCH), generator=generator)
    times[0] = torch.tensor([1000.0, 0.5])
    noise = normal(63, LEARNING_STEPS, BATCH, CHANNELS, LATENT_SIDE, LATENT_SIDE).half().float()
    save_traces(ReferenceSd3(out), Pair(*pictures, *CAPTIONS), times, noise, out)


def make_mmdit(out: Path) -> None:
    """Neither double attention nor normalised queries; and the gradient to what it is told."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    network = make_network(55, num_layers=3)
    network.half().save_pretrained(out)
    network.float()
    latents = normal(56, 2, CHANNELS, *WIDE)
    states, pooled = normal(57, 2, 7, 40).requires_grad_(), normal(58, 2, 22).requires_grad_()
    times = torch.tensor([1000.0, 12.25])
    output = network(latents, states, pooled, times).sample
    towards = normal(59, *output.shape)
    (output * towards).sum().backward()
    tensors = {"latents": latents, "states": states, "pooled": pooled, "times": times,
               "output": output, "towards": towards, "states.grad": states.grad,
               "pooled.grad": pooled.grad}
    save_file({name: x.detach().contiguous() for name, x in tensors.items()}, out / "io.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    make_mmdit(GOLDEN / "mmdit")
    make_sd3(GOLDEN / "sd3")


if __name__ == "__main__":
    main()
