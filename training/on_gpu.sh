#!/usr/bin/env bash
# The autoencoders and everything that stands on them, on one GPU, in about twelve minutes.
#
#     bash on_gpu.sh autoencoders WORK MODEL [SECONDS SECONDS SECONDS]  4 channels, 16 channels, each decoder alone
#     bash on_gpu.sh networks WORK MODEL [SECONDS SECONDS]               the U-Net, all that starts from it
#
# MODEL is a folder with the tokenizer and the text encoder, demo/model say. Times are those of training
# alone. `SMALL=1` rehearses every command on a CPU with a handful of pictures.
set -euo pipefail
cd "$(dirname "$0")"
part=$1 work=$2 model=$3
if [ -n "${SMALL:-}" ]; then
    pictures=(--count 64) pool=(--scenes 24) wide=(--batch 16) thin=(--batch 4)
    first=(--steps 2) second=(--steps 2) third=(--steps 4)
else
    pictures=() pool=() wide=(--batch 512) thin=(--batch 256)
    first=(--steps 1000000 --seconds "$4") second=(--steps 1000000 --seconds "$5")
    third=(--steps 1000000 --seconds "${6:-60}")
fi
log() { echo "$(date +%T) $*"; }

autoencoders() {
    python3 data.py --out "$work" "${pictures[@]}"
    log "drawn"
    warm_up >"$work/warm-up.txt" 2>&1 &
    python3 train_vae.py --work "$work" "${first[@]}" "${thin[@]/256/64}"
    python3 train_vae.py --work "$work" --export "$model/vae"
    log "autoencoder"
    python3 train_vae.py --work "$work" --latent-channels 16 --start "$model/vae" "${second[@]}" "${thin[@]/256/64}"
    python3 train_vae.py --work "$work" --latent-channels 16 --export "$model/vae16"
    log "autoencoder of 16 channels"
    for vae in vae vae16; do
        python3 train_decoder.py --work "$work" --vae "$model/$vae" "${third[@]}" "${thin[@]/256/64}"
        python3 train_decoder.py --work "$work" --vae "$model/$vae" --export "$model/$vae"
    done
    log "decoders"
}

# What comes later is compiled while the first autoencoder is trained; PyTorch keeps it on disk.
warm_up() {
    local other=$work/warm-up
    mkdir -p "$other"
    python3 data.py --out "$other" --count 1024
    cp -r "$model" "$other/model"
    python3 train_vae.py --work "$other" --latent-channels 16 --start "$model/vae" --steps 2 "${thin[@]/256/64}" || true
    python3 train_unet.py --work "$other" --model "$other/model" --steps 2 "${wide[@]}" || true
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$other" --model "$other/model" --scenes 64 --steps 2 "${thin[@]}" || true
    done
    rm -rf "$other"
    log "warm"
}

networks() {
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" --prepare "${pool[@]}" &
    done
    python3 train_unet.py --work "$work" --model "$model" "${first[@]}" "${wide[@]}"
    wait
    python3 train_unet.py --work "$work" --model "$model" --export
    log "U-Net"
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" "${second[@]}" "${thin[@]}" "${pool[@]}" &
    done
    python3 train_captioner.py --work "$work" "${second[@]}" "${thin[@]}"
    wait
    for task in instruct inpaint; do
        python3 train_conditioned.py $task --work "$work" --model "$model" --export
    done
    python3 train_captioner.py --work "$work" --export "$model/captioner" || log "the captioner is not exported: export it where transformers is new enough"
    log "all"
}

"$part"
