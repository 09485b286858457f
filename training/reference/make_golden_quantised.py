"""Makes tests/golden/original/transformers.json: the tensors of diffusers that diffusers makes from those of
transformers in their original layout; text_encoders.json there: the names of llama.cpp for those of transformers;
and tests/golden/quantised: numbers of few bits, and what they are.

    python training/reference/make_golden_quantised.py

Made with diffusers 0.42.1, gguf 0.19.0 and torch 2.15.0.
"""

import json
from fractions import Fraction
from math import gcd
from pathlib import Path

import gguf
import numpy
import torch
from diffusers.loaders import single_file_utils as original
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
ROWS = 21504  # of a marker: as FLUX.1 splits its own, which two, three and seven divide


def layers(prefix: str, count: int, names: list[str]) -> list[str]:
    return [f"{prefix}.{number}.{name}" for number in range(count) for name in names]


def with_ends(names: list[str], ends: tuple[str, ...] = ("weight", "bias")) -> list[str]:
    return [f"{name}.{end}" for name in names for end in ends]


def keys_of_flux(config: dict) -> list[str]:
    once = ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    once += [f"{part}.{layer}" for part in ("time_in", "vector_in") for layer in ("in_layer", "out_layer")]
    once += ["guidance_in.in_layer", "guidance_in.out_layer"] if config["guidance_embeds"] else []
    double = [f"{side}_{layer}" for side in ("img", "txt")
              for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    norms = [f"{side}_attn.norm.{norm}.scale" for side in ("img", "txt") for norm in ("query_norm", "key_norm")]
    single = with_ends(["modulation.lin", "linear1", "linear2"]) + ["norm.query_norm.scale", "norm.key_norm.scale"]
    return (with_ends(once) + layers("double_blocks", config["num_layers"], with_ends(double) + norms)
            + layers("single_blocks", config["num_single_layers"], single))


def keys_of_chroma(config: dict) -> list[str]:
    """FLUX.1's without modulation, and the network that stands for it."""
    once = ("time_in", "vector_in", "guidance_in", "final_layer.adaLN")
    flux = [key for key in keys_of_flux(config | {"guidance_embeds": False})
            if not key.startswith(once) and "mod.lin" not in key and "modulation" not in key]
    network = "distilled_guidance_layer"
    count = config["approximator_layers"]
    return (flux + with_ends([f"{network}.in_proj", f"{network}.out_proj"])
            + layers(f"{network}.layers", count, with_ends(["in_layer", "out_layer"]))
            + layers(f"{network}.norms", count, ["scale"]))


def keys_of_klein(config: dict) -> list[str]:
    weight = ("weight",)
    once = ["img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "final_layer.linear",
            "final_layer.adaLN_modulation.1", "double_stream_modulation_img.lin",
            "double_stream_modulation_txt.lin", "single_stream_modulation.lin"]
    double = [f"{side}_{layer}" for side in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    norms = [f"{side}_attn.norm.{norm}.scale" for side in ("img", "txt") for norm in ("query_norm", "key_norm")]
    single = with_ends(["linear1", "linear2"], weight) + ["norm.query_norm.scale", "norm.key_norm.scale"]
    return (with_ends(once, weight)
            + layers("double_blocks", config["num_layers"], with_ends(double, weight) + norms)
            + layers("single_blocks", config["num_single_layers"], single))


def keys_of_z_image(config: dict) -> list[str]:
    block = ["attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm", "attention_norm1",
             "attention_norm2", "ffn_norm1", "ffn_norm2", *(f"feed_forward.w{i}" for i in (1, 2, 3))]
    plain = with_ends(block, ("weight",))
    told = plain + with_ends(["adaLN_modulation.0"])
    once = with_ends(["x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
                      "final_layer.adaLN_modulation.1"])
    return (once + ["cap_embedder.0.weight", "x_pad_token", "cap_pad_token", "norm_final.weight"]
            + layers("layers", config["n_layers"], told)
            + layers("noise_refiner", config["n_refiner_layers"], told)
            + layers("context_refiner", config["n_refiner_layers"], plain))


def keys_of_sd3(config: dict) -> list[str]:
    once = with_ends(["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0",
                      "y_embedder.mlp.2", "context_embedder", "final_layer.linear",
                      "final_layer.adaLN_modulation.1"]) + ["pos_embed"]
    keys, last = once, config["num_layers"] - 1
    for number in range(last + 1):
        for side in ("x_block", "context_block"):
            names = ["adaLN_modulation.1", "attn.qkv"]
            names += [] if (number, side) == (last, "context_block") else ["attn.proj", "mlp.fc1", "mlp.fc2"]
            names = with_ends(names) + ["attn.ln_q.weight", "attn.ln_k.weight"]
            if side == "x_block" and number in config["dual_attention_layers"]:
                names += with_ends(["attn2.qkv", "attn2.proj"]) + ["attn2.ln_q.weight", "attn2.ln_k.weight"]
            keys += [f"joint_blocks.{number}.{side}.{name}" for name in names]
    return keys


FAMILIES = {
    "sd3": (keys_of_sd3, original.convert_sd3_transformer_checkpoint_to_diffusers),
    "flux": (keys_of_flux, original.convert_flux_transformer_checkpoint_to_diffusers),
    "chroma": (keys_of_chroma, original.convert_chroma_transformer_checkpoint_to_diffusers),
    "klein": (keys_of_klein, original.convert_flux2_transformer_checkpoint_to_diffusers),
    "z_image": (keys_of_z_image, original.convert_z_image_transformer_checkpoint_to_diffusers),
}


def table(family: str) -> dict:
    """For each tensor of diffusers, the stored one and the parts of its rows, [start, end, of] each."""
    folder = GOLDEN / family / "transformer"
    config = json.loads((folder / "config.json").read_text())
    keys_of, convert = FAMILIES[family]
    keys = keys_of(config)
    marker = torch.arange(ROWS, dtype=torch.float64)[:, None]
    made = convert({key: marker + ROWS * number for number, key in enumerate(keys)})
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert sorted(made) == sorted(file.keys()), set(made) ^ set(file.keys())
    rows = {}
    for name, found in sorted(made.items()):
        numbers = found[:, 0].long()
        key = keys[int(numbers[0]) // ROWS]
        numbers = numbers % ROWS
        breaks = [0, *(torch.nonzero(numbers.diff() != 1)[:, 0] + 1).tolist(), len(numbers)]
        parts = []
        for start, end in zip(breaks, breaks[1:]):
            first, count = int(numbers[start]), end - start
            of = ROWS // gcd(gcd(first, count), ROWS)
            parts.append([int(Fraction(first * of, ROWS)), int(Fraction((first + count) * of, ROWS)), of])
        rows[name] = {"from": key, "rows": parts}
    return rows


def names_of_llama(folder: Path, arch: gguf.MODEL_ARCH) -> dict:
    """llama.cpp's name for every tensor of a text encoder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    blocks = 1 + max(int(part) for name in names for part in name.split(".")[:3] if part.isdigit())
    of = gguf.get_tensor_name_map(arch, blocks)
    return {name: of.get_name(name, try_suffixes=(".weight",)) for name in sorted(names)}


def quantised(out: Path) -> None:
    """Blocks of every type that is read, and floats of 8 bits with scales."""
    out.mkdir(exist_ok=True)
    rng = numpy.random.default_rng(7)
    writer, expected = gguf.GGUFWriter(out / "blocks.gguf", "flux"), {}
    kinds = gguf.GGMLQuantizationType
    for kind in (kinds.Q4_0, kinds.Q4_1, kinds.Q5_0, kinds.Q5_1, kinds.Q8_0, kinds.Q2_K, kinds.Q3_K, kinds.Q4_K,
                 kinds.Q5_K, kinds.Q6_K):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = 512 // block
        data = rng.integers(0, 256, (6, count, size), dtype=numpy.uint8)
        halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2))
        halves = halves[:1] if kind.name in ("Q4_0", "Q5_0", "Q8_0") else halves
        for place in halves:  # scales that are numbers
            scales = rng.normal(size=(6, count)).astype(numpy.float16)
            data[:, :, place : place + 2] = scales.view(numpy.uint8).reshape(6, count, 2)
        data = data.reshape(6, count * size)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(data, kind).astype(numpy.float32)
    numbers = rng.normal(size=(6, 4)).astype(numpy.float32)
    for kind, stored in ((kinds.F32, numbers), (kinds.F16, numbers.astype(numpy.float16))):
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
        expected[kind.name] = stored.astype(numpy.float32)
    bfloat = torch.from_numpy(numbers).bfloat16()
    writer.add_tensor("BF16", bfloat.view(torch.uint8).numpy(), raw_dtype=kinds.BF16)
    expected["BF16"] = bfloat.float().numpy()
    # A kernel that was stored as a matrix, as ComfyUI-GGUF does.
    writer.add_array("comfy.gguf.orig_shape.kernel", [2, 3, 2, 2])
    kernel = rng.normal(size=(6, 4)).astype(numpy.float16)
    writer.add_tensor("kernel", kernel, raw_dtype=kinds.F16)
    expected["kernel"] = kernel.astype(numpy.float32).reshape(2, 3, 2, 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bits = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    bits = torch.where((bits & 0x7F) >= 0x7C, bits & 0x80, bits)  # neither infinite nor no number in either format
    four, five = bits.view(torch.float8_e4m3fn), bits.view(torch.float8_e5m2)
    scale = torch.tensor(0.0375)
    about = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    plain = {"plain.weight": four, "wide.weight": five}
    older = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn), "a.weight": four, "a.scale_weight": scale,
             "a.scale_input": torch.tensor(1.0), "b.weight": bits.float(), "b.scale_weight": torch.tensor(1.0)}
    newer = {"c.weight": four, "c.weight_scale": scale, "c.comfy_quant": about, "c.input_scale": torch.tensor(1.0)}
    for name, tensors in (("plain", plain), ("older", older), ("newer", newer)):
        save_file({key: x.clone() for key, x in tensors.items()}, out / f"fp8_{name}.safetensors")
    for name, stored in (("plain.weight", four), ("wide.weight", five)):
        expected[name] = stored.float().numpy()
    expected["a.weight"] = expected["c.weight"] = (four.float() * scale).numpy()
    expected["b.weight"] = bits.float().numpy()
    save_file({name: torch.from_numpy(x.copy()) for name, x in expected.items()}, out / "expected.safetensors")


def main() -> None:
    folder = GOLDEN / "original"
    folder.mkdir(exist_ok=True)
    tables = {family: table(family) for family in FAMILIES}
    (folder / "transformers.json").write_text(json.dumps(tables, separators=(",", ":")) + "\n")
    encoders = {
        "sd3/text_encoder_3": names_of_llama(GOLDEN / "sd3" / "text_encoder_3", gguf.MODEL_ARCH.T5ENCODER),
        "klein/text_encoder": names_of_llama(GOLDEN / "klein" / "text_encoder", gguf.MODEL_ARCH.QWEN3),
    }
    (folder / "text_encoders.json").write_text(json.dumps(encoders, separators=(",", ":")) + "\n")
    quantised(GOLDEN / "quantised")


if __name__ == "__main__":
    main()
