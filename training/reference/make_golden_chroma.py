"""Makes tests/golden/chroma: a tiny Chroma with random weights, its T5 and a SentencePiece model among them, what
diffusers and transformers make of it, and what the PyTorch reference of the optimisation loop learns on it.

    python training/reference/make_golden_chroma.py

Made with diffusers 0.42.1, transformers 5.24.0, torch 2.15.0 and sentencepiece 0.2.3.

diffusers' pipeline adds its mask of zeros and ones to the scores of attention, which masks nothing
(github.com/huggingface/diffusers/issues/13619). Here the mask is one of truth values, as in the model's training code.
"""

import json
import shutil
from itertools import cycle, islice
from pathlib import Path

import numpy
import sentencepiece
import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from learn_reference import Pair, Reference, Settings, learn
from make_golden_families import BATCH, CAPTIONS, NEGATIVE, PROMPT, SIDE
from make_golden_flux import packed, places, unpacked
from make_golden_learning import randomise
from make_golden_sd3 import CHANNELS, LATENT_SIDE, WIDE, normal, picture

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "chroma"
STEPS, LENGTH, START = 5, 512, "blue house"
TEXTS = ["", "a blue house", "  Two   houses,\tby a lake!\n", "ﬁne ＡＢＣ", "naïve 漢字 </s> house", PROMPT, NEGATIVE]


def make_tokenizer(folder: Path) -> T5Tokenizer:
    """A folder as people have it: a SentencePiece model and no tokenizer.json. Its normaliser has two rules."""
    folder.mkdir(parents=True)
    rules = folder / "rules.tsv"
    ligature = "FB01\t66 69\n"
    wide = "".join(f"{0xFF21 + i:X}\t{0x41 + i:X}\n" for i in range(26))
    rules.write_text(ligature + wide)
    text = [*CAPTIONS, PROMPT, NEGATIVE, "a blue house by a lake at night", "two houses, an oil painting!",
            "the red boat in the morning; a green house: 'ABC' (one, two) fine"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "spiece"), vocab_size=90, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_tsv=str(rules), hard_vocab_limit=False,
        character_coverage=1.0, minloglevel=2,
    )
    rules.unlink()
    (folder / "spiece.vocab").unlink()
    return T5Tokenizer.from_pretrained(folder, model_max_length=LENGTH)


def make_pipeline(tokenizer: T5Tokenizer) -> ChromaPipeline:
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer) + 5, d_model=40, d_kv=8, num_heads=6, d_ff=28, num_layers=3,
        relative_attention_num_buckets=12, relative_attention_max_distance=40,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
    ))
    network = ChromaTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=40, axes_dims_rope=(2, 2, 4), approximator_num_channels=32, approximator_hidden_dim=20,
        approximator_layers=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=randomise(vae, 131).half(), text_encoder=randomise(t5, 132).half(), tokenizer=tokenizer,
        transformer=randomise(network, 133).half(),
    )


def opened(tokenizer: T5Tokenizer) -> ChromaPipeline:
    pipeline = ChromaPipeline.from_pretrained(OUT, tokenizer=tokenizer, torch_dtype=torch.float32, local_files_only=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predict(network, latents, times, states, mask) -> torch.Tensor:
    """The velocity ε − x₀ for latents that are not packed; `mask` is true for tokens of the prompt that are attended
    to. Queries that are not attended to either are of no consequence."""
    size = latents.shape[-2:]
    tokens = packed(latents)
    everything = torch.cat([mask, torch.ones(tokens.shape[:2], dtype=torch.bool)], 1)
    output = network(
        hidden_states=tokens, timestep=times / 1000, encoder_hidden_states=states, img_ids=places(*size),
        txt_ids=torch.zeros(states.shape[1], 3), attention_mask=everything,
    ).sample
    return unpacked(output, *size)


class Encoder:
    """T5 with difference tokens behind the words."""

    def __init__(self, pipeline: ChromaPipeline):
        self.tokenizer, self.text_model = pipeline.tokenizer, pipeline.text_encoder

    def __call__(self, prompts: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the whole length, and which of them are attended to."""
        rows, counts, table = [], [], self.text_model.get_input_embeddings()
        for words, tokens in prompts:
            ids = self.tokenizer(words, add_special_tokens=False).input_ids
            words, end, pad = (table(torch.tensor(ids, dtype=torch.long)) for ids in (ids, [1], [0]))
            row = torch.cat([words, tokens, end])
            counts.append(len(row))
            rows.append(torch.cat([row, pad.expand(LENGTH - len(row), -1)]))
        place, count = torch.arange(LENGTH)[None], torch.tensor(counts)[:, None]
        states = self.text_model(inputs_embeds=torch.stack(rows), attention_mask=(place < count).long())
        return states.last_hidden_state, place <= count


class ReferenceChroma(Reference):
    """The parts of Chroma, without joint space."""

    def __init__(self, pipeline: ChromaPipeline):
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.encoders, self.joints = [Encoder(pipeline)], []

    def start(self, settings: Settings, widths: list[int]) -> list[torch.Tensor]:
        encoder = self.encoders[0]
        ids = encoder.tokenizer(START, add_special_tokens=False).input_ids
        ids = list(islice(cycle(ids), settings.num_tokens))
        return [encoder.text_model.get_input_embeddings()(torch.tensor(ids))]

    def noised(self, latents, epsilon, t):
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * epsilon, epsilon - latents

    def conditions(self, prompts: list, size) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoders[0]([(words, tokens[0]) for words, tokens in prompts])

    def predict(self, noisy, t, states, mask):
        return predict(self.transformer, noisy, t, states, mask)


def network_of(pipeline: ChromaPipeline) -> dict:
    """A prediction for two latents that are not square, with prompts of 9 and of 4 tokens, and gradients to all that
    it depends on."""
    latents = normal(134, 2, CHANNELS, *WIDE).requires_grad_()
    states, times = normal(135, 2, 9, 40).requires_grad_(), torch.tensor([1000.0, 12.25])
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    output = predict(pipeline.transformer, latents, times, states, mask)
    towards = normal(136, *output.shape)
    (output * towards).sum().backward()
    tensors = {"latents": latents, "states": states, "times": times, "output": output, "towards": towards,
               "states.grad": states.grad, "latents.grad": latents.grad}
    return {f"network.{name}": x for name, x in tensors.items()}


def sigmas_of(pipeline: ChromaPipeline, steps: int) -> torch.Tensor:
    pipeline.scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps))
    return pipeline.scheduler.sigmas.clone()


def drawn(pipeline: ChromaPipeline, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """The pipeline's loop, with a mask that masks."""
    encoder, prompts = Encoder(pipeline), [PROMPT, NEGATIVE]
    encoded = [encoder([(text, torch.empty(0, 40))]) for text in prompts]
    sigmas = sigmas_of(pipeline, 4)
    for time, next_time in zip(sigmas, sigmas[1:]):
        at = 1000 * time.reshape(1)
        positive, negative = (predict(pipeline.transformer, latents, at, *one) for one in encoded)
        velocity = negative + scale * (positive - negative)
        latents = latents + (next_time - time) * velocity
    return latents


def outputs_of(pipeline: ChromaPipeline) -> dict:
    outputs = {}
    for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
        states, mask = pipeline._get_t5_prompt_embeds(text, max_sequence_length=LENGTH)
        ours, kept = Encoder(pipeline)([(text, torch.empty(0, 40))])
        assert torch.equal(kept, mask.bool()) and torch.allclose(ours, states, atol=1e-6)
        outputs[f"{prefix}prompt_embeds"] = states[0, : int(mask.sum())]
    for name, seed, (height, width) in (("", 137, (LATENT_SIDE,) * 2), ("wide.", 138, WIDE)):
        outputs[f"{name}latents"] = normal(seed, 1, CHANNELS, height, width)
        outputs[f"{name}drawn"] = drawn(pipeline, outputs[f"{name}latents"], 3.0)
        outputs[f"{name}picture"] = picture(pipeline, outputs[f"{name}drawn"])
    for steps in (1, 4, 40):
        outputs[f"sigmas.{steps}"] = sigmas_of(pipeline, steps)
    return outputs


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    tokenizer = make_tokenizer(OUT / "tokenizer")
    pipeline = make_pipeline(tokenizer)
    pipeline.tokenizer = None
    pipeline.save_pretrained(OUT)
    index = json.loads((OUT / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (OUT / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    coarse = numpy.random.default_rng(10).integers(0, 256, (2, 8, 8, 3), dtype=numpy.uint8)
    pictures = [numpy.kron(c, numpy.ones((2, 2, 1), numpy.uint8)) for c in coarse]
    for letter, image in zip(("a", "a_prime"), pictures):
        Image.fromarray(image).save(OUT / f"{letter}.png")
    pipeline = opened(tokenizer)
    ids = {text: tokenizer(text).input_ids for text in TEXTS}
    (OUT / "ids.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    with torch.no_grad():
        outputs = outputs_of(pipeline)
    outputs |= network_of(pipeline)
    save_file({name: x.detach().contiguous() for name, x in outputs.items()}, OUT / "io.safetensors")
    times = 1000 * torch.rand((STEPS, BATCH), generator=torch.Generator().manual_seed(139))
    times[0] = torch.tensor([1000.0, 0.5])
    noise = normal(140, STEPS, BATCH, CHANNELS, LATENT_SIDE, LATENT_SIDE).half().float()
    settings = Settings(num_tokens=3, learning_rate=1e-2, lambda_clip=0.0)
    trace = learn(ReferenceChroma(pipeline), Pair(*pictures, *CAPTIONS), settings, times, noise)
    del trace["seconds"]
    trace["noise"] = trace["noise"].half()
    save_file(trace, OUT / "trace.safetensors")
    print(f"loss {trace['loss'][0]:.4f} to {trace['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()
