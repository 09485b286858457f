//! Facts about this process, from the system.

use std::fs;

/// Resets the peak memory of this process to its current memory, if the system supports it (Linux).
pub fn forget_peak_memory() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The peak memory (resident set) of this process in bytes, if the system reports it (Linux).
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::Command;

    use super::*;

    /// Marks the process that the test starts for itself.
    const ALONE: &str = "DINV_TEST_ALONE";

    /// In a process of its own: the memory that other tests free meanwhile would count, too.
    #[test]
    fn peak_memory_sees_what_was_there_for_a_moment() {
        if std::env::var_os(ALONE).is_none() {
            let name = "util::machine::tests::peak_memory_sees_what_was_there_for_a_moment";
            let done = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env(ALONE, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&done.stdout);
            assert!(done.status.success(), "{said}");
            assert!(said.contains("1 passed"), "{said}");
            return;
        }
        forget_peak_memory();
        let before = peak_memory().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|&byte| u64::from(byte)).sum::<u64>() > 0);
        drop(block);
        assert!(peak_memory().unwrap() >= before + (50 << 20));
    }
}
