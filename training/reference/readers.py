"""Whether the readers of other programs find an exported difference: the same vectors, under the word that `dinv export` prints.

    python training/reference/readers.py --forge FILE --comfyui FILE --invokeai FILE [--dinv target/release/dinv]

The files are of those programs' own sources: stable-diffusion-webui-forge's backend/text_processing/textual_inversion.py, ComfyUI's
comfy/sd1_clip.py and InvokeAI's invokeai/backend/textual_inversion.py. Only the reader in each is run: other modules that it
imports and does not need are replaced by empty ones. Needs torch, safetensors and transformers.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
NAME, TOKENS = "dinv-sunset", 5
WIDTHS = {"sd15": {"emb_params": 768}, "sd21": {"emb_params": 1024}, "sdxl": {"clip_l": 768, "clip_g": 1280}}
PATTERN = re.compile(r"^prompt\s+(.*)$", re.MULTILINE)


class Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absent(MetaPathFinder, Loader):
    """Finds an empty module in place of each that the reader imports and that is not installed."""

    PACKAGES = ("reader", "comfy", "ldm_patched", "invokeai", "compel", "pkg_resources")

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in self.PACKAGES else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def reader(path: Path):
    spec = importlib.util.spec_from_file_location(f"reader.{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer() -> CLIPTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(ROOT / "demo/model/tokenizer")


def forge(module, folder: Path, prompt: str, tensors: dict) -> bool:
    words = tokenizer()
    database = module.EmbeddingDatabase(words, sum(tensor.shape[1] for tensor in tensors.values()))
    database.add_embedding_dir(str(folder))
    database.load_textual_inversion_embeddings()
    ids = words(prompt, add_special_tokens=False)["input_ids"]
    places = [place for place in range(len(ids)) if database.find_embedding_at_position(ids, place)[0] is not None]
    if len(places) != 1:
        return False
    found = database.find_embedding_at_position(ids, places[0])[0].vec
    found = found if isinstance(found, dict) else {"emb_params": found}
    return same(found, tensors)


def comfyui(module, folder: Path, prompt: str, tensors: dict) -> bool:
    found = {}
    for key, tensor in tensors.items():
        words = module.SDTokenizer(
            str(ROOT / "demo/model/tokenizer"), embedding_directory=str(folder), embedding_size=tensor.shape[1],
            embedding_key={"emb_params": "clip_l"}.get(key, key), tokenizer_class=CLIPTokenizerFast,
        )
        (batch,) = words.tokenize_with_weights(prompt)
        vectors = [token for token, weight in batch if isinstance(token, torch.Tensor) and weight == 1]
        found[key] = torch.stack(vectors) if vectors else torch.empty(0)
    return same(found, tensors)


def invokeai(module, folder: Path, prompt: str, tensors: dict) -> bool:
    (path,) = folder.iterdir()
    model = module.TextualInversionModelRaw.from_checkpoint(path)
    both = model.embedding_2 is not None
    found = {"clip_g": model.embedding, "clip_l": model.embedding_2} if both else {"emb_params": model.embedding}
    return f"<{path.stem}>" in prompt and same(found, tensors)


def same(found: dict, tensors: dict) -> bool:
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinv", type=Path, default=ROOT / "target/release/dinv")
    programs = {"a1111": forge, "comfyui": comfyui, "invokeai": invokeai}
    for flag in ("--forge", "--comfyui", "--invokeai"):
        parser.add_argument(flag, type=Path)
    args = parser.parse_args()
    sys.meta_path.insert(0, Absent())
    learned = {"sd15": "learning", "sd21": "learning", "sdxl": "sdxl"}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for model, widths in WIDTHS.items():
            difference = Path(folder) / f"{model}.safetensors"
            # A difference of a tiny model tells the metadata; its tensors are replaced by some of the real width.
            model_folder = ROOT / "tests/golden" / learned[model]
            pair = ["--a", model_folder / "a.png", "--a-prime", model_folder / "a_prime.png"]
            words = [args.dinv, "learn", "--model", model_folder, *pair, "--caption-a", "day", "--caption-a-prime", "night",
                     "--steps", 1, "--clip-first", 0, "--lambda-clip", 0, "--select-every", 0, "-o", difference]
            subprocess.run([str(word) for word in words], check=True, capture_output=True)
            with safe_open(difference, "pt") as file:
                metadata = file.metadata()
            bases = json.loads(metadata["base"])
            metadata["base"] = json.dumps([base | {"hidden_size": width} for base, width in zip(bases, widths.values(), strict=True)])
            generator = torch.Generator().manual_seed(0)
            tensors = {key: torch.randn(TOKENS, width, generator=generator) for key, width in widths.items()}
            save_file(tensors, difference, metadata)
            for (program, check), source in zip(programs.items(), (args.forge, args.comfyui, args.invokeai), strict=True):
                if source is None:
                    print(f"{model:5} {program:9} not asked for")
                    continue
                exported = Path(folder) / f"{model}-{program}"
                words = [args.dinv, "export", difference, "--format", program, "--name", NAME, "-o", exported]
                told = subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
                prompt = PATTERN.search(told).group(1).replace("CAPTION", "a boat on the water")
                found = check(reader(source), exported, prompt, tensors)
                print(f"{model:5} {program:9} {'found' if found else 'NOT FOUND'}: {prompt}")
                failed |= not found
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
