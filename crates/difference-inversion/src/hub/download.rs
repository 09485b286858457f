//! Downloads of a repository's files into the cache.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::diffusion::family::{self, Family};
use crate::diffusion::frozen::CAPTIONER_FOLDER;
use crate::diffusion::joint_space;
use crate::diffusion::model_files::{FileOptions, MODEL_INDEX, ModelFiles};
use crate::diffusion::pipeline::Pipeline;
use crate::hub::cache::RepoCache;
use crate::hub::client::{Answer, Client, Listing, RemoteFile, is_digest, reason};
use crate::hub::known;
use crate::hub::partial::Partial;
use crate::hub::plan::{self, Plan};
use crate::hub::{Hub, HubProblem, ModelId, Survey, Wanted};
use crate::util::progress::{self, Observer, Stage};
use crate::weights::read_config;
use crate::{Error, Result};

/// Waits before each retry of a request that brought no byte.
const WAITS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(4),
];
/// The longest wait that the Hub may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The interval at which a wait checks whether it should stop.
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
    /// Bytes of the finished files that were missing at the start.
    finished: u64,
    /// The same including those of the current file.
    done: u64,
    /// Bytes of all files that were missing.
    total: u64,
}

/// Surveys what [`pull`] would download. Downloads only the configurations of the text encoders.
pub(super) fn survey(
    hub: &Hub,
    id: &ModelId,
    wanted: Wanted<'_>,
    observer: Observer<'_>,
) -> Result<Survey> {
    let mut download = Download::new(hub, id, observer);
    let files = download.planned(wanted)?;
    Ok(Survey {
        bytes: download.bytes_of(&download.absent(&files), |file| {
            download.bytes_to_come(file)
        }),
        joint_spaces: download.joint_spaces(&files)?,
        has_captioner: holds(&files, CAPTIONER_FOLDER),
    })
}

/// Downloads a revision into the cache; returns the folder of its snapshot.
pub(super) fn pull(
    hub: &Hub,
    id: &ModelId,
    wanted: Wanted<'_>,
    observer: Observer<'_>,
) -> Result<PathBuf> {
    let mut download = Download::new(hub, id, observer);
    let files = download.planned(wanted)?;
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

/// The required files of a listing.
fn choose(
    listing: Listing,
    index: Option<&Map<String, Value>>,
    wanted: Wanted<'_>,
) -> std::result::Result<Vec<RemoteFile>, HubProblem> {
    let paths = listing.files.iter().map(|file| file.path.clone());
    let plan = Plan::new(&paths.collect(), index, wanted);
    if !plan.missing.is_empty() {
        return Err(unusable(&plan.missing));
    }
    let files = listing.files.into_iter();
    Ok(files
        .filter(|file| plan.files.contains(&file.path))
        .collect())
}

/// Whether a folder has files.
fn holds(files: &[RemoteFile], folder: &str) -> bool {
    let is_in = |file: &RemoteFile| file.path.split('/').next() == Some(folder);
    files.iter().any(is_in)
}

fn unusable(missing: &[String]) -> HubProblem {
    HubProblem::Unusable {
        reason: format!("it has no {}", missing.join(", no ")),
    }
}

impl<'a> Download<'a> {
    fn new(hub: &'a Hub, id: &'a ModelId, observer: Observer<'a>) -> Self {
        Self {
            id,
            client: Client::new(hub, id),
            cache: RepoCache::new(&hub.cache, id),
            commit: String::new(),
            observer,
            finished: 0,
            done: 0,
            total: 0,
        }
    }

    /// The required files, at the current commit of the revision.
    fn planned(&mut self, wanted: Wanted<'_>) -> Result<Vec<RemoteFile>> {
        let id = self.id;
        let listing = self.patiently(|this| this.client.listing().map_err(|it| it.of(id)))?;
        self.commit.clone_from(&listing.commit);
        let index = self.index(&listing)?;
        choose(listing, index.as_ref(), wanted).map_err(|it| it.of(id))
    }

    /// The contents of `model_index.json`, which names the family and so the required parts.
    fn index(&mut self, listing: &Listing) -> Result<Option<Map<String, Value>>> {
        let mut files = listing.files.iter();
        let Some(file) = files.find(|file| file.path == MODEL_INDEX) else {
            return Ok(None);
        };
        self.cache.prepare()?;
        let path = self.small(file)?;
        check_class(&path).map_err(|it| it.of(self.id))?;
        self.finished = 0; // what comes before a download is not part of it
        read_config(&path).map(Some)
    }

    /// The place of a small file on this disk, downloaded if absent.
    fn small(&mut self, file: &RemoteFile) -> Result<PathBuf> {
        if self.cache.holds(&self.commit, &file.path, file.size) {
            return Ok(self.cache.snapshot(&self.commit).join(&file.path));
        }
        let blob = self.blob(file)?;
        Ok(self.cache.blob(&blob))
    }

    /// The planned files that at least have to be linked. A file that is not a link was put there by a program
    /// that could not create links.
    fn absent<'f>(&self, planned: &'f [RemoteFile]) -> Vec<&'f RemoteFile> {
        let is_linked = |file: &&RemoteFile| !self.cache.holds(&self.commit, &file.path, file.size);
        planned.iter().filter(is_linked).collect()
    }

    /// The sum of `bytes` of the missing ones of these files. Files with the same contents are one
    /// blob.
    fn bytes_of(&self, files: &[&RemoteFile], bytes: impl Fn(&RemoteFile) -> u64) -> u64 {
        let mut counted = BTreeSet::new();
        let mut sum = 0;
        for &file in files {
            let first = file.blob.is_none() || counted.insert(&file.blob);
            if first && !self.is_there(file) {
                sum += bytes(file);
            }
        }
        sum
    }

    /// Bytes of a file that an earlier download left missing.
    fn bytes_to_come(&self, file: &RemoteFile) -> u64 {
        let partial = (file.blob.as_deref()).map(|blob| self.cache.partial(blob));
        let kept = partial.and_then(|path| path.metadata().ok());
        let kept = kept.map_or(0, |data| data.len());
        file.size.unwrap_or(0).saturating_sub(kept)
    }

    /// The joint spaces that belong to the planned text encoders.
    fn joint_spaces(&mut self, planned: &[RemoteFile]) -> Result<Vec<ModelId>> {
        if (joint_space::FOLDERS.into_iter()).any(|folder| holds(planned, folder)) {
            return Ok(Vec::new());
        }
        self.cache.prepare()?;
        let mut found = Vec::new();
        for name in family::text_encoders() {
            let path = format!("{name}/config.json");
            let Some(file) = planned.iter().find(|file| file.path == path) else {
                continue;
            };
            let config = self.small(file)?;
            found.extend(known::joint_space_of(&config)?);
        }
        Ok(found)
    }

    /// The name of the blob of a file, downloaded if absent.
    fn blob(&mut self, file: &RemoteFile) -> Result<String> {
        match &file.blob {
            Some(blob) if self.is_there(file) => Ok(blob.clone()),
            _ => self.patiently(|this| this.receive(file)),
        }
    }

    /// Downloads all files, then creates the snapshot, then the name of the revision.
    fn all(&mut self, planned: &[RemoteFile]) -> Result<()> {
        self.cache.prepare()?;
        let mut files = self.absent(planned);
        self.total = self.bytes_of(&files, |file| file.size.unwrap_or(0));
        // Files that show whether the model can be used come before its weights.
        files.sort_by_key(|file| (file.path != MODEL_INDEX, is_weights(file)));
        let weights = files.iter().position(|file| is_weights(file));
        let mut blobs = Vec::new();
        for (number, &file) in files.iter().enumerate() {
            if Some(number) == weights {
                self.check_configs(files.iter().zip(&blobs), planned)?;
            }
            let blob = self.blob(file)?;
            blobs.push(blob);
        }
        for (file, blob) in files.iter().zip(&blobs) {
            self.cache.link(&self.commit, &file.path, blob)?;
        }
        self.cache.set_reference(self.id.revision(), &self.commit)
    }

    /// Refuses a pipeline that its configurations show to be unsupported, before its weights are downloaded. Reads the
    /// downloaded ones, with the names of their blobs, and those that were there.
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

    /// Downloads one file; returns the name of its blob.
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
        let path = self.cache.partial(&blob);
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
            // The data of an earlier attempt may be damaged on this disk.
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

    /// Appends the incoming bytes; returns the expected size of the file.
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
                break; // `check` reports the error
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
                // Missing support for locks in a file system must not prevent a download.
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(lock),
            }
        }
    }

    /// Retries after transient failures, as long as there is progress.
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

    /// Reports the number of downloaded bytes, or before the total is known asks only whether to stop.
    fn step(&mut self) -> Result<()> {
        if self.total == 0 {
            return progress::ask(&mut *self.observer, Stage::Download);
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

/// Refuses a pipeline of an unsupported class, by its `model_index.json`.
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

/// Checks the size and, if the name of the blob is one, the SHA-256.
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
