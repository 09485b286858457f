"""Makes tests/golden/pipeline: a whole model folder with tiny networks of random weights (a
diffusers pipeline, its CLIP and a captioner), on which the command line is tested end to end.

Run from the root of the repository, after make_golden_tokenizer.py:
python training/reference/make_tiny_pipeline.py
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig,
    Blip2VisionConfig, CLIPConfig, CLIPModel, CLIPTextModel, OPTConfig,
)

from make_golden_captioner import VOCAB, make_tokenizer

OUT = Path("tests/golden/pipeline")
TOKENIZER = Path("tests/golden/tokenizer/files")
SIZE, WIDTH, QUERIES = 32, 16, 2
NORMALISE = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "rescale_factor": 1 / 255, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}


def randomise(model, seed):
    """Weights of the usual size; a norm's scale around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.3 if "embed" in name else (p[0].numel() ** -0.5 if p.dim() > 1 else 0.05)
        is_norm = "norm" in name and name.endswith("weight")
        p.data = torch.randn(p.shape, generator=generator) * scale + (1.0 if is_norm else 0.0)
    return model.half().eval()


def make_clip(tokenizer):
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
    tower = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                 num_attention_heads=2, hidden_act="quick_gelu")
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config=dict(vocab_size=len(tokenizer), max_position_embeddings=40, **ids, **tower),
        vision_config=dict(image_size=SIZE, patch_size=8, **tower),
    )
    return randomise(CLIPModel(config), 1)


def make_captioner(folder):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=2, image_size=SIZE, patch_size=8,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, vocab_size=8,
            intermediate_size=2 * WIDTH, encoder_hidden_size=WIDTH, max_position_embeddings=8,
        ),
        text_config=OPTConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, ffn_dim=2 * WIDTH,
            num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=WIDTH,
        ),
        num_query_tokens=QUERIES, image_token_index=VOCAB - 1,
    )
    model = randomise(Blip2ForConditionalGeneration(config), 2)
    model.language_model.get_input_embeddings().weight.data[2] *= 2.5  # lets captions end
    model.save_pretrained(folder)
    make_tokenizer(folder)
    size = {"size": {"height": SIZE, "width": SIZE}, "image_processor_type": "BlipImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**NORMALISE, **size}))


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length = 40
    clip = make_clip(tokenizer)
    text_encoder = CLIPTextModel(clip.config.text_config).half()
    source = clip.text_model.state_dict()
    wanted = text_encoder.state_dict()
    text_encoder.load_state_dict({k: source[k.removeprefix("text_model.")] for k in wanted})
    unet = randomise(UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4,
    ), 3)
    vae = randomise(AutoencoderKL(
        sample_size=SIZE, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3,
    ), 4)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(OUT)
    clip.save_pretrained(OUT / "clip")
    tokenizer.save_pretrained(OUT / "clip")
    crop = {
        "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True, "image_processor_type": "CLIPImageProcessor",
    }
    (OUT / "clip/preprocessor_config.json").write_text(json.dumps({**NORMALISE, **crop}))
    make_captioner(OUT / "captioner")


if __name__ == "__main__":
    main()
