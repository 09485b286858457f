#!/usr/bin/env bash
# The autoencoder and everything that stands on it, on one GPU, in about fifteen minutes.
#
#     bash on_gpu.sh draw    WORK                            the pictures of every part
#     bash on_gpu.sh vae     WORK MODEL SECONDS [CHANNELS]   from MODEL/vae, if there is one
#     bash on_gpu.sh decoder WORK MODEL SECONDS [CHANNELS]   the decoder alone, with a discriminator
#     bash on_gpu.sh unet    WORK MODEL SECONDS              from MODEL/unet, if there is one
#     bash on_gpu.sh rest    WORK MODEL SECONDS              what starts from the U-Net, side by side
#     bash on_gpu.sh z-image WORK MODEL SECONDS              the second backbone, on MODEL/vae, in MODEL/z-image
#     bash on_gpu.sh sd3     WORK MODEL SECONDS              the third, on MODEL/vae and MODEL/clip, in MODEL/sd3
#
# MODEL is a folder with the tokenizer and the text encoder, demo/model say. Times are those of training
# alone. `SMALL=1` rehearses every command on a CPU with a handful of pictures.
set -euo pipefail
cd "$(dirname "$0")"
part=$1 work=$2 model=${3:-} seconds=${4:-0} channels=${5:-4}
if [ -n "${SMALL:-}" ]; then
    pictures=(--count 64) pool=(--scenes 24) time=(--steps 4) narrow=(--batch 4) medium=(--batch 16) wide=(--batch 16)
    short=(--steps 4 --batch 4)
else
    pictures=() pool=() time=(--steps 1000000 --seconds "$seconds") narrow=(--batch 64) medium=(--batch 256) wide=(--batch 512)
    short=(--steps 1000000 --seconds $((seconds / 4)))
fi
folder=$model/vae
[ "$channels" = 4 ] || folder=$model/vae$channels
log() { echo "$(date +%T) $*"; }

draw() {
    python3 data.py --out "$work" "${pictures[@]}"
    log "drawn"
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model . --prepare "${pool[@]}"
    done
    log "drawn for the other networks"
}

vae() {
    local start=()
    [ ! -e "$folder" ] || start=(--start "$folder")
    python3 train_vae.py --work "$work" --latent-channels "$channels" "${start[@]}" "${time[@]}" "${narrow[@]}"
    python3 train_vae.py --work "$work" --latent-channels "$channels" --export "$folder"
    log "autoencoder of $channels channels"
}

decoder() {
    python3 train_decoder.py --work "$work" --vae "$folder" "${time[@]}" "${narrow[@]}"
    python3 train_decoder.py --work "$work" --vae "$folder" --export "$folder"
    log "decoder of $channels channels"
}

unet() {
    local warm=()
    [ ! -e "$model/unet" ] || warm=(--warm)
    python3 train_unet.py --work "$work" --model "$model" "${warm[@]}" "${time[@]}" "${wide[@]}"
    python3 train_unet.py --work "$work" --model "$model" --export
    log "U-Net"
}

z_image() {
    python3 train_qwen.py --work "$work" "${short[@]}"
    python3 train_qwen.py --work "$work" --export "$model/z-image"
    log "Qwen3"
    python3 train_z_image.py --work "$work" --model "$model" --out "$model/z-image" "${time[@]}" "${medium[@]}"
    python3 train_z_image.py --work "$work" --model "$model" --out "$model/z-image" --export
    log "Z-Image"
}

sd3() {
    python3 train_sd3_encoders.py --work "$work" --model "$model" "${short[@]}"
    python3 train_sd3_encoders.py --work "$work" --model "$model" --export "$model/sd3"
    log "second CLIP and T5"
    python3 train_sd3.py --work "$work" --model "$model" --out "$model/sd3" "${time[@]}" "${medium[@]}"
    python3 train_sd3.py --work "$work" --model "$model" --out "$model/sd3" --export
    log "Stable Diffusion 3"
}

rest() {
    local running=()
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" "${time[@]}" "${medium[@]}" "${pool[@]}" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process"; done
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" --export
    done
    log "networks that look at a picture"
}

"${part//-/_}"
