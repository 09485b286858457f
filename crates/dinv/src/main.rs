//! The command-line program `dinv`.

mod cli;

use std::process::ExitCode;

/// The models allocate and free large buffers all the time; keeping freed pages makes the whole
/// program about 1.6 times as fast as the system's allocator does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(unix)]
    keep_freed_memory();
    difference_inversion::on_workers(cli::main)
}

/// Starts the program anew, in the same process, with the allocator told to keep freed memory for
/// ten seconds in place of one. An optimisation step of a large model takes longer than one, and
/// would have all of its memory cleared by the system again, which takes a seventh of its time.
///
/// The allocator takes its settings from the environment, before `main`. One that is set stays. The call that
/// changes them later (`mi_option_set`) is unsafe, which this package forbids; there is neither a safe wrapper nor an
/// option of the build. Starting anew takes 2 ms.
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
    // Comes back only where it fails, and then everything works all the same, if more slowly.
    let _error = command.args(arguments).env(SETTING, MILLISECONDS).exec();
}
