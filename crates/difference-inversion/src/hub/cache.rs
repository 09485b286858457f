//! The cache on disk, in the layout of `huggingface_hub`:
//!
//! ```text
//! models--OWNER--NAME/
//!   blobs/ETAG             the contents, named by their digest
//!   refs/REVISION          the commit that a branch or tag stands for
//!   snapshots/COMMIT/PATH  a link to a blob
//! .locks/models--OWNER--NAME/ETAG.lock
//! ```

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::hub::{ModelId, Wanted, plan};
use crate::{Error, Result};

/// Prefix of a repository's folder.
const MODELS: &str = "models--";
const SNAPSHOTS: &str = "snapshots";

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    /// Its name.
    pub id: ModelId,
    /// The folder of the snapshot.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// Bytes of the files in the snapshot.
    pub bytes: u64,
    /// The missing files, by path; empty if it is complete.
    pub missing: Vec<String>,
}

/// The part of the cache that belongs to one repository.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    folder: PathBuf,
    #[cfg(feature = "hub")]
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, id: &ModelId) -> Self {
        let name = format!("{MODELS}{}", id.repository().replace('/', "--"));
        Self {
            #[cfg(feature = "hub")]
            locks: cache.join(".locks").join(&name),
            folder: cache.join(name),
        }
    }

    /// The cached part of a model's revision.
    pub(super) fn model(&self, id: &ModelId, wanted: Wanted<'_>) -> Option<CachedModel> {
        let known = fs::read_to_string(self.reference(id.revision())).ok();
        let commit = match &known {
            Some(commit) => commit.trim(),
            None => id.revision(),
        };
        self.snapshot(commit).is_dir().then(|| CachedModel {
            id: id.clone(),
            folder: self.snapshot(commit),
            commit: commit.to_owned(),
            bytes: size(&self.snapshot(commit)),
            missing: plan::missing(&self.snapshot(commit), wanted),
        })
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join(SNAPSHOTS).join(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }
}

#[cfg(feature = "hub")]
impl RepoCache {
    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.folder.join("blobs").join(name)
    }

    /// The downloaded part of a blob.
    pub(super) fn partial(&self, name: &str) -> PathBuf {
        self.blob(&format!("{name}.incomplete"))
    }

    /// Whether `path` of a snapshot is a file of this size, and not a link to a blob.
    pub(super) fn holds(&self, commit: &str, path: &str, size: Option<u64>) -> bool {
        let data = fs::symlink_metadata(self.snapshot(commit).join(path));
        data.is_ok_and(|data| data.is_file() && Some(data.len()) == size)
    }

    /// Makes the folders that a download writes to.
    pub(super) fn prepare(&self) -> Result<()> {
        for folder in [self.folder.join("blobs"), self.locks.clone()] {
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        }
        Ok(())
    }

    /// The lock file of a blob, which its writer locks.
    pub(super) fn lock_file(&self, name: &str) -> Result<fs::File> {
        let path = self.locks.join(format!("{name}.lock"));
        let mut options = fs::OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&path);
        file.map_err(Error::io(path))
    }

    /// Makes `path` of a snapshot a link to a blob.
    pub(super) fn link(&self, commit: &str, path: &str, blob: &str) -> Result<()> {
        let link = self.snapshot(commit).join(path);
        let folder = link.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let up = "../".repeat(path.split('/').count() + 1);
        let target = format!("{up}blobs/{blob}");
        if fs::read_link(&link).is_ok_and(|old| old == Path::new(&target)) {
            return Ok(());
        }
        // Renamed into place: another download may be linking the same file.
        let made = tempfile::Builder::new().make_in(folder, |made| {
            // Not every file system has links; on Windows, symbolic ones need a privilege.
            symbolic_link(&target, made)
                .or_else(|_| fs::hard_link(self.blob(blob), made))
                .or_else(|_| fs::copy(self.blob(blob), made).map(|_| ()))
        });
        made.and_then(|made| Ok(made.persist(&link)?))
            .map_err(Error::io(&link))
    }

    /// Records the commit that a branch or tag stands for.
    pub(super) fn set_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.reference(revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        crate::util::files::write_atomically(&path, commit.as_bytes())
    }
}

#[cfg(all(feature = "hub", unix))]
fn symbolic_link(target: &str, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(all(feature = "hub", not(unix)))]
fn symbolic_link(_target: &str, _link: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// The models in a cache that this library can use: diffusers pipelines, CLIP and BLIP models. For each
/// repository, the revisions that have a name, or else its snapshots.
pub(super) fn list(cache: &Path) -> Result<Vec<CachedModel>> {
    let entries = match fs::read_dir(cache) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(cache))?,
    };
    let mut models = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io(cache))?.file_name();
        let Some(id) = repository_of(&name.to_string_lossy()) else {
            continue;
        };
        let repository = RepoCache::new(cache, &id);
        let mut revisions = Vec::new();
        names_under(&repository.folder.join("refs"), "", &mut revisions);
        let mut found: Vec<CachedModel> = (revisions.iter())
            .filter_map(|revision| repository.model(&id.at(revision), Wanted::default()))
            .collect();
        let mut commits = Vec::new();
        names_under(&repository.folder.join(SNAPSHOTS), "", &mut commits);
        for commit in commits.iter().filter_map(|path| path.split('/').next()) {
            if !found.iter().any(|model| model.commit == commit) {
                found.extend(repository.model(&id.at(commit), Wanted::default()));
            }
        }
        models.extend(found.into_iter().filter(|model| is_ours(&model.folder)));
    }
    models.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(models)
}

/// The name and commit of the model whose snapshot in a cache is at this path: `OWNER/NAME@COMMIT`.
pub fn model_of(folder: &Path) -> Option<ModelId> {
    let names: Vec<&str> = folder
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    let [.., repository, SNAPSHOTS, commit] = names.as_slice() else {
        return None;
    };
    Some(repository_of(repository)?.at(commit))
}

/// The snapshot in a repository's folder of a cache: that of `main`, or the only one.
pub(super) fn snapshot_in(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join(SNAPSHOTS);
    let entries = fs::read_dir(&snapshots).ok()?.flatten();
    let all: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    let main = fs::read_to_string(folder.join("refs/main")).ok();
    let main = main.map(|commit| snapshots.join(commit.trim()));
    match (main.filter(|path| path.is_dir()), &all[..]) {
        (Some(main), _) => Some(main),
        (None, [only]) => Some(only.clone()),
        _ => None,
    }
}

/// The repository that the name of a folder in a cache stands for.
pub fn repository_of(folder: &str) -> Option<ModelId> {
    let name = folder.strip_prefix(MODELS)?;
    name.replacen("--", "/", 1).parse().ok()
}

/// Whether a snapshot is a kind of model that this library reads.
fn is_ours(folder: &Path) -> bool {
    if folder.join("model_index.json").is_file() {
        return true;
    }
    let config = fs::read(folder.join("config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    let kinds = ["clip", "blip-2", "blip"];
    config["model_type"]
        .as_str()
        .is_some_and(|kind| kinds.contains(&kind))
}

/// The paths of all files under `folder`, sorted.
fn names_under(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut entries: Vec<_> = entries.collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            names_under(&entry.path(), &format!("{name}/"), names);
        } else {
            names.push(name);
        }
    }
}

/// Bytes of the files under `folder`, links followed.
pub fn size(folder: &Path) -> u64 {
    let mut names = Vec::new();
    names_under(folder, "", &mut names);
    let sizes = names.iter().filter_map(|name| {
        let data = fs::metadata(folder.join(name)).ok()?;
        Some(data.len())
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ModelId {
        text.parse().unwrap()
    }

    #[test]
    fn a_snapshot_tells_whose_it_is() {
        let path = "/home/x/.cache/huggingface/hub/models--a-b--c.d/snapshots/0123abc";
        assert_eq!(model_of(Path::new(path)), Some(id("a-b/c.d@0123abc")));
        for path in ["/home/x/model", "models--a--b/snapshots", "x/snapshots/1"] {
            assert_eq!(model_of(Path::new(path)), None, "{path}");
        }
    }

    #[cfg(all(unix, feature = "hub"))]
    #[test]
    fn a_model_is_found_by_branch_and_by_commit() {
        let cache = tempfile::tempdir().unwrap();
        let repository = RepoCache::new(cache.path(), &id("a/b"));
        repository.prepare().unwrap();
        fs::write(repository.blob("f00"), "{\"model_type\": \"clip\"}").unwrap();
        repository.link("c0ffee", "config.json", "f00").unwrap();
        repository.link("c0ffee", "config.json", "f00").unwrap();
        assert_eq!(repository.model(&id("a/b"), Wanted::default()), None);
        repository.set_reference("main", "c0ffee").unwrap();
        let model = repository.model(&id("a/b"), Wanted::default()).unwrap();
        assert_eq!((model.commit.as_str(), model.bytes), ("c0ffee", 22));
        assert_eq!(model.missing[0], "*.safetensors");
        assert!(
            repository
                .model(&id("a/b@c0ffee"), Wanted::default())
                .is_some()
        );
        assert_eq!(list(cache.path()).unwrap(), [model]);
        repository.link("beef", "unet/config.json", "f00").unwrap();
        let linked = repository.snapshot("beef").join("unet/config.json");
        assert_eq!(fs::metadata(linked).unwrap().len(), 22);
        assert!(list(&cache.path().join("absent")).unwrap().is_empty());
    }

    #[cfg(all(unix, feature = "hub"))]
    #[test]
    fn downloads_at_once_may_link_the_same_file() {
        let cache = tempfile::tempdir().unwrap();
        let repository = RepoCache::new(cache.path(), &id("a/b"));
        repository.prepare().unwrap();
        for round in 0..200 {
            let commit = format!("c{round}");
            let start = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        repository.link(&commit, "unet/config.json", "f00").unwrap();
                    });
                }
            });
            let folder = repository.snapshot(&commit).join("unet");
            assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
        }
    }
}
