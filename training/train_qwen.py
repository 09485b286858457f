"""Trains the text encoder of `demo-z-image`: a small Qwen3 that reads captions in Qwen3's chat template.

    python train_qwen.py --work WORK                                  # resumes by itself
    python train_qwen.py --work WORK --export ../demo/z-image         # text_encoder/, tokenizer/

Z-Image reads the states before the last layer. Linear heads (thrown away afterwards) read every attribute, or
that a caption does not tell it, from these states at each token behind the caption's last word: a caption's
last words override its first ones, and only what comes behind them can know. Beside that, the model predicts
the next token, as a language model does.
"""

import json
import pathlib
import random

import torch
import torch.nn.functional as F
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

import common
import data
from text import train_qwen_tokenizer
from train_clip import head_loss
from world import ATTRIBUTES, KINDS, random_caption

WIDTH = 192


def chat(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    """The ids of a caption in the template, as Z-Image's pipeline writes it."""
    message = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return tokenizer(message).input_ids


def suffix_length(tokenizer: Qwen2Tokenizer) -> int:
    """How many tokens stand behind the last word."""
    a, b = chat(tokenizer, "a red house"), chat(tokenizer, "a blue boat")
    return next(i for i, (x, y) in enumerate(zip(reversed(a), reversed(b))) if x != y)


def padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def config(tokenizer: Qwen2Tokenizer) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )


class WithHead(torch.nn.Module):
    """Qwen3 and the linear head that helps to train it."""

    def __init__(self, qwen: Qwen3ForCausalLM):
        super().__init__()
        self.qwen = qwen
        self.head = torch.nn.Linear(WIDTH, sum(len(v) + 1 for v in ATTRIBUTES.values()))

    def forward(self, rows: list[list[int]], pad: int, suffix: int):
        """The logits of the next tokens and those of the attributes behind the last word, [b, suffix, outputs].
        Attention is causal, so that what stands behind a row does not matter to it."""
        ids = padded(rows, pad).to(self.head.weight.device)
        output = self.qwen(input_ids=ids, output_hidden_states=True, use_cache=False)
        ends = (torch.tensor([len(row) for row in rows])[:, None] - suffix + torch.arange(suffix)).to(ids.device)
        states = output.hidden_states[-2]
        return output.logits, self.head(states[torch.arange(len(rows), device=ids.device)[:, None], ends])


def heads_loss(logits: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return head_loss(logits.flatten(0, 1), known.repeat_interleave(logits.shape[1], 0))


def share_read(logits: torch.Tensor, known: torch.Tensor) -> float:
    """How often the last token names an attribute, or that it is not told."""
    known = known.to(logits.device)
    parts = logits[:, -1].split([len(v) + 1 for v in ATTRIBUTES.values()], dim=1)
    return float(torch.stack([(p.argmax(1) == known[:, i]).float() for i, p in enumerate(parts)]).mean())


def labels_told(scenes: list, told: list) -> torch.Tensor:
    """The labels of the attributes [b, kinds] as captions of `scenes` tell them, those of the kinds `told`;
    `len(values)` for "not told"."""
    not_told = torch.tensor([len(v) for v in ATTRIBUTES.values()])
    is_told = torch.tensor([[kind in known for kind in KINDS] for known in told])
    return torch.where(is_told, torch.tensor([scene.labels() for scene in scenes]), not_told)


class Captions:
    """Captions as token ids, with the labels that they tell."""

    def __init__(self, tokenizer, scenes: list):
        self.tokenizer, self.scenes = tokenizer, scenes

    def draw(self, rng: random.Random, count: int) -> tuple[list[list[int]], torch.Tensor]:
        chosen = rng.choices(self.scenes, k=count)
        captions = [random_caption(rng, scene) for scene in chosen]
        return [chat(self.tokenizer, text) for text, _ in captions], labels_told(chosen, [known for _, known in captions])


def main():
    parser = common.arguments(__doc__, steps=600, batch=96, lr=2e-3, seed=60)
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    folder = args.work / "qwen_tokenizer"
    tokenizer = Qwen2Tokenizer.from_pretrained(folder) if folder.exists() else train_qwen_tokenizer(folder)
    suffix, pad = suffix_length(tokenizer), tokenizer.pad_token_id
    torch.manual_seed(args.seed)
    model = WithHead(Qwen3ForCausalLM(config(tokenizer)))
    print("parameters:", sum(p.numel() for p in model.parameters()), flush=True)
    run = common.Run("qwen", args, model, ema=0.99)
    held_out = Captions(tokenizer, data.scenes("validation", 1024))
    validation = held_out.draw(random.Random(0), 512)
    if args.export:
        run.ema.qwen.half().save_pretrained(args.export / "text_encoder")
        tokenizer.save_pretrained(args.export / "tokenizer")
        with torch.no_grad():
            _, heads = run.ema.float()(validation[0], pad, suffix)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, "read": share_read(heads, validation[1])}))
        return

    train = Captions(tokenizer, data.scenes("train", data.COUNTS["train"]))
    for step in run.loop():
        run.seed()
        rows, known = train.draw(random.Random(args.seed * 1_000_003 + step), args.batch)
        logits, heads = model(rows, pad, suffix)
        following = torch.nn.utils.rnn.pad_sequence([torch.tensor(row[1:]) for row in rows], batch_first=True, padding_value=-100).to(args.device)
        words = F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=-100)
        told = heads_loss(heads, known.to(args.device))
        run.update(0.2 * words + told, words=words, told=told)
        if run.step % 100 == 99:
            with torch.no_grad():
                _, heads = run.ema(validation[0], pad, suffix)
            print(json.dumps({"step": run.step + 1, "read": share_read(heads, validation[1])}), file=run.log)


if __name__ == "__main__":
    main()
