# `just` lists the recipes; every one is a command that can also be typed.

default:
    @just --list

# Everything CI checks.
check:
    bash .ci/run

# The tests of the libraries whose names contain FILTER, compiled incrementally after an edit. Not `-p`, which
# would compile the dependencies with other features.
test filter="":
    CARGO_INCREMENTAL=1 cargo test --release --features webgpu --lib --test library {{filter}}

# The built-in example, with the demo model.
demo:
    cargo run --release -- analogy --overwrite

# The pictures of README.md and docs/ (docs/images), or those of the SHEETS named: gallery, captions, strength, …
gallery *sheets:
    cargo build --release --bin dinv --example gallery
    cargo run --release --example gallery -- {{sheets}}

# The tiny pipeline on a GPU against the CPU (Vulkan, Metal or DirectX 12, or Mesa's software Vulkan).
gpu:
    cargo test --release --features webgpu --test library gpu::

# Everything for one run on a machine with a GPU, in one archive; benches/gpu/README.md.
gpu-day *flags:
    python3 benches/gpu/package.py {{flags}}

# One optimisation step, one call of the U-Net, and linear layers in every type of weights.
bench:
    cargo bench --bench learn
    cargo bench --bench unet
    cargo bench --bench products

# Accept what `--help` prints now, and the page of settings; look at the difference.
update-help:
    UPDATE_SNAPSHOTS=1 cargo test --release --features webgpu --test cli --bin dinv -- help reference
    git diff crates/dinv/tests/cli/snapshots docs/reference/settings.md

# Damaged files for as long as you like.
fuzz cases="100000":
    PROPTEST_CASES={{cases}} cargo test --release --features webgpu --test library fuzz::

# The program for any Linux on x86-64, without libraries: dist/dinv (Debian: musl-tools).
static:
    rustup target add x86_64-unknown-linux-musl
    DINV_WITHOUT_SOURCES=1 cargo build --release --locked --target x86_64-unknown-linux-musl --bin dinv
    install -D "${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-musl/release/dinv" dist/dinv

# Licences, advisories and sources of the dependencies (cargo install cargo-deny).
deny:
    cargo deny check

# The golden files again (Python with torch, diffusers and transformers).
golden:
    for script in training/reference/make_*.py; do python "$script" || exit 1; done

# The page of `dinv serve` in a real browser: every state at three widths, into OUT (Python with playwright and
# axe-playwright-python, and Chromium).
page out:
    cargo build --release --bin dinv
    python crates/dinv/tests/serve/page.py --out {{out}}

# `dinv batch` on a real Slurm, a real HyperQueue, in the container, and in parts on this machine, against one process (as root;
# Debian: slurmctld slurmd slurm-client munge buildah musl-tools; `pip install hyperqueue`).
cluster: static
    cargo build --release --bin dinv
    for engine in slurm hyperqueue efficiency; do python integrations/cluster/prove.py $engine || exit 1; done
    python integrations/cluster/prove.py container --program dist/dinv

# `dinv serve` killed 200 times, under 50 clients for two minutes, over 1000 jobs, with 10 000 queued, and with clients that
# do not read. `load.py full` needs root.
load:
    cargo build --release --bin dinv
    for kind in kills clients jobs posts slow; do python crates/dinv/tests/serve/load.py $kind || exit 1; done

# Whether diffusers draws with an exported difference what `dinv` draws (Python as above). `training/reference/readers.py` tries the
# readers of other programs, given their sources.
interop:
    cargo build --release --bin dinv
    python training/reference/interop.py

# Every family of models at full size, with random weights, against diffusers (Python as above; 20 GB
# of disk and of memory).
parity work:
    cargo build --release --bin dinv --example parity
    python training/reference/parity.py --work {{work}} --markdown docs/parity.md
