"""Trains two of the three text encoders of `demo-sd3`: a second, narrower CLIP and a small T5.

    python train_sd3_encoders.py --work WORK --model ../demo/model                        # resumes by itself
    python train_sd3_encoders.py --work WORK --model ../demo/model --export ../demo/sd3   # text_encoder{,_2,_3}/, tokenizer{,_2,_3}/, clip{,_2}/

The first encoder is that of the demo model. The second learns the joint space of the first's image tower, which is
frozen. As in train_clip.py, linear heads (thrown away afterwards) read every attribute, or that a caption does not
tell it: from the pooled state, and from a random place of what Stable Diffusion 3 reads, padding included, which
is CLIP's last layer but one and T5's last.
"""

import json
import pathlib
import random
import shutil

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

import common
import data
from text import MAX_LENGTH, train_t5_tokenizer
from train_clip import WIDTH, accuracy, head_loss, pixel_values
from train_qwen import labels_told
from train_unet import once
from world import ATTRIBUTES, random_caption

NARROW = 128  # of the second CLIP
T5_LENGTH = 77  # ids of T5, padding included, as in the reference of Stable Diffusion 3; it is not masked
OUTPUTS = sum(len(v) + 1 for v in ATTRIBUTES.values())


def second_clip(first: CLIPModel) -> CLIPModel:
    """A new text tower on the first's image tower."""
    text = first.config.text_config.to_dict() | dict(hidden_size=NARROW, intermediate_size=4 * NARROW, hidden_act="gelu")
    clip = CLIPModel(CLIPConfig(projection_dim=WIDTH, text_config=text, vision_config=first.config.vision_config.to_dict()))
    clip.vision_model.load_state_dict(first.vision_model.state_dict())
    clip.visual_projection.load_state_dict(first.visual_projection.state_dict())
    clip.logit_scale.data.copy_(first.logit_scale.data)
    for part in (clip.vision_model, clip.visual_projection):
        part.requires_grad_(False)
    clip.logit_scale.requires_grad_(False)
    return clip


def small_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """As wide as both CLIPs together, which Stable Diffusion 3 puts beside each other."""
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH + NARROW, d_kv=32, num_heads=6, d_ff=512, num_layers=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
    ))


class Encoders(torch.nn.Module):
    """Both encoders and the linear heads that help to train them."""

    def __init__(self, clip: CLIPModel, t5: T5EncoderModel):
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.pooled_head = torch.nn.Linear(NARROW, OUTPUTS)
        self.clip_head = torch.nn.Linear(NARROW, OUTPUTS)
        self.t5_head = torch.nn.Linear(t5.config.d_model, OUTPUTS)

    def clip_reads(self, ids: torch.Tensor, places: torch.Tensor):
        """The captions in the joint space, and the logits of the attributes: pooled, and at a place of each."""
        output = self.clip.text_model(input_ids=ids, output_hidden_states=True)
        states = output.hidden_states[-2][torch.arange(len(ids)), places]
        embeds = F.normalize(self.clip.text_projection(output.pooler_output).float(), dim=-1)
        return embeds, self.pooled_head(output.pooler_output).float(), self.clip_head(states).float()

    def t5_reads(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        states = self.t5(ids).last_hidden_state
        return self.t5_head(states[torch.arange(len(ids)), places]).float()


@torch.no_grad()
def image_features(clip: CLIPModel, pictures) -> torch.Tensor:
    parts = [clip.visual_projection(clip.vision_model(pixel_values(part)).pooler_output) for part in torch.from_numpy(pictures).split(256)]
    return F.normalize(torch.cat(parts), dim=-1)


def ids_of(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def shares_read(model: Encoders, tokenizers, scenes) -> dict[str, float]:
    """How often each head names an attribute, or that it is not told; over the padding, where both place it last."""
    rng, device = random.Random(0), model.clip_head.weight.device
    told = [random_caption(rng, scene) for scene in scenes]
    known = labels_told(scenes, [known for _, known in told]).to(device)
    texts = [text for text, _ in told]
    last = lambda length: torch.full((len(texts),), length - 1, device=device)
    clip, t5 = (ids_of(t, texts, n).to(device) for t, n in zip(tokenizers, (MAX_LENGTH, T5_LENGTH)))
    _, pooled, padding = model.clip_reads(clip, last(MAX_LENGTH))
    logits = {"pooled": pooled, "clip": padding, "t5": model.t5_reads(t5, last(T5_LENGTH))}
    right = lambda parts: torch.stack([(p.argmax(1) == known[:, i]).float() for i, p in enumerate(parts)]).mean()
    return {name: round(float(right(x.split([len(v) + 1 for v in ATTRIBUTES.values()], dim=1))), 4) for name, x in logits.items()}


def export(model: Encoders, tokenizers, args):
    """Also the first encoder, with its joint space, which are the demo model's."""
    folder = args.export
    for name in ("tokenizer", "clip"):
        shutil.copytree(args.model / name, folder / name, dirs_exist_ok=True)
    shutil.copytree(args.model / "clip", folder / "clip_2", dirs_exist_ok=True)
    shutil.copytree(args.model / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)
    tokenizers[1].save_pretrained(folder / "tokenizer_3")
    model.t5.half().save_pretrained(folder / "text_encoder_3")
    model.clip.half().save_pretrained(folder / "clip_2")
    for suffix in ("", "_2"):
        clip = CLIPModel.from_pretrained(folder / f"clip{suffix}")
        text = CLIPTextModelWithProjection(clip.config.text_config)
        text.text_model.load_state_dict(clip.text_model.state_dict())
        text.text_projection.load_state_dict(clip.text_projection.state_dict())
        text.half().save_pretrained(folder / f"text_encoder{suffix}")


def main():
    parser = common.arguments(__doc__, steps=600, batch=48, lr=2e-3, seed=70)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the demo model, whose CLIP is the first")
    parser.add_argument("--pictures", type=int, default=data.COUNTS["train"], help="train on the first so many")
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    first = CLIPModel.from_pretrained(args.model / "clip", torch_dtype=torch.float32).eval()
    folder = args.work / "t5_tokenizer"
    tokenizers = CLIPTokenizer.from_pretrained(args.model / "tokenizer"), T5Tokenizer.from_pretrained(folder) if folder.exists() else train_t5_tokenizer(folder)
    torch.manual_seed(args.seed)
    model = Encoders(second_clip(first), small_t5(tokenizers[1]))
    print("parameters:", sum(p.numel() for p in model.parameters() if p.requires_grad), flush=True)
    run = common.Run("sd3_encoders", args, model, ema=0.99)
    validation, held_out = data.load(args.work, "validation")
    if args.export:
        read = shares_read(run.ema, tokenizers, held_out[:512])
        accurate = accuracy(run.ema.clip, tokenizers[0], validation, held_out)
        export(run.ema, tokenizers, args)
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, "read": read, "accuracy_of_256": accurate}))
        return

    pictures, scenes = data.load(args.work, "train")
    part = f"-{args.pictures}" if args.pictures < len(scenes) else ""
    scenes = scenes[: args.pictures]
    seen = once(args.work / f"clip_features{part}.pt", args.device, lambda: image_features(first, pictures[: args.pictures]))
    for step in run.loop():
        run.seed()
        words = random.Random(args.seed * 1_000_003 + step)
        index = torch.randint(len(scenes), (args.batch,))
        chosen = [scenes[i] for i in index.tolist()]
        told = [random_caption(words, scene) for scene in chosen]
        known = labels_told(chosen, [known for _, known in told]).to(args.device)
        clip, t5 = (ids_of(t, [text for text, _ in told], n).to(args.device) for t, n in zip(tokenizers, (MAX_LENGTH, T5_LENGTH)))
        ends = (clip == tokenizers[0].eos_token_id).int().argmax(1)
        places = ends + ((MAX_LENGTH - ends) * torch.rand(args.batch, device=args.device)).long()
        with common.autocast(args.device):
            embeds, pooled, padding = model.clip_reads(clip, places)
            anywhere = model.t5_reads(t5, torch.randint(T5_LENGTH, (args.batch,), device=args.device))
        logits = seen[index] @ embeds.T * model.clip.logit_scale.exp()
        diagonal = torch.arange(args.batch, device=args.device)
        contrastive = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        losses = {"pooled": head_loss(pooled, known), "clip": head_loss(padding, known), "t5": head_loss(anywhere, known)}
        run.update(contrastive + sum(losses.values()), contrastive=contrastive, **losses)
        if run.step % 100 == 99:
            print(json.dumps({"step": run.step + 1, "read": shares_read(run.ema, tokenizers, held_out[:256])}), file=run.log)


if __name__ == "__main__":
    main()
