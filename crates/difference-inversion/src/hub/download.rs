//! Bringing a repository's files into the cache.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::diffusion::family::{self, Family};
use crate::diffusion::model_files::{FileOptions, MODEL_INDEX, ModelFiles};
use crate::diffusion::pipeline::Pipeline;
use crate::hub::cache::RepoCache;
use crate::hub::client::{Answer, Client, Listing, RemoteFile, is_digest, reason};
use crate::hub::partial::Partial;
use crate::hub::plan::{self, Plan};
use crate::hub::{Hub, HubProblem, ModelId, Wanted};
use crate::util::progress::{self, Observer, Stage};
use crate::{Error, Result};

/// How long to wait before each further attempt at what did not bring a single byte.
const WAITS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(4),
];
/// The longest wait that the Hub may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How often a wait looks whether it should stop.
const TICK: Duration = Duration::from_millis(100);
/// Bytes read at once.
const CHUNK: usize = 256 << 10;

/// One download of a repository.
struct Download<'a> {
    id: &'a ModelId,
    client: Client<'a>,
    cache: RepoCache,
    commit: String,
    observer: Observer<'a>,
    /// Bytes of the files that are finished, of those that were not there at the start.
    finished: u64,
    /// The same with those of the file that is coming.
    done: u64,
    /// Bytes of all files that were not there.
    total: u64,
}

/// Brings a revision into the cache; gives the folder of its snapshot.
pub(super) fn pull(
    hub: &Hub,
    id: &ModelId,
    wanted: Wanted<'_>,
    observer: Observer<'_>,
) -> Result<PathBuf> {
    let mut download = Download {
        id,
        client: Client::new(hub, id),
        cache: RepoCache::new(&hub.cache, id),
        commit: String::new(),
        observer,
        finished: 0,
        done: 0,
        total: 0,
    };
    let listing = download.patiently(|this| this.client.listing().map_err(|it| it.of(id)))?;
    let files = choose(listing, wanted, &mut download.commit).map_err(|it| it.of(id))?;
    download.all(&files)?;
    let snapshot = download.cache.snapshot(&download.commit);
    let all_variants = Wanted {
        variant: None,
        ..wanted
    };
    match plan::missing(&snapshot, all_variants) {
        missing if missing.is_empty() => Ok(snapshot),
        missing => Err(unusable(&missing).of(id)),
    }
}

/// The files of a listing that are needed.
fn choose(
    listing: Listing,
    wanted: Wanted<'_>,
    commit: &mut String,
) -> std::result::Result<Vec<RemoteFile>, HubProblem> {
    let paths = listing.files.iter().map(|file| file.path.clone());
    let plan = Plan::new(&paths.collect(), None, wanted);
    if !plan.missing.is_empty() {
        return Err(unusable(&plan.missing));
    }
    *commit = listing.commit;
    let files = listing.files.into_iter();
    Ok(files
        .filter(|file| plan.files.contains(&file.path))
        .collect())
}

fn unusable(missing: &[String]) -> HubProblem {
    HubProblem::Unusable {
        reason: format!("it has no {}", missing.join(", no ")),
    }
}

impl Download<'_> {
    /// Brings all files, then makes the snapshot, then the name of the revision.
    fn all(&mut self, planned: &[RemoteFile]) -> Result<()> {
        self.cache.prepare()?;
        // What is a file there, and not a link, was put there by a program that could make no links.
        let is_linked = |file: &&RemoteFile| !self.cache.holds(&self.commit, &file.path, file.size);
        let mut files: Vec<&RemoteFile> = planned.iter().filter(is_linked).collect();
        // Files that show whether the model can be used come before its weights.
        files.sort_by_key(|file| (file.path != MODEL_INDEX, is_weights(file)));
        let mut counted = BTreeSet::new(); // files with the same contents are one blob
        for &file in &files {
            let first = file.blob.is_none() || counted.insert(&file.blob);
            if first && !self.is_there(file) {
                self.total += file.size.unwrap_or(0);
            }
        }
        let weights = files.iter().position(|file| is_weights(file));
        let mut blobs = Vec::new();
        for (number, &file) in files.iter().enumerate() {
            if Some(number) == weights {
                self.check_configs(files.iter().zip(&blobs), planned)?;
            }
            let blob = match &file.blob {
                Some(blob) if self.is_there(file) => blob.clone(),
                _ => self.patiently(|this| this.receive(file))?,
            };
            if file.path == MODEL_INDEX {
                check_class(&self.cache.blob(&blob)).map_err(|it| it.of(self.id))?;
            }
            blobs.push(blob);
        }
        for (file, blob) in files.iter().zip(&blobs) {
            self.cache.link(&self.commit, &file.path, blob)?;
        }
        self.cache.set_reference(self.id.revision(), &self.commit)
    }

    /// Refuses a pipeline whose configurations tell that it cannot be opened, before its weights come:
    /// those that have come, with the names of their blobs, and those that were there.
    fn check_configs<'f>(
        &self,
        come: impl Iterator<Item = (&'f &'f RemoteFile, &'f String)>,
        planned: &[RemoteFile],
    ) -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
        let copy = |from: PathBuf, path: &str| {
            let to = folder.path().join(path);
            let above = to.parent().unwrap_or(folder.path());
            std::fs::create_dir_all(above).map_err(Error::io(above))?;
            std::fs::copy(from, &to).map(|_| ()).map_err(Error::io(&to))
        };
        for (file, blob) in come {
            copy(self.cache.blob(blob), &file.path)?;
        }
        for file in planned.iter().filter(|file| !is_weights(file)) {
            if self.cache.holds(&self.commit, &file.path, file.size) {
                let there = self.cache.snapshot(&self.commit).join(&file.path);
                copy(there, &file.path)?;
            }
        }
        if !folder.path().join(MODEL_INDEX).is_file() {
            return Ok(());
        }
        let files = ModelFiles::open(folder.path(), &FileOptions::default())?;
        Pipeline::check_configs(&files).map_err(|error| {
            let place = format!("{}/", folder.path().display());
            let reason = error.to_string().replace(&place, "");
            HubProblem::Unusable { reason }.of(self.id)
        })
    }

    fn is_there(&self, file: &RemoteFile) -> bool {
        let blob = file.blob.as_deref();
        blob.is_some_and(|blob| self.cache.blob(blob).is_file())
    }

    /// Brings one file; gives the name of its blob.
    fn receive(&mut self, file: &RemoteFile) -> Result<String> {
        let mut answer = None;
        let blob = match &file.blob {
            Some(blob) => blob.clone(),
            None => {
                let opened = self.open(file, 0)?;
                let etag = opened.etag.clone().filter(|etag| is_digest(etag));
                answer = Some(opened);
                etag.ok_or_else(|| {
                    let reason = format!("{} comes without a digest (ETag)", file.path);
                    HubProblem::protocol(reason).of(self.id)
                })?
            }
        };
        let lock = self.lock(file, &blob)?;
        let target = self.cache.blob(&blob);
        if let (true, Ok(data)) = (target.is_file(), target.metadata()) {
            self.finished += data.len(); // another program brought it
            self.done = self.finished;
            self.step()?;
            return Ok(blob);
        }
        let path = self.cache.blob(&format!("{blob}.incomplete"));
        let mut partial = Partial::open(path.clone()).map_err(Error::io(&path))?;
        if answer.is_some() || file.size.is_none_or(|size| partial.len() > size) {
            partial.restart().map_err(Error::io(&path))?;
        }
        let resumed = partial.len() > 0;
        self.done = self.finished + partial.len();
        let mut size = file.size;
        if size != Some(partial.len()) {
            size = self.stream(file, &mut partial, answer)?;
        }
        if let Err(problem) = check(file, &blob, size, &partial) {
            partial.discard().map_err(Error::io(&path))?;
            drop(lock);
            // What an earlier attempt left may have been damaged on this disk.
            return match resumed {
                true => self.receive(file),
                false => Err(problem.of(self.id)),
            };
        }
        self.finished += partial.len();
        partial.finish(&target).map_err(Error::io(&target))?;
        drop(lock);
        Ok(blob)
    }

    /// Appends what comes; gives the size that the file should have.
    fn stream(
        &mut self,
        file: &RemoteFile,
        partial: &mut Partial,
        answer: Option<Answer>,
    ) -> Result<Option<u64>> {
        let mut answer = match answer {
            Some(answer) => answer,
            None => self.open(file, partial.len())?,
        };
        if answer.start != partial.len() {
            let restarted = partial.restart();
            restarted.map_err(Error::io(partial.path()))?;
            self.done = self.finished;
        }
        let size = file.size.or(answer.size);
        let broken = |partial: &Partial, reason: String| HubProblem::Interrupted {
            file: file.path.clone(),
            done: partial.len(),
            total: size.unwrap_or(partial.len()),
            reason,
        };
        self.step()?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = match answer.body.read(&mut chunk) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(broken(partial, reason(&error)).of(self.id)),
            };
            if count == 0 {
                break;
            }
            if let Err(source) = partial.append(&chunk[..count]) {
                let problem = HubProblem::Write {
                    path: partial.path().to_owned(),
                    left: self.total.saturating_sub(self.done),
                    source,
                };
                return Err(problem.of(self.id));
            }
            self.done += count as u64;
            if size.is_some_and(|size| partial.len() > size) {
                break; // `check` reports what is wrong with it
            }
            self.step()?;
        }
        if size.is_some_and(|size| partial.len() < size) {
            return Err(broken(partial, "the other side closed it".to_owned()).of(self.id));
        }
        Ok(size)
    }

    fn open(&self, file: &RemoteFile, start: u64) -> Result<Answer> {
        let answer = self.client.open(&self.commit, &file.path, start);
        answer.map_err(|problem| problem.of(self.id))
    }

    /// Waits until no other program writes the same blob.
    fn lock(&mut self, file: &RemoteFile, blob: &str) -> Result<File> {
        let lock = self.cache.lock_file(blob)?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) if !told => {
                    let notice = format!("waiting for another download of {}", file.path);
                    progress::notice(&mut *self.observer, notice);
                    told = true;
                }
                Err(TryLockError::WouldBlock) => {
                    self.step()?;
                    sleep(TICK);
                }
                // A file system without locks is no reason not to download.
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(lock),
            }
        }
    }

    /// Repeats what fails for a reason that may pass, as long as it gets further.
    fn patiently<T>(&mut self, work: impl Fn(&mut Self) -> Result<T>) -> Result<T> {
        let mut waits = WAITS.into_iter();
        loop {
            let before = self.done;
            let error = match work(self) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if self.done > before {
                waits = WAITS.into_iter();
            }
            let wait = match (&error, waits.next()) {
                (Error::Hub { problem, .. }, Some(wait)) if problem.may_pass() => match problem {
                    HubProblem::TooMany { seconds } => seconds.map_or(wait, Duration::from_secs),
                    _ => wait,
                },
                _ => return Err(error),
            };
            if wait > LONGEST_WAIT {
                return Err(error);
            }
            progress::notice(&mut *self.observer, format!("{error}; trying again"));
            let until = Instant::now() + wait;
            while Instant::now() < until {
                sleep(TICK);
                self.step()?;
            }
        }
    }

    /// Reports how many bytes are there, once it is known how many there will be.
    fn step(&mut self) -> Result<()> {
        if self.total == 0 {
            return Ok(());
        }
        let count = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let (done, total) = (count(self.done), count(self.total.max(self.done)));
        progress::step(&mut *self.observer, Stage::Download, done, total)
    }
}

/// Whether a file is large.
fn is_weights(file: &RemoteFile) -> bool {
    file.path.ends_with(".safetensors")
}

/// Refuses a pipeline of a class that cannot be opened, by its `model_index.json`.
fn check_class(index: &Path) -> std::result::Result<(), HubProblem> {
    let index: serde_json::Value = (std::fs::read(index).ok())
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    match index["_class_name"].as_str() {
        Some(class) if Family::of_class(class).is_none() => Err(HubProblem::Unusable {
            reason: format!("it is a {class}, not a {}", family::classes()),
        }),
        _ => Ok(()),
    }
}

/// Checks size and, where the name of the blob is one, SHA-256.
fn check(
    file: &RemoteFile,
    blob: &str,
    size: Option<u64>,
    partial: &Partial,
) -> std::result::Result<(), HubProblem> {
    let damaged = |expected: String, found: String| HubProblem::Damaged {
        file: file.path.clone(),
        expected,
        found,
    };
    match size {
        Some(size) if size != partial.len() => {
            let found = format!("{} bytes", partial.len());
            return Err(damaged(format!("{size} bytes"), found));
        }
        _ => {}
    }
    let found = partial.sha256();
    if blob.len() == found.len() && !blob.eq_ignore_ascii_case(&found) {
        return Err(damaged(
            format!("SHA-256 {blob}"),
            format!("SHA-256 {found}"),
        ));
    }
    Ok(())
}
