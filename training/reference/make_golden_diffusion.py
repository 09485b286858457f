"""Makes the golden files of the U-Net, the autoencoder and the samplers in tests/golden/.

Every model is a tiny one of diffusers with random weights (rounded to f16, computed in f32), saved
with its config, its inputs and its outputs. Run from anywhere:

    python training/reference/make_golden_diffusion.py

Made with diffusers 0.42.1 and torch 2.15.0.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of a scale that keeps activations near 1; nothing left at 0 or 1."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data = value.half().float()


def save_model(model: torch.nn.Module, folder: Path) -> None:
    model.half().save_pretrained(folder)
    model.float()


def make_unet(name: str, config: dict, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    model = UNet2DConditionModel(sample_size=16, norm_num_groups=4, **config).eval()
    randomise(model, generator)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    dims = model.config.cross_attention_dim
    context = randn(2, 5, dims if isinstance(dims, int) else dims[0]).requires_grad_()
    tensors = {
        "sample": randn(2, model.config.in_channels, *size),
        "timesteps": torch.tensor([981.0, 37.0]),
        "output_grad": randn(2, model.config.out_channels, *size),
    }
    added = None
    if model.config.addition_embed_type == "text_time":
        ids, d = 6, model.config.addition_time_embed_dim
        text_dim = model.config.projection_class_embeddings_input_dim - ids * d
        added = {"text_embeds": randn(2, text_dim), "time_ids": 100 * randn(2, ids).abs().round()}
        tensors |= added
    output = model(
        tensors["sample"], tensors["timesteps"], context, added_cond_kwargs=added
    ).sample
    output.backward(tensors["output_grad"])
    tensors |= {
        "encoder_hidden_states": context.detach(),
        "output": output.detach(),
        "context_grad": context.grad,
    }
    save_model(model, GOLDEN / name)
    save_file(tensors, GOLDEN / name / "io.safetensors")
    print(name, sum(p.numel() for p in model.parameters()), "parameters")


def make_vae(name: str, config: dict, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    model = AutoencoderKL(norm_num_groups=4, **config).eval()
    randomise(model, generator)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    image = torch.rand((2, 3, *size), generator=generator) * 2 - 1
    latents = torch.randn((1, model.config.latent_channels, 3, 4), generator=generator)
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        decoded = model.decode(latents).sample
    assert decoded.shape[-1] == 4 * factor
    tensors = {
        "image": image,
        "mean": posterior.mean.contiguous(),
        "logvar": posterior.logvar.contiguous(),
        "latents": latents,
        "decoded": decoded,
    }
    save_model(model, GOLDEN / name)
    save_file(tensors, GOLDEN / name / "io.safetensors")
    print(name, sum(p.numel() for p in model.parameters()), "parameters")


def make_models() -> None:
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    make_unet(
        "unet_sd15",
        {
            "block_out_channels": (8, 12, 16),
            "down_block_types": (down, down, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", up, up),
            "layers_per_block": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
        },
        (8, 8),
    )
    make_unet(
        "unet_sd21",
        {
            "block_out_channels": (8, 12, 16),
            "down_block_types": (down, down, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", up, up),
            "layers_per_block": 1,
            "attention_head_dim": (1, 3, 4),
            "cross_attention_dim": 10,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        (7, 10),  # not multiples of 4: the upsampled sizes follow the skip connections
    )
    make_unet(
        "unet_sdxl",
        {
            "in_channels": 5,
            "block_out_channels": (8, 12, 16),
            "down_block_types": ("DownBlock2D", down, down),
            "up_block_types": (up, up, "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (2, 3, 4),
            "transformer_layers_per_block": (1, 2, 3),
            "cross_attention_dim": 12,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
        },
        (8, 12),
    )
    make_unet(
        "unet_ssd1b",  # as segmind/SSD-1B and Segmind-Vega are distilled from SDXL
        {
            "block_out_channels": (8, 12, 16),
            "down_block_types": ("DownBlock2D", down, down),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": (up, up, "UpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": (2, 3, 4),
            "transformer_layers_per_block": [1, [2, 1], [1, 2]],
            "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
            "cross_attention_dim": 12,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
        },
        (8, 8),
    )
    make_vae(
        "vae",
        {
            "block_out_channels": (8, 12, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 2,
        },
        (16, 24),
    )
    make_vae(
        "vae_plain",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 6,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
        (9, 14),
    )


SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = SD15 | {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
LEADING = SD15 | {"timestep_spacing": "leading", "steps_offset": 1}
NO_CLIP = {"clip_sample": False, "set_alpha_to_one": False}
SAMPLERS = {
    "ddim_leading": (DDIMScheduler, LEADING | NO_CLIP, 7, {}),
    "ddim_linear_clipped": (DDIMScheduler, {"timestep_spacing": "linspace"}, 6, {}),
    "ddim_zero_snr": (DDIMScheduler, ZERO_SNR | NO_CLIP, 6, {}),
    "ddim_eta": (DDIMScheduler, LEADING | NO_CLIP, 5, {"eta": 0.7}),
    "ddim_cosine_sample": (
        DDIMScheduler,
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False},
        5,
        {},
    ),
    "dpm_solver_leading": (DPMSolverMultistepScheduler, LEADING, 9, {}),
    "dpm_solver_zero_snr": (DPMSolverMultistepScheduler, ZERO_SNR, 20, {}),
    "dpm_solver_linspace": (DPMSolverMultistepScheduler, SD15, 4, {}),
    "euler_leading": (EulerDiscreteScheduler, LEADING, 5, {}),
    "euler_linspace": (EulerDiscreteScheduler, SD15 | {"timestep_spacing": "linspace"}, 6, {}),
    "euler_zero_snr": (EulerDiscreteScheduler, ZERO_SNR, 6, {}),
    "euler_ancestral_leading": (EulerAncestralDiscreteScheduler, LEADING, 5, {}),
    "euler_ancestral_zero_snr": (EulerAncestralDiscreteScheduler, ZERO_SNR, 5, {}),
    "unipc_leading": (UniPCMultistepScheduler, LEADING, 8, {}),
    "unipc_zero_snr": (UniPCMultistepScheduler, ZERO_SNR, 8, {}),
    "dpm_solver_clipped": (DPMSolverMultistepScheduler, SD15 | {"lambda_min_clipped": -1.0}, 6, {}),
    "dpm_solver_clipped_trailing": (
        DPMSolverMultistepScheduler,
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "timestep_spacing": "trailing",
        },
        7,
        {},
    ),
    "unipc_uncorrected": (UniPCMultistepScheduler, LEADING | {"disable_corrector": [0, 2]}, 6, {}),
    "euler_trained_betas": (
        EulerDiscreteScheduler,
        {"num_train_timesteps": 40, "trained_betas": [0.002 * (1 + i) for i in range(40)]},
        5,
        {},
    ),
    "lcm": (LCMScheduler, {}, 4, {}),
    "lcm_velocity": (LCMScheduler, ZERO_SNR | {"original_inference_steps": 20, "timestep_scaling": 3.0}, 6, {}),
    "lcm_clipped": (LCMScheduler, {"beta_schedule": "linear", "prediction_type": "sample", "clip_sample": True}, 3, {}),
    "lcm_once": (LCMScheduler, {}, 1, {}),
}


def make_samplers() -> None:
    tensors, configs = {}, {}
    for number, (name, (scheduler_class, config, steps, options)) in enumerate(SAMPLERS.items()):
        generator = torch.Generator().manual_seed(number)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        scheduler = scheduler_class(**config)
        configs[name] = dict(scheduler.config) | {
            "_class_name": scheduler_class.__name__,
            "num_inference_steps": steps,
            "eta": options.get("eta", 0.0),
        }
        scheduler.set_timesteps(steps)
        sample = randn(1, 2, 1, 3) * scheduler.init_noise_sigma
        noise, outputs = randn(steps, 1, 2, 1, 3), randn(steps, 1, 2, 1, 3)
        samples, inputs = [sample], []
        for i, t in enumerate(scheduler.timesteps):
            inputs.append(scheduler.scale_model_input(sample, t))
            arguments = dict(options)
            if scheduler_class is DDIMScheduler:
                arguments["variance_noise"] = noise[i]
            # These samplers take no noise: give them ours.
            for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
                module.randn_tensor = lambda *_, i=i, **__: noise[i]
            sample = scheduler.step(outputs[i], t, sample, **arguments).prev_sample
            samples.append(sample)
        tensors |= {
            f"{name}.timesteps": scheduler.timesteps.float(),
            f"{name}.alphas_cumprod": scheduler.alphas_cumprod[:: 37].contiguous(),
            f"{name}.noise": noise,
            f"{name}.model_outputs": outputs,
            f"{name}.model_inputs": torch.stack(inputs),
            f"{name}.samples": torch.stack(samples),
        }
    folder = GOLDEN / "samplers"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "io.safetensors")
    (folder / "configs.json").write_text(json.dumps(configs, indent=1, default=str) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_models()
    make_samplers()
