//! The command-line program `dinv`.

mod cli;
#[cfg(feature = "serve")]
mod serve;

use std::process::ExitCode;

/// Models constantly allocate and free large buffers. Keeping freed pages makes the program about 1.6 times as fast
/// as with the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(unix)]
    set_environment();
    difference_inversion::on_workers(cli::main)
}

/// Settings that libraries read from the environment, before `main` or on their first call. Existing ones are kept.
#[cfg(unix)]
fn settings() -> Vec<(&'static str, &'static str)> {
    let unset = |name: &str| std::env::var_os(name).is_none();
    let mut settings = Vec::new();
    // Keeps freed memory for ten seconds instead of one. A step of a large model takes longer than one second, and
    // the system would clear all of its memory again, which takes a seventh of the step.
    settings.push(("MIMALLOC_PURGE_DELAY", "10000"));
    // Mesa's Vulkan drivers ask the display which GPU to list first. Without a display, they print an
    // error for each query.
    if unset("XDG_RUNTIME_DIR") {
        settings.push(("NODEVICE_SELECT", "1"));
    }
    settings.retain(|(name, _)| unset(name));
    settings
}

/// Restarts the program in the same process with [`settings`] in its environment, unless they are already set.
/// Setting a variable from within is unsafe, which this package forbids, and too late for the allocator.
/// Restarting takes 2 ms.
#[cfg(unix)]
fn set_environment() {
    use std::os::unix::process::CommandExt;
    let settings = settings();
    if settings.is_empty() {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let mut command = std::process::Command::new(program);
    let mut arguments = std::env::args_os();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // Returns only on failure; then everything still works, more slowly.
    let _error = command.args(arguments).envs(settings).exec();
}
