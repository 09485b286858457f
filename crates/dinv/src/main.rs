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
fn settings() -> Vec<(&'static str, String)> {
    let unset = |name: &str| std::env::var_os(name).is_none();
    let mut settings = Vec::new();
    // The cores that a process may use, by its control group and affinity, are the default. A task of Slurm need not be bound
    // to its own.
    let variable = |name: &str| std::env::var(name).ok();
    if let Some(cores) = cores_from_slurm(variable) {
        let available = std::thread::available_parallelism().map_or(cores, std::num::NonZero::get);
        settings.push(("RAYON_NUM_THREADS", cores.min(available).to_string()));
    }
    // Keeps freed memory for ten seconds instead of one. A step of a large model takes longer than one second, and
    // the system would clear all of its memory again, which takes a seventh of the step.
    settings.push(("MIMALLOC_PURGE_DELAY", "10000".to_owned()));
    // Mesa's Vulkan drivers ask the display which GPU to list first. Without a display, they print an
    // error for each query.
    if unset("XDG_RUNTIME_DIR") {
        settings.push(("NODEVICE_SELECT", "1".to_owned()));
    }
    settings.retain(|(name, _)| unset(name));
    settings
}

/// The cores of this task on this machine, by the variables that `sbatch` and `srun` set.
#[cfg(unix)]
fn cores_from_slurm(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
    let of_task = number("SLURM_CPUS_PER_TASK");
    // Such as `1`, or `1(x4)` on four nodes; of the step, or else of the job.
    let names = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
    let per_node = names.into_iter().find_map(&variable);
    let is_alone = per_node.is_none_or(|tasks| tasks == "1" || tasks.starts_with("1(x"));
    let of_node = || number("SLURM_CPUS_ON_NODE").filter(|_| is_alone);
    of_task.or_else(of_node).filter(|cores| *cores > 0)
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

#[cfg(all(test, unix))]
mod tests {
    use super::cores_from_slurm;

    #[test]
    fn a_task_of_slurm_uses_its_own_cores() {
        let cores = |variables: &[(&str, &str)]| {
            cores_from_slurm(|name| {
                let found = variables.iter().find(|(other, _)| *other == name)?;
                Some(found.1.to_owned())
            })
        };
        assert_eq!(cores(&[]), None);
        assert_eq!(
            cores(&[("SLURM_CPUS_PER_TASK", "4"), ("SLURM_CPUS_ON_NODE", "8")]),
            Some(4)
        );
        // An array's task that was given no number.
        assert_eq!(cores(&[("SLURM_CPUS_ON_NODE", "8")]), Some(8));
        for (tasks, expected) in [
            ("1", Some(8)),
            ("1(x4)", Some(8)),
            ("2", None),
            ("16", None),
        ] {
            let variables = [("SLURM_CPUS_ON_NODE", "8"), ("SLURM_TASKS_PER_NODE", tasks)];
            assert_eq!(cores(&variables), expected, "{tasks}");
        }
        assert_eq!(cores(&[("SLURM_CPUS_PER_TASK", "many")]), None);
        assert_eq!(cores(&[("SLURM_CPUS_PER_TASK", "0")]), None);
    }
}
