//! The device of the models: the CPU, or a GPU that is built in and present.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use burn::tensor::{Device, FloatDType};

use super::flags::Q8;
use super::terminal::Failure;

/// The values of `--device`: `auto`, the CPU, and GPUs through their cargo features.
pub(crate) const DEVICES: [&str; 6] = ["auto", "cpu", "cuda", "metal", "vulkan", "webgpu"];

/// GPU back ends of this program, the fastest first.
const BUILT_IN: &[&str] = &[
    #[cfg(feature = "cuda")]
    "cuda",
    #[cfg(feature = "metal")]
    "metal",
    #[cfg(feature = "vulkan")]
    "vulkan",
    #[cfg(feature = "webgpu")]
    "webgpu",
];

/// The back ends of this program.
pub(crate) fn built_in() -> impl Iterator<Item = &'static str> {
    std::iter::once("cpu").chain(BUILT_IN.iter().copied())
}

/// An available device.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Its name for `--device`.
    pub(crate) name: &'static str,
    pub(crate) device: Device,
    /// The name of the GPU.
    pub(crate) adapter: Option<String>,
}

impl Place {
    fn cpu() -> Self {
        Self {
            name: "cpu",
            device: Device::flex(),
            adapter: None,
        }
    }

    /// The device called `name`; `auto` is the first GPU, or the CPU if there is none.
    ///
    /// Software renderers run only if requested by name: the CPU back end is faster.
    pub(crate) fn named(name: &str) -> anyhow::Result<Self> {
        static AUTO: OnceLock<Place> = OnceLock::new();
        match name {
            "auto" => {
                let gpus = || BUILT_IN.iter().copied().find_map(|name| gpu(name, false));
                Ok(AUTO.get_or_init(|| gpus().unwrap_or_else(Self::cpu)).clone())
            }
            "cpu" => Ok(Self::cpu()),
            _ => match BUILT_IN.iter().find(|built_in| **built_in == name) {
                Some(name) => gpu(name, true).ok_or_else(|| {
                    let message = format!("device `{name}` finds no GPU on this machine");
                    let hint = "check the driver (for Vulkan: `vulkaninfo --summary`), or use `--device cpu`";
                    Failure::new(message).hint(hint).into()
                }),
                None => {
                    let message = format!("device `{name}` is not built into this program");
                    let hint = format!("build it with `cargo build --release --features {name}`");
                    Err(Failure::usage(message).hint(hint).into())
                }
            },
        }
    }
}

/// The first GPU that a back end reaches; a software renderer only if `software`.
#[cfg(feature = "gpu")]
fn gpu(name: &'static str, software: bool) -> Option<Place> {
    let device = match name {
        #[cfg(feature = "cuda")]
        "cuda" => (Device::enumerate(burn::tensor::DeviceType::Cuda)
            .iter()
            .next())
        .cloned(),
        #[cfg(feature = "metal")]
        "metal" => graphics(burn::tensor::DeviceType::Metal, Device::metal, software),
        #[cfg(feature = "vulkan")]
        "vulkan" => graphics(burn::tensor::DeviceType::Vulkan, Device::vulkan, software),
        #[cfg(feature = "webgpu")]
        "webgpu" => graphics(burn::tensor::DeviceType::Wgpu, Device::wgpu, software),
        _ => None,
    }?;
    let adapter = device.identity().map(|identity| identity.name);
    Some(Place {
        name,
        device,
        adapter,
    })
}

#[cfg(not(feature = "gpu"))]
fn gpu(_: &'static str, _: bool) -> Option<Place> {
    None
}

/// The best adapter of a graphics API.
#[cfg(any(feature = "metal", feature = "vulkan", feature = "webgpu"))]
fn graphics(
    api: burn::tensor::DeviceType,
    of_kind: impl Fn(burn::tensor::DeviceKind) -> Device,
    software: bool,
) -> Option<Device> {
    use burn::tensor::DeviceKind::{Cpu, DiscreteGpu, IntegratedGpu, VirtualGpu};

    let there = Device::enumerate(api);
    let hardware = [DiscreteGpu(0), IntegratedGpu(0), VirtualGpu(0)];
    let kinds = hardware.into_iter().chain(software.then_some(Cpu));
    let devices = kinds.map(of_kind).collect::<Vec<_>>();
    devices.into_iter().find(|device| there.contains(device))
}

/// The number format of weights called `dtype`, if `device` supports it.
pub(crate) fn number_format(dtype: &str, device: &str) -> anyhow::Result<FloatDType> {
    match (dtype, device) {
        ("f32", _) => Ok(FloatDType::F32),
        ("f16", _) => Ok(FloatDType::F16),
        // WebGPU has no such type; with Vulkan, products in it were infinite on an H100
        // (docs/performance.md).
        ("bf16", "vulkan" | "webgpu") => {
            let message = format!("dtype: bf16 is not supported on device `{device}`");
            let hint = "use `--dtype f16`";
            Err(Failure::usage(message).hint(hint).into())
        }
        ("bf16", _) => Ok(FloatDType::BF16),
        // What is not in 8 bits.
        (Q8, "cpu") => Ok(FloatDType::F16),
        (Q8, _) => {
            let message =
                format!("dtype: {Q8} is for the CPU, and not supported on device `{device}`");
            Err(Failure::usage(message)
                .hint("use `--device cpu`, or `--dtype f16`")
                .into())
        }
        _ => {
            let message = format!("dtype: expected f32, f16, bf16 or {Q8}, found `{dtype}`");
            Err(Failure::input(message).into())
        }
    }
}

/// Runs `work`. The back end panics on reading a result for which the GPU had no memory: this makes it an error.
pub(crate) fn with_memory_errors<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    /// Whether any thread ran out of memory: the back end's own threads do, and others panic as a result.
    static SEEN: AtomicBool = AtomicBool::new(false);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if ran_out_of_memory(info.payload()) {
                SEEN.store(true, Ordering::Relaxed);
            }
            if !SEEN.load(Ordering::Relaxed) {
                report(info);
            }
        }));
    });
    SEEN.store(false, Ordering::Relaxed);
    match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done,
        Err(_) if SEEN.swap(false, Ordering::Relaxed) => {
            let hint = "try `--dtype f16`, `--memory low` or a smaller `--resolution`, or run on the CPU \
                        with `--device cpu`";
            Err(
                Failure::temporary("the GPU has too little memory for this run")
                    .hint(hint)
                    .into(),
            )
        }
        Err(payload) => panic::resume_unwind(payload),
    }
}

/// Whether a panic, in the back end's words, means that a GPU is out of memory.
fn ran_out_of_memory(payload: &(dyn Any + Send)) -> bool {
    const WORDS: [&str; 3] = [
        "can't allocate buffer of size",
        "out of device memory",
        "wgpu error: Out of Memory",
    ];
    said(payload).is_some_and(|text| WORDS.iter().any(|words| text.contains(words)))
}

/// The message of a panic.
pub(crate) fn said(payload: &(dyn Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_a_device() {
        let place = Place::named("auto").unwrap();
        assert!(built_in().any(|name| name == place.name));
        assert_eq!(place.adapter.is_some(), place.name != "cpu");
        assert_eq!(Place::named("cpu").unwrap().device, Device::flex());
    }

    #[test]
    fn what_is_not_built_in_is_refused_with_the_feature_that_brings_it() {
        let missing = DEVICES[1..]
            .iter()
            .find(|name| !built_in().any(|built| built == **name));
        if let Some(name) = missing {
            let error = Place::named(name).unwrap_err();
            assert!(error.to_string().contains("is not built into"), "{error}");
        }
    }

    #[test]
    fn number_formats_that_a_device_lacks_are_refused() {
        assert_eq!(number_format("bf16", "cpu").unwrap(), FloatDType::BF16);
        assert_eq!(number_format("f16", "vulkan").unwrap(), FloatDType::F16);
        for device in ["vulkan", "webgpu"] {
            let error = number_format("bf16", device).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("dtype: bf16 is not supported on device `{device}`")
            );
        }
        let error = number_format("f8", "cpu").unwrap_err().to_string();
        assert_eq!(error, "dtype: expected f32, f16, bf16 or q8, found `f8`");
        assert_eq!(number_format(Q8, "cpu").unwrap(), FloatDType::F16);
        let error = number_format(Q8, "webgpu").unwrap_err().to_string();
        assert!(error.contains("q8 is for the CPU"), "{error}");
    }

    #[test]
    fn a_gpu_without_memory_is_an_error_and_other_panics_stay_panics() {
        let run = |text: &'static str| {
            panic::catch_unwind(|| with_memory_errors::<()>(|| panic!("{text}")))
        };
        for text in [
            "Error while reading data: can't allocate buffer of size: 268435200",
            "caused by: out of device memory allocating 1024 bytes",
            "wgpu error: Out of Memory",
        ] {
            let error = run(text).unwrap().unwrap_err();
            assert_eq!(
                error.to_string(),
                "the GPU has too little memory for this run"
            );
        }
        assert!(run("index out of bounds").is_err());
        assert!(with_memory_errors(|| Ok(())).is_ok());
    }
}
