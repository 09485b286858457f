"""Trains the demo model's U-Net on stored latents, conditioned on the frozen CLIP text encoder.

    python train_unet.py --work WORK --model ../demo/model            # resumes by itself
    python train_unet.py --work WORK --model ../demo/model --warm     # starts from ../demo/model/unet
    python train_unet.py --work WORK --model ../demo/model --export   # unet/, scheduler/, model_index.json

v-prediction with zero terminal SNR and trailing timesteps (Lin et al. 2023, arXiv 2305.08891), so
that the prompt decides the global look; the loss is weighted by min-SNR (Hang et al. 2023,
gamma 5, its v-prediction form).
"""

import json
import pathlib
import random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import common
import data
from text import MAX_LENGTH
from world import Scene, random_caption

EMPTY_PROMPT = 0.1  # share of captions replaced by the empty one, for guidance


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 128, 160),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior of uint8 pictures [n, h, w, 3], both scaled."""
    means, stds = [], []
    for start in range(0, len(pictures), 256):
        x = common.pictures_to_tensor(pictures[start : start + 256]).to(vae.device)
        with common.autocast(vae.device):
            posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    return torch.cat(means) * vae.config.scaling_factor, torch.cat(stds) * vae.config.scaling_factor


def drawn_once(path: pathlib.Path, make) -> np.ndarray:
    """The array that `make` returns, kept in a file."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        np.save(part, make())
        part.rename(path)
    return np.load(path, mmap_mode="c")


def once(path: pathlib.Path, device: str, make):
    """The tensors that `make` returns, kept in a file."""
    if not path.exists():
        torch.save(make(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return torch.load(path, map_location=device)


class Frozen:
    """The parts of the model that are not trained here."""

    def __init__(self, model: pathlib.Path, device: str):
        self.device = device
        self.vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).to(device, memory_format=torch.channels_last)
        self.tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32).to(device)
        self.alphas_cumprod = scheduler().alphas_cumprod.to(device)
        self.empty = self.tokens([""])[0]

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids.to(self.device, torch.int16)

    @torch.no_grad()
    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, MAX_LENGTH] token numbers to [b, MAX_LENGTH, 192]."""
        with common.autocast(self.device):
            return self.text_encoder(tokens.long()).last_hidden_state


class Texts:
    """Several texts for each of n items, as token numbers [n, variants, MAX_LENGTH]; on a GPU, which has
    the memory, as states of the text encoder."""

    def __init__(self, frozen: Frozen, texts: list[list[str]]):
        flat = torch.cat([frozen.empty[None], frozen.tokens([text for variants in texts for text in variants])])
        self.variants, self.frozen, self.ready = len(texts[0]), frozen, torch.device(frozen.device).type == "cuda"
        self.flat = torch.cat([frozen.states(part) for part in flat.split(4096)]) if self.ready else flat

    def draw(self, index: torch.Tensor, empty: torch.Tensor | float) -> torch.Tensor:
        """The states of one variant of each item [b, MAX_LENGTH, 192]; of the empty text where `empty` [b]
        says so, or with that probability."""
        device = self.flat.device
        row = 1 + index * self.variants + torch.randint(self.variants, index.shape, device=device)
        if isinstance(empty, float):
            empty = torch.rand(index.shape, device=device) < empty
        drawn = self.flat[torch.where(empty, 0, row)]
        return drawn if self.ready else self.frozen.states(drawn)


def captions(scene: Scene, variants: int = 4) -> list[str]:
    rng = random.Random(scene.seed)
    return [random_caption(rng, scene)[0] for _ in range(variants)]


def draw_timesteps(batch: int, device: str) -> torch.Tensor:
    """One from each of `batch` equal strata, so that every batch sees the whole schedule."""
    strata = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    return (strata * 1000).long().clamp(max=999)


def velocity_loss(unet, frozen: Frozen, x, states, given=(), where=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss and the plain error of each latent, from the least noisy to the noisiest.
    `given` are more channels for the U-Net, `where` [b, 1, h, w] says how much each place counts."""
    t, noise = draw_timesteps(len(x), frozen.device), torch.randn_like(x)
    alphas_cumprod = frozen.alphas_cumprod[t]
    signal, spread = alphas_cumprod.sqrt()[:, None, None, None], (1 - alphas_cumprod).sqrt()[:, None, None, None]
    noisy = torch.cat([signal * x + spread * noise, *given], 1).contiguous(memory_format=torch.channels_last)
    target = signal * noise - spread * x
    with common.autocast(frozen.device):
        predicted = unet(noisy, t, states, return_dict=False)[0]
    squares = (predicted.float() - target).pow(2)
    if where is not None:
        squares = squares * where / where.mean(dim=(1, 2, 3), keepdim=True)
    error = squares.mean(dim=(1, 2, 3))
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(max=5) / (snr + 1)
    weight = (weight + 0.25) / 1.25  # never forget the last step, where snr is 0
    return (weight * error).mean(), error.detach()


def main():
    parser = common.arguments(__doc__, steps=20000, batch=128, lr=3e-3, seed=30)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--warm", action="store_true", help="start from the model's own weights instead of from random ones")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    unet = build()
    if args.warm:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    print("parameters:", sum(p.numel() for p in unet.parameters()), flush=True)
    run = common.Run("unet", args, unet, ema=0.998)
    frozen = Frozen(args.model, args.device)
    if args.export:
        run.ema.half().save_pretrained(args.model / "unet")
        StableDiffusionPipeline(
            vae=frozen.vae.half(), text_encoder=frozen.text_encoder.half(), tokenizer=frozen.tokenizer, unet=run.ema, scheduler=scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(args.model)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60}))
        return

    pictures, scenes = data.load(args.work, "train")
    mean, std = once(args.work / "latents.pt", args.device, lambda: encode(frozen.vae, pictures))
    texts = Texts(frozen, common.spread(captions, scenes))
    forward = common.compiled(unet, args)

    def step():
        index = torch.randint(len(mean), (args.batch,), device=args.device)
        x = mean[index] + std[index] * torch.randn_like(mean[index])
        loss, error = velocity_loss(forward, frozen, x, texts.draw(index, EMPTY_PROMPT))
        return loss, {"mse": error.mean(), "late": error[-len(error) // 8 :].mean()}

    for _ in run.loop(step):
        pass


if __name__ == "__main__":
    main()
