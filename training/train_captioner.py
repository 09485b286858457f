"""Trains the demo model's captioner, a small BLIP-2: vision transformer, Q-Former and OPT, all at
once and from nothing, to say the canonical caption of a picture.

    python train_captioner.py --work WORK                                   # resumes by itself
    python train_captioner.py --work WORK --export ../demo/model/captioner
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

import common
import data
from text import train_opt_tokenizer
from world import ATTRIBUTES, FRAGMENT, KINDS, SENTENCE, caption

WIDTH, QUERIES = 128, 16


def build(tokenizer) -> Blip2ForConditionalGeneration:
    end = tokenizer.eos_token_id
    return Blip2ForConditionalGeneration(Blip2Config(
        vision_config=Blip2VisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=128, patch_size=16),
        qformer_config=Blip2QFormerConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH, encoder_hidden_size=WIDTH,
            cross_attention_frequency=1, vocab_size=8, max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        text_config=OPTConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=2, ffn_dim=4 * WIDTH, num_attention_heads=4,
            max_position_embeddings=64, dropout=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        ),
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    ))


def told(text: str) -> dict[str, str]:
    """The attributes that a canonical caption tells."""
    found = {}
    for kind in KINDS:
        for value in ATTRIBUTES[kind]:
            phrase = SENTENCE[kind][value][0] if kind in SENTENCE else value
            if f" {phrase} " in f" {text.replace(',', ' ')} ".replace("  ", " "):
                found[kind] = value
    return found


@torch.no_grad()
def evaluate(model, tokenizer, pictures, scenes) -> dict[str, float]:
    """Share of attributes that the greedy caption gets right, and of captions right as a whole."""
    right, whole = {k: 0 for k in KINDS}, 0
    prefix = [model.config.image_token_id] * QUERIES + [tokenizer.bos_token_id]
    for start in range(0, len(scenes), 64):
        x = common.pictures_to_tensor(pictures[start : start + 64]).to(model.device)
        ids = torch.tensor([prefix] * len(x), device=model.device)
        out = model.generate(pixel_values=x, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, num_beams=1, do_sample=False)
        for tokens, scene in zip(out[:, len(prefix) :] if out.shape[1] > len(prefix) else out, scenes[start : start + 64]):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            whole += text == caption(scene)
            for kind, value in told(text).items():
                right[kind] += value == getattr(scene, kind)
    return {k: round(v / len(scenes), 4) for k, v in right.items()} | {"whole": round(whole / len(scenes), 4)}


def main():
    parser = common.arguments(__doc__, steps=1500, batch=64, lr=2e-3, seed=40)
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    folder = args.work / "opt_tokenizer"
    train_opt_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(args.seed)
    model = build(tokenizer)
    run = common.Run("captioner", args, model, ema=0.99)
    validation, validation_scenes = data.load(args.work, "validation")
    if args.export:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        run.ema.half().save_pretrained(args.export)
        tokenizer.save_pretrained(args.export)
        BlipImageProcessorPil(size={"height": 128, "width": 128}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(args.export)
        stored = Blip2ForConditionalGeneration.from_pretrained(args.export, torch_dtype=torch.float32).eval()
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, **evaluate(stored, tokenizer, validation, validation_scenes)}))
        return

    train, scenes = data.load(args.work, "train", args.device)
    prefix = [model.config.image_token_id] * QUERIES
    texts = tokenizer([caption(s) for s in scenes]).input_ids
    length = max(map(len, texts)) + 1
    texts = torch.tensor([prefix + t + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - 1 - len(t)) for t in texts], device=args.device)
    model.train()
    for step in run.loop():
        index = torch.from_numpy(run.rng().integers(len(train), size=args.batch)).to(train.device)
        ids = texts[index]
        mask = (ids != tokenizer.pad_token_id).long()
        with common.autocast(args.device):
            logits = model(pixel_values=common.pictures_to_tensor(train[index]), input_ids=ids, attention_mask=mask).logits
        labels = ids.masked_fill(mask == 0, -100)[:, QUERIES + 1 :]
        loss = F.cross_entropy(logits[:, QUERIES:-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        run.update(loss)
        if run.step % 1000 == 999:
            run.ema.eval()
            print(json.dumps({"step": run.step + 1, **evaluate(run.ema, tokenizer, validation[:128], validation_scenes[:128])}), file=run.log)


if __name__ == "__main__":
    main()
