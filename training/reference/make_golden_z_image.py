"""Makes tests/golden/z_image: a tiny Z-Image with random weights, its Qwen3 and tokenizer among them, what
diffusers and transformers make of it, and what the PyTorch reference of the optimisation loop learns on it.

    python training/reference/make_golden_z_image.py

Made with diffusers 0.42.1, transformers 5.24.0 and torch 2.15.0.
"""

import json
import shutil
from itertools import cycle, islice
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from learn_reference import Pair, Reference, Settings, learn
from make_golden_families import BATCH, CAPTIONS, NEGATIVE, PROMPT, SIDE, decode
from make_golden_klein import START, STEPS, TEXTS, make_tokenizer
from make_golden_learning import randomise
from make_golden_sd3 import normal

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "z_image"
CHANNELS, LATENT_SIDE, WIDTH = 8, 8, 16
WIDE = LATENT_SIDE, LATENT_SIDE + 4  # height and width of latents that are not square
LONG = "one two three four five six seven eight nine ten houses at a lake"  # more than 32 tokens


def make_pipeline() -> ZImagePipeline:
    tokenizer = make_tokenizer()
    qwen = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
    ))
    network = ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=randomise(vae, 112).half(),
        text_encoder=randomise(qwen, 110).half(), tokenizer=tokenizer, transformer=randomise(network, 111).half(),
    )


def opened() -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(OUT, torch_dtype=torch.float32, local_files_only=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predict(network, latents, times, states: list) -> torch.Tensor:
    """The velocity ε − x₀ at times of training."""
    output = network(list(latents.unsqueeze(2)), (1000 - times) / 1000, states, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def chat(tokenizer, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)


class Rows(list):
    """Hidden states of unequal length, as the loop repeats them."""

    def repeat_interleave(self, count: int, _dim: int) -> "Rows":
        return Rows(row for row in self for _ in range(count))


class Encoder:
    """Qwen3 with difference tokens behind the words of its template."""

    def __init__(self, pipeline: ZImagePipeline):
        self.tokenizer, self.text_model = pipeline.tokenizer, pipeline.text_encoder

    def __call__(self, prompts: list) -> Rows:
        rows, table = Rows(), self.text_model.get_input_embeddings()
        for words, tokens in prompts:
            before, after = (table(torch.tensor(self.tokenizer(text).input_ids))
                             for text in chat(self.tokenizer, words + "\0").split("\0"))
            embeds = torch.cat([before, tokens, after])[None]
            output = self.text_model(inputs_embeds=embeds, output_hidden_states=True)
            rows.append(output.hidden_states[-2][0])
        return rows


class ReferenceZImage(Reference):
    """The parts of Z-Image, without joint space."""

    def __init__(self, pipeline: ZImagePipeline):
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.encoders, self.joints = [Encoder(pipeline)], []

    def start(self, settings: Settings, widths: list[int]) -> list[torch.Tensor]:
        encoder = self.encoders[0]
        ids = list(islice(cycle(encoder.tokenizer(START).input_ids), settings.num_tokens))
        return [encoder.text_model.get_input_embeddings()(torch.tensor(ids))]

    def noised(self, latents, epsilon, t):
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * epsilon, epsilon - latents

    def conditions(self, prompts: list, size) -> tuple[Rows, None]:
        return self.encoders[0]([(words, tokens[0]) for words, tokens in prompts]), None

    def predict(self, noisy, t, states, _):
        return predict(self.transformer, noisy, t, states)


def network_of(pipeline: ZImagePipeline) -> dict:
    """A prediction for two latents that are not square, with prompts that pad to 64 and to 32 tokens, and
    gradients to all that it depends on."""
    latents = normal(115, 2, CHANNELS, *WIDE).requires_grad_()
    states, times = normal(116, 2, 40, WIDTH).requires_grad_(), torch.tensor([1000.0, 12.25])
    output = predict(pipeline.transformer, latents, times, [states[0], states[1, :7]])
    towards = normal(117, *output.shape)
    (output * towards).sum().backward()
    tensors = {"latents": latents, "states": states, "times": times, "output": output, "towards": towards,
               "states.grad": states.grad, "latents.grad": latents.grad}
    return {f"network.{name}": x for name, x in tensors.items()}


def drawn_by(pipeline: ZImagePipeline) -> dict:
    """Pictures with guidance, whose two prompts pad to different lengths, and without, as Turbo draws them."""
    outputs = {}
    for name, seed, (height, width) in (("", 120, (LATENT_SIDE,) * 2), ("wide.", 121, WIDE)):
        latents = normal(seed, 1, CHANNELS, height, width)
        outputs[f"{name}latents"] = latents
        for kind, scale in (("", 3.0), ("turbo.", 0.0)):
            drawn = pipeline(
                prompt=LONG, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=scale,
                height=2 * height, width=2 * width, latents=latents, output_type="latent",
            ).images
            outputs[f"{kind}{name}drawn"] = drawn
            shifted = drawn + pipeline.vae.config.shift_factor * pipeline.vae.config.scaling_factor
            outputs[f"{kind}{name}picture"] = decode(pipeline, shifted)
    return outputs


def outputs_of(pipeline: ZImagePipeline) -> dict:
    outputs = drawn_by(pipeline)
    for prefix, text in (("", PROMPT), ("negative_", NEGATIVE), ("long_", LONG)):
        states, _ = pipeline.encode_prompt(text, "cpu")
        outputs[f"{prefix}prompt_embeds"] = states[0]
    for steps in (1, 4, 8, 50):
        pipeline.scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), mu=0.7)
        outputs[f"sigmas.{steps}"] = pipeline.scheduler.sigmas.clone()
    return outputs


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make_pipeline().save_pretrained(OUT)
    coarse = numpy.random.default_rng(9).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
    for letter, image in zip(("a", "a_prime"), pictures):
        Image.fromarray(image).save(OUT / f"{letter}.png")
    pipeline = opened()
    ids = {text: pipeline.tokenizer(chat(pipeline.tokenizer, text)).input_ids for text in [*TEXTS, LONG, NEGATIVE]}
    assert len(ids[LONG]) > 32 > len(ids[NEGATIVE])
    (OUT / "ids.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    with torch.no_grad():
        outputs = outputs_of(pipeline)
    outputs |= network_of(pipeline)
    save_file({name: x.detach().contiguous() for name, x in outputs.items()}, OUT / "io.safetensors")
    times = 1000 * torch.rand((STEPS, BATCH), generator=torch.Generator().manual_seed(122))
    times[0] = torch.tensor([1000.0, 0.5])
    noise = normal(123, STEPS, BATCH, CHANNELS, LATENT_SIDE, LATENT_SIDE)
    settings = Settings(num_tokens=3, learning_rate=1e-2, lambda_clip=0.0)
    trace = learn(ReferenceZImage(pipeline), Pair(*pictures, *CAPTIONS), settings, times, noise)
    del trace["seconds"]
    save_file(trace, OUT / "trace.safetensors")
    print(f"loss {trace['loss'][0]:.4f} to {trace['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()
