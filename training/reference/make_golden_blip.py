"""Makes tests/golden/blip: tiny BLIP models with random weights, and what transformers gives:
hidden states, logits, the tokens of greedy and beam search, and captions.

Run from the root of the repository: python training/reference/make_golden_blip.py

Made with transformers 5.23.0 and torch 2.15.0.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from make_golden_captioner import SEARCHES

OUT = Path("tests/golden/blip")
SIZE = 24
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "a photo of the small red house on grass at night with moon and rain ##bow ##s ' t . , -"


def make_vocabulary():
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
    pieces = SPECIAL + WORDS.split() + letters + [f"##{letter}" for letter in letters]
    return list(dict.fromkeys(pieces))


def make_model(vocab, vision, text, seed):
    """The start token lies behind the tokenizer's vocabulary, as in the published models."""
    config = BlipConfig(
        vision_config=dict(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            image_size=SIZE, patch_size=8, **vision,
        ),
        text_config=dict(
            vocab_size=len(vocab) + 2, num_hidden_layers=2, intermediate_size=32,
            max_position_embeddings=24, encoder_hidden_size=24, bos_token_id=len(vocab),
            sep_token_id=vocab.index("[SEP]"), pad_token_id=0, eos_token_id=2, **text,
        ),
    )
    model = BlipForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        p.data = noise * (0.4 if p.dim() > 1 else 0.2) + (1.0 if is_norm else 0.0)
    # The end must be likely enough to be reached, other words seldom equal.
    model.text_decoder.cls.predictions.decoder.bias.data[config.text_config.sep_token_id] += 4.5
    for p in model.parameters():
        p.data = p.data.half().float()
    return model.eval()


def searches_of(model, pixels, prompts):
    config = model.config.text_config
    found = []
    for search in SEARCHES:
        for prompt in prompts:
            # transformers replaces the first id by the start token and drops the last.
            ids = torch.tensor([[2] + prompt + [3]])
            tokens = [
                model.generate(pixels[i : i + 1], ids.clone(), **search)[0].tolist()
                for i in range(len(pixels))
            ]
            assert all(row[: len(prompt) + 1] == [config.bos_token_id] + prompt for row in tokens)
            tokens = [row[len(prompt) + 1 :] for row in tokens]
            found.append({**search, "prompt": prompt, "tokens": tokens})
    return found


@torch.no_grad()
def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(1)
    vocab = make_vocabulary()
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    heads = {"num_attention_heads": 2}
    cases = {
        "base": make_model(vocab, {}, {"hidden_size": 24} | heads, 3),
        "large": make_model(vocab, {"hidden_act": "quick_gelu"}, {"hidden_size": 20} | heads, 4),
    }
    for name, model in cases.items():
        folder = OUT / name
        folder.mkdir(parents=True)
        bos, prompt = model.config.text_config.bos_token_id, [5, 6, 7]
        logits = lambda ids: model(pixels, torch.tensor([ids] * len(pixels))).logits[:, -1]
        expected = {
            "pixels": pixels,
            "image": model.vision_model(pixels).last_hidden_state,
            "logits": logits([bos]),
            "prompted_logits": logits([bos] + prompt),
        }
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
        found = searches_of(model, pixels, [[], prompt])
        ends = [row[-1] == 3 for search in found for row in search["tokens"]]
        print(name, sum(ends), "of", len(ends), "texts end by themselves")
        (folder / "searches.json").write_text(json.dumps(found))
        # Captions from a picture, through preprocessing and tokenizer.
        y, x = np.mgrid[0:40, 0:56]
        picture = np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)
        Image.fromarray(picture).save(folder / "picture.png")
        processor = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
        processor.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
        tokenizer = BertTokenizer(str(folder / "vocab.txt"))
        if name == "base":
            tokenizer.save_pretrained(folder)
            (folder / "vocab.txt").unlink(missing_ok=True)
        values = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        captions, texts = {}, ["", "A photo of", "Rainbows, don't!", "the RED  house zx9"]
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            out = model.generate(values, ids.clone(), num_beams=3, max_new_tokens=12)
            new = out[0, ids.shape[1] - 1 :]
            captions[text] = tokenizer.decode(new, skip_special_tokens=True).strip()
        print(captions)
        (folder / "captions.json").write_text(json.dumps(captions))
        model.half().save_pretrained(folder)


if __name__ == "__main__":
    main()
