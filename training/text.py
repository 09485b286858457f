"""The demo models' tokenizers: byte-level BPE of the CLIP, the GPT-2 and the Qwen kind, and T5's unigram,
trained on the world's own captions.

    python text.py --clip ../demo/model/tokenizer --opt ../demo/model/captioner
"""

import argparse
import json
import pathlib
import tempfile

from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

from world import corpus

MAX_LENGTH = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's own way to split text before BPE (openai/CLIP, simple_tokenizer.py).
CLIP_SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# For one message of a user it writes what Qwen3's own template writes.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def train_clip_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(corpus(20_000, seed=3), trainer)
    learned = json.loads(bpe.to_str())["model"]
    # CLIP's order: the 256 bytes, the 256 bytes that end a word, the merges, the two specials.
    vocab = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    vocab += list(dict.fromkeys("".join(m) for m in merges if "".join(m) not in set(vocab))) + [BOS, EOS]
    with tempfile.TemporaryDirectory() as tmp:
        tmp = pathlib.Path(tmp)
        (tmp / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
        (tmp / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        (tmp / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_LENGTH, "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS, "tokenizer_class": "CLIPTokenizer"}))
        tokenizer = CLIPTokenizer.from_pretrained(tmp)
        tokenizer.save_pretrained(folder)
    return tokenizer


def train_opt_tokenizer(folder: pathlib.Path):
    """OPT's tokenizer is GPT-2's, with `</s>` to begin and to end and `<image>` for pictures."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    bpe.train_from_iterator(corpus(20_000, seed=3), vocab_size=700, min_frequency=2, special_tokens=specials, show_progress=False)
    inner = bpe._tokenizer
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", inner.token_to_id("</s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"], model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_qwen_tokenizer(folder: pathlib.Path) -> Qwen2Tokenizer:
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = [text for caption in corpus(20_000, seed=3) for text in (caption, f"user\n{caption}\nassistant\n")]
    bpe.train_from_iterator(texts, vocab_size=800, min_frequency=2, show_progress=False)
    learned = json.loads(bpe._tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]])
    special = lambda name, is_special: AddedToken(name, special=is_special, normalized=False)
    tokenizer.add_tokens([special(name, True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([special(name, False) for name in ("<think>", "</think>")])
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_t5_tokenizer(folder: pathlib.Path) -> T5Tokenizer:
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    unigram.train_from_iterator(corpus(20_000, seed=3), trainer)
    vocab = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=256)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", type=pathlib.Path)
    parser.add_argument("--opt", type=pathlib.Path)
    args = parser.parse_args()
    if args.clip:
        train_clip_tokenizer(args.clip)
        t = CLIPTokenizer.from_pretrained(args.clip)
        print(len(t), t("a large red castle on the left on water at night with a rainbow, pixel art").input_ids, t.tokenize("Hello wörld 12 castles"))
        print("longest of 5000 captions:", max(len(t(c).input_ids) for c in corpus(5000, 5)))
    if args.opt:
        train_opt_tokenizer(args.opt)
        t = AutoTokenizer.from_pretrained(args.opt)
        print(type(t).__name__, len(t), t("a large red castle, pixel art").input_ids)


if __name__ == "__main__":
    main()
