"""The gates that the demo model must pass before the method can be judged on it, measured on the
validation split (see README.md beside this file for the figures).

    python gates.py --model ../demo/model text          # captions drawn from noise
    python gates.py --model ../demo/z-image text        # the same by diffusers' own pipeline, for the second backbone
    python gates.py --model ../demo/model swap          # B inverted, caption of B'
    python gates.py --model ../demo/model append        # B inverted, caption of B + ", word"
        [--inversion edit-friendly|ddim|sdedit] [--guidance difference|ordinary]
        [--guidance-scale 2] [--skip 0.1] [--per-kind 8] [--sheet sheet.png]
    python gates.py --model ../demo/model instruct      # B and the instruction, unet_instruct_pix2pix
        [--guidance-scale 7.5] [--image-guidance-scale 1.5]
    python gates.py --model ../demo/model inpaint       # A, A' above B and a covered cell, unet_inpaint

`swap`, `append`, `instruct` and `inpaint` print, for every kind of edit, the share of pictures that
show the new value and the share of all other attributes that are kept, both as the judge sees them.
The last two take the analogies of one attribute from the suite `validation`.
"""

import argparse
import json
import pathlib
import random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import common
import judge as judging
import suite
import train_conditioned
import train_unet
from world import ATTRIBUTES, KINDS, SIZE, Scene, caption, render, sample_scene, word


class Model:
    """The frozen diffusion model, in the notation of DDIM (Song et al. 2021)."""

    def __init__(self, folder: pathlib.Path, steps: int, unet=None):
        load = dict(torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", **load)
        self.unet = unet or UNet2DConditionModel.from_pretrained(folder / "unet", **load).to(memory_format=torch.channels_last)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", **load)
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        a = self.scheduler.alphas_cumprod.double()
        self.alpha = [float(a[t]) for t in self.timesteps] + [float(self.scheduler.final_alpha_cumprod)]

    def encode_prompt(self, texts):
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state

    def encode_image(self, x):
        return self.vae.encode(x).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def predict(self, x, i, prompt, negative=None, scale=1.0, alpha=None):
        """x_0 and noise at the i-th timestep, guided away from `negative`."""
        t, a = self.timesteps[i], self.alpha[i] if alpha is None else alpha
        with torch.autocast("cpu", torch.bfloat16):
            if negative is None or scale == 1.0:
                v = self.unet(x, t, encoder_hidden_states=prompt).sample.float()
            else:
                both = self.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, prompt])).sample.float()
                v_negative, v_prompt = both.chunk(2)
                v = v_negative + scale * (v_prompt - v_negative)
        return a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x

    def step(self, x, i, eta, *prediction):
        """One reverse step; returns the mean and sigma."""
        x0, eps = self.predict(x, i, *prediction)
        a, b = self.alpha[i], self.alpha[i + 1]
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        return b**0.5 * x0 + max(1 - b - sigma**2, 0) ** 0.5 * eps, sigma

    def generate(self, x, prompt, negative, scale, start=0, eta=0.0, noises=None):
        for i in range(start, len(self.timesteps)):
            mean, sigma = self.step(x, i, eta, prompt, negative, scale)
            x = mean if noises is None else mean + sigma * noises[i]
        return x

    def draw(self, x, chain, scales):
        """From noise by DDIM. Guidance goes along a chain of conditions (text states, more channels),
        each of which says more than the one before: v_0 + sum_k scale_k (v_k - v_(k-1))."""
        states = torch.cat([states for states, _ in chain])
        for i, t in enumerate(self.timesteps):
            inputs = torch.cat([torch.cat([x, *given], 1) for _, given in chain])
            with torch.autocast("cpu", torch.bfloat16):
                v = self.unet(inputs, t, encoder_hidden_states=states).sample.float().chunk(len(chain))
            v = v[0] + sum(scale * (more - less) for scale, less, more in zip(scales, v, v[1:]))
            a, b = self.alpha[i], self.alpha[i + 1]
            x0, eps = a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x
            x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        return x

    def edit(self, z, source, target, negative, inversion, scale, skip):
        steps = len(self.timesteps)
        start = round(skip * steps)
        if inversion == "sdedit":
            a = self.alpha[start]
            return self.generate(a**0.5 * z + (1 - a) ** 0.5 * torch.randn_like(z), target, negative, scale, start)
        if inversion == "ddim":
            x = z
            for i in reversed(range(start, steps)):
                # the noise at the step's quiet end stands for the noise at its loud end
                x0, eps = self.predict(x, min(i + 1, steps - 1), source, alpha=self.alpha[i + 1])
                x = self.alpha[i] ** 0.5 * x0 + (1 - self.alpha[i]) ** 0.5 * eps
            return self.generate(x, target, negative, scale, start)
        path = [self.alpha[i] ** 0.5 * z + (1 - self.alpha[i]) ** 0.5 * torch.randn_like(z) for i in range(steps)] + [z]
        noises = [None] * steps
        for i in range(start, steps):
            mean, sigma = self.step(path[i], i, 1.0, source)
            noises[i] = (path[i + 1] - mean) / max(sigma, 1e-8) if sigma > 1e-6 else torch.zeros_like(z)
            path[i + 1] = mean + sigma * noises[i]
        return self.generate(path[start], target, negative, scale, start, 1.0, noises)


def pipeline_of(folder: pathlib.Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


def draw_by_pipeline(captions: list[str], args) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator, made = torch.Generator().manual_seed(args.seed), []
    recommended = args.model / "dinv.json"
    settings = json.loads(recommended.read_text()) if recommended.exists() else {}
    length = {name: value for name, value in settings.items() if name == "max_sequence_length"}
    for start in range(0, len(captions), 32):
        drawn = pipeline(
            captions[start : start + 32], height=SIZE, width=SIZE, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
            generator=generator, output_type="pt", **length,
        )
        made.append(drawn.images * 2 - 1)
    return torch.cat(made)


def text_report(judge, made: torch.Tensor, triples) -> dict:
    """The share of pictures that show each attribute of their caption."""
    truth = np.array([after.labels() for *_, after in triples])
    table = dict(zip(KINDS, (judging.predict(judge, made) == truth).mean(0).round(3).tolist()))
    return table | {"all": round(float(np.mean(list(table.values()))), 3)}


def edits(per_kind: int, split: str, seed: int):
    """(kind, B, B') triples, every kind in equal number; B' always belongs to the split."""
    rng = random.Random(seed)
    for kind in KINDS:
        for _ in range(per_kind):
            after = sample_scene(rng, split)
            yield kind, after.but(kind, rng.choice([v for v in ATTRIBUTES[kind] if v != getattr(after, kind)])), after


def tensor(scenes):
    return common.pictures_to_tensor(np.stack([np.asarray(render(s)) for s in scenes]))


def report(found: np.ndarray, triples) -> dict:
    """`found` [n, kinds]: the judge's reading of the made pictures."""
    truth = np.array([after.labels() for *_, after in triples])
    right = found == truth
    table = {}
    for i, kind in enumerate(KINDS):
        rows = [n for n, (k, *_) in enumerate(triples) if k == kind]
        others = [j for j in range(len(KINDS)) if j != i]
        table[kind] = [round(float(right[rows, i].mean()), 3), round(float(right[np.ix_(rows, others)].mean()), 3)]
    table["all"] = [round(float(np.mean([v[j] for v in table.values()])), 3) for j in (0, 1)]
    return table


def to_image(x):
    """A tensor [3, h, w] in [-1, 1] as a picture."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def save_sheet(path, rows):
    """Rows of tensors [n, 3, h, w], one picture below the other."""
    n = len(rows[0])
    sheet = Image.new("RGB", (n * 132 + 4, len(rows) * 132 + 4), "white")
    for r, row in enumerate(rows):
        for c in range(n):
            sheet.paste(to_image(row[c]), (4 + c * 132, 4 + r * 132))
    sheet.save(path)


def read_pictures(rows, cell):
    return common.pictures_to_tensor(np.stack([np.asarray(Image.open(row[cell]).convert("RGB")) for row in rows]))


def follow_instructions(model: Model, rows, args):
    """B' from B and the instruction (Brooks et al. 2023, equation 3)."""
    z = model.encode_image(read_pictures(rows, "b")) / model.vae.config.scaling_factor
    empty, text = model.encode_prompt([""] * len(rows)), model.encode_prompt([row["instruction"] for row in rows])
    chain = [(empty, [torch.zeros_like(z)]), (empty, [z]), (text, [z])]
    return model.decode(model.draw(torch.randn_like(z), chain, (args.image_guidance_scale, args.guidance_scale)))


def fill_grids(model: Model, rows, args):
    """B' from A, A', B and its caption, as the covered cell of a 2x2 grid."""
    a, a_prime, b = (read_pictures(rows, cell) for cell in ("a", "a_prime", "b"))
    grids = torch.cat([torch.cat([a, a_prime], 3), torch.cat([b, torch.zeros_like(b)], 3)], 2)
    z = model.encode_image(grids)
    mask = torch.zeros(len(z), 1, *z.shape[2:])
    mask[:, :, 16:, 16:] = 1
    empty, text = model.encode_prompt([""] * len(rows)), model.encode_prompt([row["captions"]["b_prime"] for row in rows])
    chain = [(empty, [mask, z]), (text, [mask, z])]
    z = model.draw(torch.randn_like(z), chain, (args.guidance_scale,))
    return model.decode(z[:, :, 16:, 16:]) if args.cell_alone else model.decode(z)[:, :, 128:, 128:]


def conditioned_gate(args):
    """The gates of the U-Nets that look at a picture."""
    task = args.gate
    if args.checkpoint:
        unet = train_conditioned.build(args.model, task)
        unet.load_state_dict(torch.load(args.checkpoint, weights_only=False)["ema"])
    else:
        unet = UNet2DConditionModel.from_pretrained(args.model / train_conditioned.FOLDERS[task], torch_dtype=torch.float32)
    model = Model(args.model, args.steps, unet.to(memory_format=torch.channels_last))
    judge = judging.load()
    rows = [row for row in suite.read("validation") if "+" not in row["kind"]][: args.per_kind * len(KINDS)]
    batch, solve = (32, follow_instructions) if task == "instruct" else (8, fill_grids)
    made = torch.cat([solve(model, rows[start : start + batch], args) for start in range(0, len(rows), batch)])
    scenes = [[Scene(**row["attributes"][cell], seed=0) for cell in ("b", "b_prime")] for row in rows]
    table = report(judging.predict(judge, made), [(row["kind"], *pair) for row, pair in zip(rows, scenes)])
    shown = [k for k in ("gate", "guidance_scale", "image_guidance_scale", "steps") if task == "instruct" or k != "image_guidance_scale"]
    print(json.dumps({k: getattr(args, k) for k in shown} | table))
    if args.sheet:
        save_sheet(args.sheet, [*(read_pictures(rows[:16], cell) for cell in ("a", "a_prime", "b")), made[:16], read_pictures(rows[:16], "b_prime")])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gate", choices=("text", "swap", "append", "instruct", "inpaint"))
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--inversion", choices=("edit-friendly", "ddim", "sdedit"), default="edit-friendly")
    parser.add_argument("--guidance", choices=("difference", "ordinary"), default="difference")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--image-guidance-scale", type=float, default=1.5)
    parser.add_argument("--skip", type=float, default=0.1, help="share of the steps left out at the noisy end")
    parser.add_argument("--cell-alone", action="store_true", help="inpaint: decode the covered cell without the grid around it")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--per-kind", type=int, default=8)
    parser.add_argument("--seed", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="WORK/*.ckpt: its U-Net instead of the model's")
    parser.add_argument("--sheet", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.gate in train_conditioned.FOLDERS:
        return conditioned_gate(args)
    unet = None
    if args.checkpoint:
        unet = train_unet.build()
        unet.load_state_dict(torch.load(args.checkpoint, weights_only=False)["ema"])
        unet = unet.to(memory_format=torch.channels_last)
    judge = judging.load()
    triples = list(edits(args.per_kind, "validation", args.seed))
    if pipeline_of(args.model) != "StableDiffusionPipeline":
        if args.gate != "text":
            parser.error(f"{args.gate} is measured by `dinv eval run --methods text-swap` for a {pipeline_of(args.model)}")
        made = draw_by_pipeline([caption(after) for *_, after in triples], args)
        return finish(args, made, triples, text_report(judge, made, triples))
    model = Model(args.model, args.steps, unet)
    made = []
    for start in range(0, len(triples), 32):
        kinds, before, after = zip(*triples[start : start + 32])
        target = model.encode_prompt(
            [f"{caption(b)}, {word(k, getattr(a, k))}" for k, b, a in zip(kinds, before, after)]
            if args.gate == "append" else [caption(a) for a in after]
        )
        empty = model.encode_prompt([""] * len(after))
        if args.gate == "text":
            z = model.generate(torch.randn(len(after), 4, 16, 16), target, empty, args.guidance_scale)
        else:
            source = model.encode_prompt([caption(b) for b in before])
            negative = source if args.guidance == "difference" else empty
            z = model.edit(model.encode_image(tensor(before)), source, target, negative, args.inversion, args.guidance_scale, args.skip)
        made.append(model.decode(z))
    made = torch.cat(made)
    finish(args, made, triples, text_report(judge, made, triples) if args.gate == "text" else report(judging.predict(judge, made), triples))


def finish(args, made: torch.Tensor, triples, table: dict):
    """Prints the table, and draws the sheet if there is to be one."""
    print(json.dumps({k: str(v) for k, v in vars(args).items() if k in ("gate", "inversion", "guidance", "guidance_scale", "skip", "steps")} | table))
    if args.sheet:
        shown = [i * args.per_kind + j for i in range(len(KINDS)) for j in (0, 1)]
        _, before, after = zip(*[triples[i] for i in shown])
        save_sheet(args.sheet, [tensor(before), made[shown], tensor(after)])


if __name__ == "__main__":
    main()
