"""Makes tests/golden/tokenizer: a small CLIP vocabulary in three layouts, and the ids that
transformers gives.

Run from the root of the repository: python training/reference/make_golden_tokenizer.py
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPTokenizer

OUT = Path("tests/golden/tokenizer")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

CORPUS = """a photo of a cat and a dog on the grass under the night sky. the little house isn't
red; it's blue, they're in the snow, we've seen a castle with a rainbow, i'm sure you'll like it,
he'd paint the boat's sail orange. a photograph of the moon above the water at sunset, line art,
pixel art, flat style, 35mm, 8k, highly detailed, storm clouds, palm tree, cactus, sand, birds."""

TEXTS = [
    "", " ", "a", "a photo of a cat", "A Photo OF a CAT", "  a   photo\tof\na cat  ",
    "the cat's house isn't red", "they're we've i'm you'll he'd", "It’s the dog’s", "'s 't 're",
    "35mm f/1.8, 8k, 1920x1080", "2026-11-23", "½ ² ٣ 四", "a cat, a dog; (red:1.3) [blue] {x}",
    "hello!!! what?! ...", "!", "a!b", "e-mail: a.b@c.org #tag $5 100% a_b", "under_score__",
    "naïve café Über straße", "nai\u0308ve cafe\u0301", "ÀÉÎ İ ẞ Σ ΟΔΟΣ", "château – 雪 の 城",
    "雪の城", "ночь и снег", "مدينة", "नमस्ते", "👍🏽 a 🏰 🇫🇷 👩‍👩‍👧", "zero\u200bwidth \u00a0 nbsp \u3000 wide",
    "tab\there \x00 null \x07 bell", "<|endoftext|>", "a <|startoftext|> b<|endoftext|>c",
    "<|ENDOFTEXT|>", "</w> cat</w>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a <my-boat> on snow", "a <my-boat>s, a<MY-BOAT>", "wombat wombats WOMBAT a wombat!", "the two words here, two words",
    "x <left> y <right> z", "x <LEFT> y <RIGHT>", "<left><right>", "Straße <Straße> <STRASSE>", "a  two  words", "<my-boat>", "twotwo words",
    "ﬁne ①②③ Ⅷ ™", "a\u0301\u0302\u0303 combining", "\ufeffbom \ufffd replacement", "“quotes” ‘single’ — dash…",
]


def train():
    """Byte alphabet, byte alphabet with </w>, then merges, as in CLIP's own vocabulary.

    The pairs are counted here, since the `tokenizers` trainer breaks ties at random.
    """
    backend = CLIPTokenizer().backend_tokenizer
    text = backend.normalizer.normalize_str(CORPUS)
    pieces = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    words = [[*word[:-1], word[-1] + "</w>"] for word in pieces]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [a + "</w>" for a in alphabet] + [BOS, EOS]
    merges = []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:])):
        (left, right), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        merges.append((left, right))
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == [left, right]:
                    word[i - 1 : i + 1] = [left + right]
    tokens[-2:-2] = dict.fromkeys(left + right for left, right in merges)
    return {token: number for number, token in enumerate(tokens)}, merges


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    vocab, merges = train()

    # As Stable Diffusion 1.5 has it: two files, padding by the end token.
    files = OUT / "files"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (files / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges)
    )
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": EOS}
    special = {"bos_token": BOS, "eos_token": EOS}
    (files / "tokenizer_config.json").write_text(json.dumps({**config, **special, "pad_token": EOS}))
    (files / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": EOS}))

    # As its second version and SDXL's second encoder have it: padding by "!".
    bang = OUT / "bang"
    shutil.copytree(files, bang)
    added = {"content": "!", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (bang / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": added}))
    (bang / "tokenizer_config.json").write_text(json.dumps({**config, **special, "pad_token": "!"}))

    # As save_pretrained of today writes it: tokenizer.json.
    CLIPTokenizer.from_pretrained(files).save_pretrained(OUT / "json")

    # With tokens added, as before transformers 4.34: added_tokens.json, of which some are special.
    words = ["<my-boat>", "wombat", "two words", "<left>", "<right>", "<straße>"]
    old = OUT / "added_tokens"
    shutil.copytree(files, old)
    added = {word: len(vocab) + number for number, word in enumerate(words)}
    (old / "added_tokens.json").write_text(json.dumps(added))
    (old / "special_tokens_map.json").write_text(json.dumps(
        {**special, "pad_token": EOS, "additional_special_tokens": ["<left>"]}
    ))
    # The same, named where transformers 5 takes them for special.
    named = OUT / "added_tokens_special"
    shutil.copytree(old, named)
    (named / "tokenizer_config.json").write_text(json.dumps(
        {**config, **special, "pad_token": EOS, "additional_special_tokens": ["<left>"]}
    ))

    # Since then: in tokenizer_config.json, which alone is heard, with where each of them counts.
    def token(content, **what):
        flags = dict.fromkeys(["lstrip", "rstrip", "single_word", "special"], False)
        return {"content": content, "normalized": True, **flags, **what}

    decoder = OUT / "added_decoder"
    shutil.copytree(files, decoder)
    tokens = [
        token("<my-boat>", normalized=False), token("wombat", single_word=True), token("two words"),
        token("<left>", lstrip=True, special=True, normalized=False), token("<right>", rstrip=True),
        token("<straße>"),
    ]
    added = {len(vocab) + number: one for number, one in enumerate(tokens)}
    added |= {vocab[name]: token(name, special=True) for name in [BOS, EOS]}
    (decoder / "tokenizer_config.json").write_text(json.dumps(
        {**config, **special, "pad_token": EOS, "added_tokens_decoder": added}
    ))

    # As save_pretrained of today writes the same.
    CLIPTokenizer.from_pretrained(decoder).save_pretrained(OUT / "added_json")

    expected = {}
    for name in ["files", "bang", "json", "added_tokens", "added_tokens_special", "added_decoder",
                 "added_json"]:
        tokenizer = AutoTokenizer.from_pretrained(OUT / name)
        expected[name] = {
            "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id, "vocab_size": len(tokenizer),
            "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
            "decoded": [
                tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True,
                                 clean_up_tokenization_spaces=False)
                for text in TEXTS
            ],
        }
    (OUT / "expected.json").write_text(
        json.dumps({"texts": TEXTS, "layouts": expected}, ensure_ascii=False)
    )


if __name__ == "__main__":
    main()
