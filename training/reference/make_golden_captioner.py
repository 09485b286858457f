"""Makes tests/golden/captioner: tiny BLIP-2 models with random weights, and what transformers
gives: hidden states, logits, the tokens of greedy and beam search, and a caption.

Run from the root of the repository: python training/reference/make_golden_captioner.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

OUT = Path("tests/golden/captioner")
SIZE, VOCAB, QUERIES = 24, 300, 4

SEARCHES = [
    dict(num_beams=1, max_new_tokens=12),
    dict(num_beams=3, max_new_tokens=12),
    dict(num_beams=5, max_new_tokens=16, length_penalty=-1.0),
    dict(num_beams=4, max_new_tokens=16, length_penalty=2.0, early_stopping="never"),
    dict(num_beams=4, max_new_tokens=16, early_stopping=True),
]


def make_tokenizer(folder):
    """As OPT's: byte-level pairs, a start token that also ends, and the image's placeholder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    text = "a photo of a small red house on the grass at night, with a moon and a rainbow"
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == VOCAB - 1, tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
    return fast


def make_model(name, vision, text, seed):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            image_size=SIZE, patch_size=8, **vision,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            encoder_hidden_size=24, vocab_size=8, max_position_embeddings=8,
        ),
        text_config=OPTConfig(
            vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, ffn_dim=32,
            num_attention_heads=4, max_position_embeddings=48, word_embed_proj_dim=20, **text,
        ),
        num_query_tokens=QUERIES, image_token_index=VOCAB - 1,
    )
    model = Blip2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_norm = "norm" in parameter.lower() and parameter.endswith("weight")
        p.data = noise * (0.4 if p.dim() > 1 else 0.2) + (1.0 if is_norm else 0.0)
    # The end must be likely enough to be reached, other words seldom equal.
    tokens = model.language_model.get_input_embeddings().weight
    tokens.data[2] *= 2.5
    for p in model.parameters():
        p.data = p.data.half().float()
    return model.eval()


@torch.no_grad()
def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(1)
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    cases = {
        "pre_norm": make_model("pre_norm", {}, {}, 3),
        "post_norm": make_model(
            "post_norm", {"qkv_bias": False},
            {"do_layer_norm_before": False, "enable_bias": False, "activation_function": "gelu"}, 4,
        ),
    }
    for name, model in cases.items():
        folder = OUT / name
        folder.mkdir(parents=True)
        features = model.get_image_features(pixels)
        prompt = [20, 21, 22]
        start = [VOCAB - 1] * QUERIES + [2]
        ids = torch.tensor([start + prompt] * len(pixels))
        expected = {
            "pixels": pixels,
            "image": features.vision_outputs.last_hidden_state,
            "queries": features.qformer_outputs.last_hidden_state,
            "logits": model(pixels, ids[:, : len(start)]).logits[:, -1],
            "prompted_logits": model(pixels, ids).logits[:, -1],
        }
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
        searches = []
        for search in SEARCHES:
            for prompted in [False, True]:
                kept = ids if prompted else ids[:, : len(start)]
                tokens = [
                    model.generate(pixels[i : i + 1], kept[i : i + 1], **search)[0].tolist()
                    for i in range(len(pixels))
                ]
                searches.append({
                    **search, "prompt": prompt if prompted else [],
                    "tokens": [row[kept.shape[1]:] for row in tokens],
                })
        (folder / "searches.json").write_text(json.dumps(searches))
        if name == "pre_norm":
            # A caption from a picture, through preprocessing and tokenizer.
            y, x = np.mgrid[0:40, 0:56]
            picture = np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)
            Image.fromarray(picture).save(folder / "picture.png")
            processor = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
            processor.save_pretrained(folder)
            tokenizer = make_tokenizer(folder)
            values = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
            captions = {}
            for prompt_text in ["", "a photo of"]:
                words = tokenizer(prompt_text).input_ids  # starts with </s>
                ids = torch.tensor([[VOCAB - 1] * QUERIES + words])
                out = model.generate(values, ids, num_beams=3, max_new_tokens=12)
                new = out[0, ids.shape[1]:]
                captions[prompt_text] = tokenizer.decode(new, skip_special_tokens=True).strip()
            (folder / "captions.json").write_text(json.dumps(captions))
        model.half().save_pretrained(folder)


if __name__ == "__main__":
    main()
