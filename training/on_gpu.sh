#!/usr/bin/env bash
# The autoencoder and everything that stands on it, on one GPU, in about fifteen minutes.
#
#     bash on_gpu.sh prepare  WORK MODEL                      pictures; what is compiled, which PyTorch keeps on disk
#     bash on_gpu.sh vae      WORK MODEL SECONDS [CHANNELS]   from MODEL/vae, if there is one of the layout
#     bash on_gpu.sh decoder  WORK MODEL SECONDS [CHANNELS]   the decoder alone, with a discriminator
#     bash on_gpu.sh unet     WORK MODEL SECONDS              from MODEL/unet, if there is one
#     bash on_gpu.sh rest     WORK MODEL SECONDS              what starts from the U-Net, side by side
#
# MODEL is a folder with the tokenizer and the text encoder, demo/model say. Times are those of training
# alone. `SMALL=1` rehearses every command on a CPU with a handful of pictures.
set -euo pipefail
cd "$(dirname "$0")"
part=$1 work=$2 model=$3 seconds=${4:-0} channels=${5:-4}
if [ -n "${SMALL:-}" ]; then
    pictures=(--count 64) pool=(--scenes 24) time=(--steps 4) few=(--steps 2) narrow=(--batch 4) medium=(--batch 16) wide=(--batch 16)
else
    pictures=() pool=() time=(--steps 1000000 --seconds "$seconds") few=(--steps 8) narrow=(--batch 64) medium=(--batch 256) wide=(--batch 512)
fi
folder=$model/vae
[ "$channels" = 4 ] || folder=$model/vae$channels
log() { echo "$(date +%T) $*"; }

# A script that cannot be captured as a CUDA graph here is left to launch its kernels by itself.
trained() {
    local name=$1
    shift
    local how=()
    [ ! -e "$work/eager-$name" ] || how=(--eager)
    python3 "$@" "${how[@]}"
}

prepare() {
    mkdir -p "$work"
    local other=$work/trial
    mkdir -p "$other"
    cp -r "$model" "$other/model"
    python3 data.py --out "$other" --count 1024
    try vae train_vae.py --work "$other" "${narrow[@]}" &
    try vae16 train_vae.py --work "$other" --latent-channels 16 "${narrow[@]}" &
    try networks networks_tried &
    python3 data.py --out "$work" "${pictures[@]}"
    log "drawn"
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" --prepare "${pool[@]}"
    done
    log "drawn for the other networks"
    wait
    log "tried"
}

networks_tried() {
    [ -e "$other/model/vae" ] && [ -e "$other/model/unet" ] || return 0
    python3 train_unet.py --work "$other" --model "$other/model" "$@" "${wide[@]}"
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$other" --model "$other/model" --scenes 64 "$@" "${medium[@]}"
    done
}

try() {
    local name=$1
    shift
    [ "$1" != "${1%.py}" ] && set -- python3 "$@"
    if "$@" "${few[@]}" >"$work/try-$name.txt" 2>&1; then
        log "$name: tried"
    else
        log "$name: not captured, see try-$name.txt"
        touch "$work/eager-$name"
    fi
}

vae() {
    local start=()
    [ ! -e "$folder" ] || start=(--start "$folder")
    trained "$(basename "$folder")" train_vae.py --work "$work" --latent-channels "$channels" "${start[@]}" "${time[@]}" "${narrow[@]}"
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
    trained networks train_unet.py --work "$work" --model "$model" "${warm[@]}" "${time[@]}" "${wide[@]}"
    python3 train_unet.py --work "$work" --model "$model" --export
    log "U-Net"
}

rest() {
    for task in instruct inpaint; do
        trained networks train_conditioned.py $task --work "$work" --model "$model" "${time[@]}" "${medium[@]}" "${pool[@]}" &
    done
    wait
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" --export
    done
    log "networks that look at a picture"
}

"$part"
