//! The command-line program `dinv`.

mod cli;

use std::process::ExitCode;

/// Models allocate and free large buffers all the time. Keeping freed pages makes the program about 1.6 times as fast as
/// with the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(unix)]
    keep_freed_memory();
    difference_inversion::on_workers(cli::main)
}

/// Restarts the program in the same process, with the allocator set to keep freed memory for ten seconds instead of
/// one. A step of a large model takes longer than one second. The system would clear all of its memory again, which
/// takes a seventh of the step.
///
/// The allocator reads its settings from the environment before `main`. A setting that exists is kept. The call that
/// changes them later (`mi_option_set`) is unsafe, which this package forbids; there is neither a safe wrapper nor a
/// build option. Restarting takes 2 ms.
#[cfg(unix)]
fn keep_freed_memory() {
    use std::os::unix::process::CommandExt;
    const SETTING: &str = "MIMALLOC_PURGE_DELAY";
    const MILLISECONDS: &str = "10000";
    if std::env::var_os(SETTING).is_some() {
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
    // Returns only if it fails; then everything still works, more slowly.
    let _error = command.args(arguments).env(SETTING, MILLISECONDS).exec();
}
