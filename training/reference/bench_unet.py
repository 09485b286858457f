"""Times one call of a U-Net in PyTorch: the counterpart of `benches/unet.rs`.

    python training/reference/bench_unet.py demo/model/unet [--threads 2] [--repeats 20]
    python training/reference/bench_unet.py FOLDER --make    # a random U-Net of the demo's size

Prints the median and the fastest of the forward pass (batch 2, no gradients) and of forward and
backward to the prompt's hidden states with frozen weights, in milliseconds.
"""

import argparse
import statistics
import time

import torch
from diffusers import UNet2DConditionModel

DEMO_SIZE = {
    "sample_size": 16,
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 192,
    "norm_num_groups": 32,
}


def measure(run, repeats: int) -> str:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return f"median {statistics.median(times):.1f} ms, fastest {min(times):.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.make:
        unet = UNet2DConditionModel(**DEMO_SIZE)
        print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
        unet.half().save_pretrained(args.folder)
        return
    unet = UNet2DConditionModel.from_pretrained(args.folder).float().eval().requires_grad_(False)
    size = unet.config.sample_size
    sample = torch.randn(2, unet.config.in_channels, size, size)
    context = torch.randn(2, 64, unet.config.cross_attention_dim)
    timesteps = torch.tensor([500, 500])

    def forward():
        with torch.no_grad():
            unet(sample, timesteps, context)

    def forward_and_backward():
        tracked = context.clone().requires_grad_()
        unet(sample, timesteps, tracked).sample.square().mean().backward()
        assert tracked.grad is not None

    print("forward:              ", measure(forward, args.repeats))
    print("forward and backward: ", measure(forward_and_backward, args.repeats))


if __name__ == "__main__":
    main()
