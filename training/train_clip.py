"""Trains the demo model's CLIP (text and vision towers with projections) on pictures and captions.

    python train_clip.py --work WORK                         # resumes by itself
    python train_clip.py --work WORK --export ../demo/model  # text_encoder/, tokenizer/, clip/

The loss is CLIP's contrastive one. Beside it, linear heads (thrown away afterwards) read every
attribute, or that a caption does not tell it, from the pooled features, and for the text also from
a random place of the padding: the U-Net reads all of these states, and a caption's last words
override its first ones, so they have to hold the resolved meaning.
"""

import json
import pathlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

import common
import data
from text import MAX_LENGTH, train_clip_tokenizer
from world import ATTRIBUTES, KINDS, caption, random_caption

WIDTH = 192
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    return CLIPConfig(
        projection_dim=WIDTH,
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=MAX_LENGTH, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH, num_hidden_layers=4, num_attention_heads=4,
            image_size=128, patch_size=16, hidden_act="quick_gelu",
        ),
    )


class WithHeads(torch.nn.Module):
    """CLIP and the linear heads that help to train it."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        outputs = sum(len(v) + 1 for v in ATTRIBUTES.values())
        self.text_head = torch.nn.Linear(WIDTH, outputs)
        self.pad_head = torch.nn.Linear(WIDTH, outputs)
        self.image_head = torch.nn.Linear(WIDTH, outputs)


def head_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the attributes; labels [b, kinds], `len(values)` for "not told"."""
    parts = logits.split([len(v) + 1 for v in ATTRIBUTES.values()], dim=1)
    return sum(F.cross_entropy(p, labels[:, i]) for i, p in enumerate(parts)) / len(parts)


def pixel_values(pictures: np.ndarray) -> torch.Tensor:
    return common.pictures_to_tensor(pictures)  # mean and standard deviation are 0.5


@torch.no_grad()
def accuracy(clip: CLIPModel, tokenizer, pictures, scenes) -> float:
    """How often the right caption wins among the 256 different ones of a group."""
    right, total = 0, 0
    for start in range(0, len(scenes) - 255, 256):
        texts = [caption(s) for s in scenes[start : start + 256]]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").to(clip.device)
        logits = clip(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixel_values(pictures[start : start + 256]).to(clip.device)).logits_per_image
        best = logits.argmax(1).tolist()
        right += sum(texts[b] == texts[i] for i, b in enumerate(best))
        total += 256
    return right / total


def export(clip: CLIPModel, tokenizer, folder: pathlib.Path):
    clip = clip.half()
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, image_mean=MEAN, image_std=STD).save_pretrained(folder / "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    text.half().save_pretrained(folder / "text_encoder")


def main():
    parser = common.arguments(__doc__, steps=2200, batch=128, lr=1e-3, seed=20)
    parser.add_argument("--export", type=pathlib.Path)
    args = parser.parse_args()
    tokenizer_folder = args.work / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder) if tokenizer_folder.exists() else train_clip_tokenizer(tokenizer_folder)
    torch.manual_seed(args.seed)
    model = WithHeads(CLIPModel(config(tokenizer)))
    run = common.Run("clip", args, model, ema=0.99)
    validation, validation_scenes = data.load(args.work, "validation")
    if args.export:
        export(run.ema.clip, tokenizer, args.export)
        stored = CLIPModel.from_pretrained(args.export / "clip", torch_dtype=torch.float32).eval()
        print(json.dumps({"step": run.step, "minutes": run.seconds / 60, "accuracy_of_256": accuracy(stored, tokenizer, validation, validation_scenes)}))
        return

    train, scenes = data.load(args.work, "train", args.device)
    labels = torch.tensor([s.labels() for s in scenes], device=args.device)
    not_told = torch.tensor([len(v) for v in ATTRIBUTES.values()], device=args.device)
    for step in run.loop():
        rng = run.rng()
        words = random.Random(args.seed * 1_000_003 + step)
        index = rng.integers(len(train), size=args.batch)
        captions = [random_caption(words, scenes[i]) for i in index]
        told = torch.tensor([[kind in known for kind in KINDS] for _, known in captions], device=args.device)
        index = torch.from_numpy(index).to(args.device)
        truth = labels[index]
        ids = tokenizer([c for c, _ in captions], padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids.to(args.device)
        with common.autocast(args.device):
            text = model.clip.text_model(input_ids=ids)
            image = model.clip.vision_model(pixel_values=pixel_values(train[index]))
            text_embeds = F.normalize(model.clip.text_projection(text.pooler_output).float(), dim=-1)
            image_embeds = F.normalize(model.clip.visual_projection(image.pooler_output).float(), dim=-1)
            ends = (ids == tokenizer.eos_token_id).int().argmax(1)
            pads = ends + ((MAX_LENGTH - 1 - ends) * torch.from_numpy(rng.random(args.batch)).to(args.device)).long()
            text_logits = model.text_head(text.pooler_output).float()
            pad_logits = model.pad_head(text.last_hidden_state[torch.arange(args.batch, device=args.device), pads]).float()
            image_logits = model.image_head(image.pooler_output).float()
        logits = image_embeds @ text_embeds.T * model.clip.logit_scale.exp().clamp(max=100)
        diagonal = torch.arange(args.batch, device=args.device)
        contrastive = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        known = torch.where(told, truth, not_told)
        heads = [head_loss(text_logits, known), head_loss(pad_logits, known), head_loss(image_logits, truth)]
        run.update(contrastive + sum(heads), contrastive=contrastive, text=heads[0], pad=heads[1], image=heads[2])
        if run.step % 200 == 199:
            print(json.dumps({"step": run.step + 1, "accuracy_of_256": accuracy(run.ema.clip, tokenizer, validation[:512], validation_scenes[:512])}), file=run.log)


if __name__ == "__main__":
    main()
