//! Makes and measures one B′ after another.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use difference_inversion::diffusion::pipeline::evaluations;
use difference_inversion::util::arrays::Arrays;
use difference_inversion::util::machine::forget_peak_memory;
use difference_inversion::util::machine::peak_memory;
use difference_inversion::util::progress::Observer;
use difference_inversion::{Error, Result};
use image::RgbImage;
use sha2::{Digest, Sha256};

use super::folder::provenance;
use super::suite::Entry;
use super::{Analogy, Folder, Measures, Method, ResultRecord, Scores, Status};

/// What all analogies of a run share.
#[derive(Debug)]
pub struct Session {
    /// What determines the results of the method: [`RunRecord::made_with`](super::RunRecord::made_with).
    pub made_with: BTreeMap<String, String>,
    /// The networks of metrics.
    pub measures: Measures,
    /// SHA-256 of these networks.
    pub measured_with: BTreeMap<String, String>,
    /// Where results are kept.
    pub folder: Folder,
    /// The seed of the run.
    pub seed: u64,
}

impl Session {
    /// Makes, measures and stores the B′ of one analogy by the method called `name`, unless it exists.
    /// An existing B′ is measured with networks that have not measured it yet. Scores by networks that
    /// are not given stay, and so do all scores if measuring fails. A failure of the analogy is also a
    /// result.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the observer asks to stop, and [`Error::Io`] if the result cannot be
    /// stored.
    pub fn solve(
        &self,
        name: &str,
        method: &dyn Method,
        entry: &Entry,
        observer: Observer<'_>,
    ) -> Result<ResultRecord> {
        if let Some(mut result) = self.folder.finished(name, &entry.name) {
            let networks = result.not_measured_with(&self.measured_with);
            if !networks.is_empty() {
                match self.measure_by(&networks, name, entry) {
                    Ok(scores) => {
                        result.measured_again(&networks, &self.measured_with, scores);
                        self.folder.keep(name, &result, None)?;
                    }
                    Err(error) => result.status = Status::Failed(error.to_string()),
                }
            }
            return Ok(result);
        }
        let mut result = ResultRecord::begun(entry, self.seed, &self.measured_with);
        result.made_with.clone_from(&self.made_with);
        let started = Instant::now();
        let made = entry.identity().and_then(|pictures| {
            let name = provenance::PICTURES.to_owned();
            result.made_with.insert(name, pictures.clone());
            self.made(method, entry, &pictures, result.seed, observer)
        });
        match made {
            Ok((analogy, b_prime, cost)) => {
                (result.seconds, result.peak_memory) = (cost.seconds, cost.peak_memory);
                result.evaluations = cost.evaluations;
                match self.measures.measure(&analogy, &b_prime) {
                    Ok(scores) => {
                        result.scores = scores;
                        self.folder.keep(name, &result, Some(&b_prime))?;
                    }
                    // What was drawn is kept, to be measured when the network's files are in order.
                    Err(error) => {
                        result.measured_with.clear();
                        self.folder.keep(name, &result, Some(&b_prime))?;
                        result.status = Status::Failed(error.to_string());
                    }
                }
            }
            Err(error @ Error::Stopped { .. }) => return Err(error),
            Err(error) => {
                result.seconds = thousandths(started.elapsed().as_secs_f64());
                result.status = Status::Failed(error.to_string());
                self.folder.keep(name, &result, None)?;
            }
        }
        Ok(result)
    }

    /// The scores of the existing B′ by these networks.
    fn measure_by(&self, networks: &BTreeSet<&str>, name: &str, entry: &Entry) -> Result<Scores> {
        let b_prime = self.folder.b_prime(name, &entry.name)?;
        self.measures.measure_by(networks, &entry.read()?, &b_prime)
    }

    /// The analogy, whose pictures have this identity, its B′ and the cost of both learning and drawing.
    fn made(
        &self,
        method: &dyn Method,
        entry: &Entry,
        pictures: &str,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<(Analogy, RgbImage, Cost)> {
        let analogy = entry.read()?;
        let (learned, learning) = self.learned(method, &analogy, pictures, seed, &mut *observer)?;
        let (b_prime, drawing) = Cost::of(|| method.draw(&analogy, &learned, seed, observer))?;
        Ok((analogy, b_prime, learning.and(drawing)))
    }

    /// What a method learns from an analogy, and its cost. Both are read from the folder if a method that
    /// learns the same from the same pictures ran before.
    fn learned(
        &self,
        method: &dyn Method,
        analogy: &Analogy,
        pictures: &str,
        seed: u64,
        observer: Observer<'_>,
    ) -> Result<(Arrays, Cost)> {
        let Some(learning) = method.learning() else {
            return Ok((Arrays::default(), Cost::NONE));
        };
        let path = self.folder.learned(&learning, &analogy.name);
        let same = |arrays: &Arrays| {
            let from = arrays.metadata.get(provenance::PICTURES);
            from.is_none_or(|from| from == pictures)
        };
        let kept = Arrays::read(&path).ok().filter(same);
        if let Some((arrays, cost)) =
            kept.and_then(|arrays| Cost::noted(&arrays).map(|cost| (arrays, cost)))
        {
            return Ok((arrays, cost));
        }
        let (learned, cost) = Cost::of(|| method.learn(analogy, seed, observer))?;
        let learned = learned
            .with_metadata("learning", learning.to_string())
            .with_metadata(provenance::PICTURES, pictures);
        let learned = cost.note(learned);
        self.folder.keep_learned(&path, &learned)?;
        Ok((learned, cost))
    }
}

impl ResultRecord {
    /// The result of an analogy of which only the run's seed is known yet.
    pub fn begun(entry: &Entry, seed: u64, measured_with: &BTreeMap<String, String>) -> Self {
        Self {
            name: entry.name.clone(),
            kind: entry.kind.clone(),
            changes: entry.changes(),
            edit: entry.edit(),
            status: Status::Done,
            seed: seed_of(seed, &entry.name),
            seconds: 0.0,
            evaluations: None,
            peak_memory: None,
            made_with: BTreeMap::new(),
            measured_with: measured_with.clone(),
            scores: Scores::new(),
        }
    }
}

/// The cost of some work.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// Time, rounded to thousandths of a second.
    seconds: f64,
    /// Latents that passed through the denoiser; unknown for what older programs learned.
    evaluations: Option<u64>,
    /// The peak memory of the process in bytes, if the system reports it.
    peak_memory: Option<u64>,
}

impl Cost {
    /// That of nothing.
    const NONE: Self = Self {
        seconds: 0.0,
        evaluations: Some(0),
        peak_memory: None,
    };

    /// Does some work and measures its cost.
    fn of<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Self)> {
        forget_peak_memory();
        let (started, before) = (Instant::now(), evaluations());
        let done = work()?;
        let cost = Self {
            seconds: thousandths(started.elapsed().as_secs_f64()),
            evaluations: Some(evaluations() - before),
            peak_memory: peak_memory(),
        };
        Ok((done, cost))
    }

    /// The cost of one after the other.
    fn and(self, then: Self) -> Self {
        Self {
            seconds: thousandths(self.seconds + then.seconds),
            evaluations: self
                .evaluations
                .zip(then.evaluations)
                .map(|(one, other)| one + other),
            peak_memory: self.peak_memory.max(then.peak_memory),
        }
    }

    /// Writes it to the metadata of the result.
    fn note(self, arrays: Arrays) -> Arrays {
        let counts = [
            ("evaluations", self.evaluations),
            ("peak_memory", self.peak_memory),
        ];
        (counts.into_iter()).fold(
            arrays.with_metadata("seconds", self.seconds.to_string()),
            |arrays, (name, count)| match count {
                Some(count) => arrays.with_metadata(name, count.to_string()),
                None => arrays,
            },
        )
    }

    /// Reads it from the metadata.
    fn noted(arrays: &Arrays) -> Option<Self> {
        let noted = |name: &str| arrays.metadata.get(name);
        Some(Self {
            seconds: noted("seconds")?.parse().ok()?,
            evaluations: noted("evaluations").and_then(|count| count.parse().ok()),
            peak_memory: noted("peak_memory").and_then(|bytes| bytes.parse().ok()),
        })
    }
}

fn thousandths(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// The seed of an analogy: the first four bytes of SHA-256 of the run's seed and the analogy's name.
/// Different analogies draw different noise, and every method draws the same for the same analogy.
fn seed_of(seed: u64, name: &str) -> u64 {
    let digest = Sha256::digest(format!("{seed}/{name}"));
    digest[..4]
        .iter()
        .fold(0, |seed, &byte| seed << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::tensor::Device;
    use serde_json::{Value, json};

    use super::*;
    use crate::{MeasurePaths, Told, Variant, build, tiny};
    use difference_inversion::util::arrays::Array;

    #[test]
    fn seeds_differ_between_analogies_and_are_small_enough_for_any_reader() {
        let seeds: Vec<u64> = ["000", "001"].map(|name| seed_of(0, name)).to_vec();
        assert_ne!(seeds[0], seeds[1]);
        assert_ne!(seed_of(1, "000"), seeds[0]);
        assert!(seeds.iter().all(|&seed| seed <= u64::from(u32::MAX)));
        assert_eq!(seed_of(0, "000"), seeds[0]);
    }

    #[test]
    fn what_cannot_be_measured_again_stays_as_it_is() {
        let place = tempfile::tempdir().unwrap();
        let models = tiny::eval_models();
        let entry = tiny::entry();
        let mut session = Session {
            made_with: BTreeMap::new(),
            measures: Measures::open(&MeasurePaths::default(), &models, &Device::flex()).unwrap(),
            measured_with: BTreeMap::new(),
            folder: Folder::at(place.path()),
            seed: 0,
        };
        let variant = Variant {
            settings: tiny::settings(&json!({"num_inference_steps": 2})),
            ..Variant::plain("instruct-pix2pix")
        };
        let method = build(&variant, &models).unwrap();
        let solve = |session: &Session| {
            let solved = session.solve("m", &*method, &entry, &mut tiny::silent);
            solved.unwrap()
        };
        let first = solve(&session);
        assert_eq!(first.status, Status::Done);
        assert_eq!(first.evaluations, Some(6)); // three rows in each of two steps
        session.measured_with = BTreeMap::from([("lpips".to_owned(), "new".to_owned())]);
        let b_prime = place.path().join(Folder::b_prime_name("m", &entry.name));
        let picture = fs::read(&b_prime).unwrap();
        fs::write(&b_prime, "no picture").unwrap();
        assert!(matches!(solve(&session).status, Status::Failed(_)));
        assert_eq!(
            session.folder.finished("m", &entry.name),
            Some(first.clone())
        );
        fs::write(&b_prime, picture).unwrap();
        let again = solve(&session);
        assert_eq!(
            (again.seconds, &again.scores),
            (first.seconds, &first.scores)
        );
        assert_eq!(again.measured_with, session.measured_with);
        assert_eq!(session.folder.finished("m", &entry.name), Some(again));
    }

    /// Counts its calls, and learns nothing else.
    struct Counts(AtomicUsize);

    impl Method for Counts {
        fn settings(&self) -> Value {
            json!({})
        }

        fn told(&self) -> Told {
            Told::Nothing
        }

        fn learning(&self) -> Option<Value> {
            Some(json!("times"))
        }

        fn learn(&self, _: &Analogy, _: u64, _: Observer<'_>) -> Result<Arrays> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Arrays::default().with("x", Array::floats([1], vec![1.0])))
        }

        fn draw(&self, _: &Analogy, _: &Arrays, _: u64, _: Observer<'_>) -> Result<RgbImage> {
            Err(Error::invalid_input("no luck"))
        }
    }

    #[test]
    fn what_was_learned_from_other_pictures_is_learned_again() {
        let place = tempfile::tempdir().unwrap();
        let models = tiny::eval_models();
        let session = Session {
            made_with: BTreeMap::from([("seed".to_owned(), "0".to_owned())]),
            measures: Measures::open(&MeasurePaths::default(), &models, &Device::flex()).unwrap(),
            measured_with: BTreeMap::new(),
            folder: Folder::at(place.path()),
            seed: 0,
        };
        let mut entry = tiny::entry();
        let method = Counts(0.into());
        let times_after = |entry: &Entry| {
            let result = session
                .solve("m", &method, entry, &mut tiny::silent)
                .unwrap();
            assert!(matches!(result.status, Status::Failed(_)));
            assert_eq!(result.made_with["seed"], "0");
            let pictures = &result.made_with[provenance::PICTURES];
            assert_eq!(*pictures, entry.identity().unwrap());
            method.0.load(Ordering::Relaxed)
        };
        assert_eq!([times_after(&entry), times_after(&entry)], [1, 1]);
        entry.pictures.swap(0, 1);
        assert_eq!(times_after(&entry), 2);
    }
}
