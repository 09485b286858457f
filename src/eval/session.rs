//! Making and measuring one B′ after the other.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use image::RgbImage;
use sha2::{Digest, Sha256};

use super::suite::Entry;
use super::{Analogy, Folder, Measures, Method, ResultRecord, Scores, Status};
use crate::progress::Observer;
use crate::{Error, Result};

/// What every analogy of a run has in common.
#[derive(Debug)]
pub struct Session {
    /// The networks of metrics.
    pub measures: Measures,
    /// SHA-256 of these.
    pub measured_with: BTreeMap<String, String>,
    /// Where results are kept.
    pub folder: Folder,
    /// The seed of the run.
    pub seed: u64,
}

impl Session {
    /// Makes, measures and keeps the B′ of one analogy by the method called `name`, unless it is
    /// there already. What is there but was measured with other networks is measured again. A
    /// failure of the analogy is a result.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the observer asks to stop, and [`Error::Io`] if the result cannot be
    /// kept.
    pub fn solve(
        &self,
        name: &str,
        method: &dyn Method,
        entry: &Entry,
        observer: Observer<'_>,
    ) -> Result<ResultRecord> {
        if let Some(mut result) = self.finished(name, entry) {
            if result.measured_with != self.measured_with {
                let b_prime = self.folder.b_prime(name, &entry.name)?;
                result.scores = self.measures.measure(&entry.read()?, &b_prime)?;
                result.measured_with.clone_from(&self.measured_with);
                self.folder.keep(name, &result, None)?;
            }
            return Ok(result);
        }
        let mut result = ResultRecord::begun(entry, self.seed, &self.measured_with);
        let analogy = entry.read();
        forget_peak_memory();
        let started = Instant::now();
        let made = analogy.and_then(|analogy| {
            let b_prime = method.solve(&analogy, result.seed, observer)?;
            Ok((analogy, b_prime))
        });
        result.seconds = (started.elapsed().as_secs_f64() * 1e3).round() / 1e3;
        result.peak_memory = peak_memory();
        let measured = made.and_then(|(analogy, b_prime)| self.measured(&analogy, b_prime));
        match measured {
            Ok((scores, b_prime)) => {
                result.scores = scores;
                self.folder.keep(name, &result, Some(&b_prime))?;
            }
            Err(error @ Error::Stopped { .. }) => return Err(error),
            Err(error) => {
                result.status = Status::Failed(error.to_string());
                self.folder.keep(name, &result, None)?;
            }
        }
        Ok(result)
    }

    fn measured(&self, analogy: &Analogy, b_prime: RgbImage) -> Result<(Scores, RgbImage)> {
        Ok((self.measures.measure(analogy, &b_prime)?, b_prime))
    }

    /// The result of an analogy that need not be made again.
    pub fn finished(&self, name: &str, entry: &Entry) -> Option<ResultRecord> {
        let result = self.folder.result(name, &entry.name)?;
        (result.status == Status::Done).then_some(result)
    }
}

impl ResultRecord {
    /// The result of an analogy that nothing is known of yet but the seed of the run.
    pub fn begun(entry: &Entry, seed: u64, measured_with: &BTreeMap<String, String>) -> Self {
        Self {
            name: entry.name.clone(),
            kind: entry.kind.clone(),
            changes: entry.changes(),
            status: Status::Done,
            seed: seed_of(seed, &entry.name),
            seconds: 0.0,
            peak_memory: None,
            measured_with: measured_with.clone(),
            scores: Scores::new(),
        }
    }
}

/// The seed of an analogy: the first four bytes of SHA-256 of the run's seed and the analogy's
/// name, so that no two draw the same noise, and every method draws the same for the same analogy.
fn seed_of(seed: u64, name: &str) -> u64 {
    let digest = Sha256::digest(format!("{seed}/{name}"));
    digest[..4]
        .iter()
        .fold(0, |seed, &byte| seed << 8 | u64::from(byte))
}

/// Makes the peak memory of this process what it is now, where the system can (Linux).
fn forget_peak_memory() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The most memory (resident set) of this process since then, in bytes; nothing where the system
/// does not tell.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_between_analogies_and_are_small_enough_for_any_reader() {
        let seeds: Vec<u64> = ["000", "001"].map(|name| seed_of(0, name)).to_vec();
        assert_ne!(seeds[0], seeds[1]);
        assert_ne!(seed_of(1, "000"), seeds[0]);
        assert!(seeds.iter().all(|&seed| seed <= u64::from(u32::MAX)));
        assert_eq!(seed_of(0, "000"), seeds[0]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_memory_sees_what_was_there_for_a_moment() {
        forget_peak_memory();
        let before = peak_memory().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|&byte| u64::from(byte)).sum::<u64>() > 0);
        drop(block);
        assert!(peak_memory().unwrap() >= before + (50 << 20));
    }
}
