//! Atomic writing of files: a failure never leaves a partial file, and nothing is replaced unintentionally.
//!
//! Unfinished data is kept in hidden files and folders whose names begin with `.dinv-`. Their writer holds
//! a lock on them, which ends with the process. [`sweep`] removes those that no process holds.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempDir};

use crate::util::digest::sha256;
use crate::{Error, Result};

/// The prefix of hidden files and folders.
const HIDDEN: &str = ".dinv-";
/// The file in a hidden folder that its writer locks.
const LOCK: &str = ".lock";

/// The treatment of an existing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced.
    Replace,
    /// It stays, and that is an error.
    Keep,
}

/// Writes `bytes` to `path` all at once: into a hidden file in the same folder, then renamed.
///
/// After a full disk or a crash, `path` is unchanged and no partial file is left.
///
/// # Errors
/// [`Error::Io`] naming `path` when its folder is missing or cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, Existing::Replace)
}

/// As [`write_atomically`], with the treatment of an existing file.
///
/// # Errors
/// The same, and [`ErrorKind::AlreadyExists`] if a file exists and is to stay.
pub fn write(path: &Path, bytes: &[u8], existing: Existing) -> Result<()> {
    let write = || {
        let mut file = hidden_file(folder_of(path))?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        match existing {
            Existing::Replace => file.persist(path).map(drop).map_err(|error| error.error),
            Existing::Keep => place(file.path(), path, existing),
        }
    };
    write().map_err(|source| Error::io(path)(plain(source)))
}

/// Moves a file within a file system.
///
/// # Errors
/// The operating system's; [`ErrorKind::AlreadyExists`] if a file at `to` is to stay.
pub fn place(from: &Path, to: &Path, existing: Existing) -> io::Result<()> {
    if existing == Existing::Replace {
        return fs::rename(from, to);
    }
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(error),
        Err(_) => {
            // On a file system without links, the name is reserved first.
            File::create_new(to)?;
            fs::rename(from, to)
        }
    }
}

/// The folder of a file.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The operating system's reason without the name of a hidden file, which is meaningless to users.
pub fn plain(error: io::Error) -> io::Error {
    let kind = error.kind();
    match error.get_ref().and_then(|inner| inner.source()) {
        Some(inner) => io::Error::new(kind, inner.to_string()),
        None => error,
    }
}

/// A hidden file in `folder`, held by this process.
fn hidden_file(folder: &Path) -> io::Result<NamedTempFile> {
    let mut options = tempfile::Builder::new();
    options.prefix(HIDDEN);
    #[cfg(unix)]
    options.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask
    loop {
        let file = options.tempfile_in(folder)?;
        let _ = file.as_file().lock(); // not all file systems have locks
        if file.path().exists() {
            return Ok(file);
        } // else it was swept before it was held
    }
}

/// A name that only this process may write to, for the lifetime of the value.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// The locked file; closing it releases the lock.
    _held: File,
}

impl Claim {
    /// Claims the output `path`; `None` if another process holds it.
    ///
    /// # Errors
    /// [`Error::Io`] naming `path` when its folder is missing or cannot be written.
    pub fn on(path: &Path) -> Result<Option<Self>> {
        let name = path.file_name().unwrap_or(path.as_os_str());
        let name = format!("{HIDDEN}{}", &sha256(name.as_encoded_bytes())[..16]);
        let hidden = folder_of(path).join(name);
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        loop {
            let file = (options.open(&hidden)).map_err(Error::io(path))?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Ok(None),
                // Not all file systems have locks.
                Ok(()) | Err(TryLockError::Error(_)) if hidden.exists() => {
                    return Ok(Some(Self {
                        path: hidden,
                        _held: file,
                    }));
                }
                _ => {} // it was given up meanwhile
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // else the next to look removes it
    }
}

/// A hidden folder, held by this process and removed on drop.
#[derive(Debug)]
pub struct HiddenFolder {
    folder: TempDir,
    /// Its lock.
    _held: File,
}

impl HiddenFolder {
    /// Creates one in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`] naming `folder` when it is missing or cannot be written.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut options = tempfile::Builder::new();
        options.prefix(HIDDEN);
        #[cfg(unix)]
        options.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777)); // less the umask
        let make = || loop {
            let made = options.tempdir_in(folder)?;
            let Ok(held) = File::create_new(made.path().join(LOCK)) else {
                if made.path().exists() {
                    return Err(ErrorKind::PermissionDenied.into());
                }
                continue; // it was swept before it was held
            };
            let _ = held.lock(); // not all file systems have locks
            if made.path().join(LOCK).exists() {
                return Ok(Self {
                    folder: made,
                    _held: held,
                });
            }
        };
        make().map_err(|source| Error::io(folder)(plain(source)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Moves it to `path`, where it stays.
    ///
    /// # Errors
    /// [`Error::Io`] naming `path` when it cannot be moved there.
    pub fn publish(self, path: &Path) -> Result<()> {
        let Self {
            folder,
            _held: held,
        } = self;
        fs::rename(folder.path(), path).map_err(Error::io(path))?;
        let _ = folder.keep(); // it is gone from where it was
        drop(held);
        fs::remove_file(path.join(LOCK)).map_err(Error::io(path))
    }
}

/// Files that appear together in a folder.
///
/// They are first written to a hidden folder inside it ([`Set::path`]). Once all of them are there, a note records
/// this: if the process ends while it moves them, [`sweep`] completes the move. Old files are removed before new
/// ones appear, so a mixture is never visible.
#[derive(Debug)]
pub struct Set {
    folder: PathBuf,
    hidden: HiddenFolder,
}

/// The name of the note that a set is complete.
const COMPLETE: &str = ".complete";

/// The note that a set is complete.
#[derive(Debug, Serialize, Deserialize)]
struct Complete {
    names: Vec<String>,
    replace: bool,
    /// The file next to the set that is obsolete once the set is published.
    spent: Option<String>,
}

impl Set {
    /// Begins a set of files in `folder`.
    ///
    /// # Errors
    /// As [`HiddenFolder::new`].
    pub fn new(folder: &Path) -> Result<Self> {
        Ok(Self {
            folder: folder.to_owned(),
            hidden: HiddenFolder::new(folder)?,
        })
    }

    /// The temporary path of the file called `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.hidden.path().join(name)
    }

    /// Moves the files called `names` into place, and removes the file called `spent` in the same folder.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file that cannot be moved. With [`Existing::Keep`], it is
    /// [`ErrorKind::AlreadyExists`] for a file that has appeared, and then none of the set is left in place.
    pub fn publish(self, names: &[String], existing: Existing, spent: Option<&str>) -> Result<()> {
        if existing == Existing::Keep {
            for name in names {
                let path = self.folder.join(name);
                if fs::symlink_metadata(&path).is_ok() {
                    return Err(Error::io(path)(ErrorKind::AlreadyExists.into()));
                }
            }
        }
        let complete = Complete {
            names: names.to_vec(),
            replace: existing == Existing::Replace,
            spent: spent.map(str::to_owned),
        };
        write_atomically(
            &self.hidden.path().join(COMPLETE),
            &serde_json::to_vec(&complete).unwrap_or_default(),
        )?;
        complete.bring(self.hidden.path(), &self.folder)
    }
}

impl Complete {
    /// Whether a file has appeared in `folder` where one in `hidden` should be.
    fn is_blocked(&self, hidden: &Path, folder: &Path) -> bool {
        let appeared = |name: &String| {
            let [from, to] = [hidden, folder].map(|place| place.join(name));
            from.exists() && to.exists() && fs::read(from).ok() != fs::read(to).ok()
        };
        !self.replace && self.names.iter().any(appeared)
    }

    /// Moves the remaining files in `hidden` to `folder`.
    fn bring(&self, hidden: &Path, folder: &Path) -> Result<()> {
        let waiting = || (self.names.iter()).filter(|name| hidden.join(name).exists());
        let existing = match self.replace {
            true => Existing::Replace,
            false => Existing::Keep,
        };
        if self.replace {
            for path in waiting().map(|name| folder.join(name)) {
                remove(&path)?;
            }
        }
        let mut brought: Vec<PathBuf> = Vec::new();
        for name in waiting() {
            let (from, to) = (hidden.join(name), folder.join(name));
            // Left by a process that ended between the two halves of `place`.
            let is_there = || fs::read(&from).ok() == fs::read(&to).ok();
            match place(&from, &to, existing) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists || !is_there() => {
                    for path in brought.iter().filter(|_| !self.replace) {
                        remove(path)?;
                    }
                    return Err(Error::io(to)(error));
                }
                _ => brought.push(to),
            }
        }
        match &self.spent {
            Some(name) => remove(&folder.join(name)),
            None => Ok(()),
        }
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// Removes the hidden data that killed processes left in `folder`, and completes the moves of complete sets.
/// Returns the names of their files.
pub fn sweep(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let left = entries.filter(|entry| is_hidden(&entry.file_name().to_string_lossy()));
    let mut finished = Vec::new();
    for path in left.map(|entry| entry.path()) {
        let lock = if path.is_dir() {
            path.join(LOCK)
        } else {
            path.clone()
        };
        let mut options = File::options();
        let held = match options.write(true).open(lock) {
            Ok(file) if file.try_lock().is_ok() => Some(file),
            // A folder that was just created has no lock yet; then this fails, or is noticed.
            Err(error) if error.kind() == ErrorKind::NotFound && path.is_dir() => None,
            _ => continue,
        };
        if !path.is_dir() {
            let _ = fs::remove_file(&path); // the next to look removes it
            continue;
        }
        let complete = fs::read(path.join(COMPLETE)).ok();
        let complete = complete.and_then(|note| serde_json::from_slice::<Complete>(&note).ok());
        if let Some(set) = complete {
            if set.is_blocked(&path, folder) {
                let _ = put_aside(&path); // the next to look tries again
                continue;
            }
            if set.bring(&path, folder).is_err() {
                continue; // so does it
            }
            finished.extend(set.names);
        }
        let _ = match held {
            Some(_) => fs::remove_dir_all(&path),
            None => fs::remove_dir(&path).or_else(|error| match error.kind() {
                ErrorKind::DirectoryNotEmpty => fs::remove_dir_all(&path), // of an older program
                _ => Err(error),
            }),
        };
    }
    finished
}

/// Makes a hidden folder with results visible, since other files have taken their place.
fn put_aside(hidden: &Path) -> std::io::Result<()> {
    let name = hidden.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_prefix(HIDDEN).unwrap_or_default();
    let aside = hidden.with_file_name(format!("unplaced-{name}"));
    fs::rename(hidden, &aside)?;
    fs::remove_file(aside.join(COMPLETE))?;
    fs::remove_file(aside.join(LOCK))
}

/// Whether a folder holds only files that systems leave in any folder, and hidden files of this module.
pub fn is_empty(folder: &Path) -> bool {
    const OF_SYSTEMS: [&str; 5] = [
        ".DS_Store",
        ".directory",
        ".localized",
        "Thumbs.db",
        "desktop.ini",
    ];
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.all(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let of_system = OF_SYSTEMS.contains(&&*name) || name.starts_with("._");
        (of_system || is_hidden(&name)) && entry.path().is_file()
    })
}

/// Whether a name is a hidden one of this module.
fn is_hidden(name: &str) -> bool {
    let random = name.strip_prefix(HIDDEN).unwrap_or_default();
    [6, 16].contains(&random.len()) && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_whole_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        write_atomically(&path, b"a long first version").unwrap();
        write_atomically(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("absent").join("out.txt");
        let Err(Error::Io {
            path: named,
            source,
        }) = write_atomically(&path, b"x")
        else {
            panic!("no such error");
        };
        assert_eq!(named, path);
        assert_eq!(source.kind(), ErrorKind::NotFound);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_the_file_as_the_umask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        fs::write(&plain, b"x").unwrap();
        let ours = folder.path().join("ours");
        write_atomically(&ours, b"x").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    fn entries(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A set of two files, `x` and `y`.
    fn set(folder: &Path) -> (Set, Vec<String>) {
        let set = Set::new(folder).unwrap();
        let names = ["x", "y"].map(str::to_owned);
        for name in &names {
            fs::write(set.path(name), format!("new {name}")).unwrap();
        }
        (set, names.to_vec())
    }

    #[test]
    fn what_exists_stays_unless_it_is_to_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "the only copy").unwrap();
        let Err(Error::Io { source, .. }) = write(&path, b"new", Existing::Keep) else {
            panic!("it was replaced");
        };
        assert_eq!(source.kind(), ErrorKind::AlreadyExists);
        let (set, names) = set(folder.path());
        let error = set.publish(&names, Existing::Keep, None).unwrap_err();
        assert!(matches!(error, Error::Io { path: named, .. } if named == path));
        assert_eq!(fs::read_to_string(&path).unwrap(), "the only copy");
        assert_eq!(entries(folder.path()), ["x"]);
        write(&folder.path().join("z"), b"new", Existing::Keep).unwrap();
        assert_eq!(entries(folder.path()), ["x", "z"]);
    }

    #[test]
    fn a_set_replaces_a_set_and_removes_what_is_spent() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x", "y", "spent"] {
            fs::write(folder.path().join(name), "old").unwrap();
        }
        let (set, names) = set(folder.path());
        (set.publish(&names, Existing::Replace, Some("spent"))).unwrap();
        assert_eq!(entries(folder.path()), ["x", "y"]);
        assert_eq!(
            fs::read_to_string(folder.path().join("x")).unwrap(),
            "new x"
        );
    }

    /// Kills the process at every possible move.
    #[test]
    fn a_set_whose_process_was_killed_is_brought_to_its_end() {
        for (moved, replace) in [(0, false), (1, false), (2, false), (0, true), (1, true)] {
            let folder = tempfile::tempdir().unwrap();
            let place_of = |name: &str| folder.path().join(name);
            let hidden = place_of(".dinv-killed");
            fs::create_dir(&hidden).unwrap();
            let names = ["x", "y"].map(str::to_owned).to_vec();
            for (number, name) in names.iter().enumerate() {
                if replace && number >= moved {
                    fs::write(place_of(name), "old").unwrap();
                }
                let at = if number < moved {
                    folder.path()
                } else {
                    &hidden
                };
                fs::write(at.join(name), "new").unwrap();
            }
            fs::write(hidden.join(LOCK), "").unwrap();
            fs::write(place_of("spent"), "").unwrap();
            let spent = Some("spent".to_owned());
            let note = Complete {
                names: names.clone(),
                replace,
                spent,
            };
            fs::write(hidden.join(COMPLETE), serde_json::to_vec(&note).unwrap()).unwrap();
            assert_eq!(sweep(folder.path()), names);
            assert_eq!(entries(folder.path()), ["x", "y"]);
            for name in &names {
                assert_eq!(fs::read_to_string(place_of(name)).unwrap(), "new");
            }
        }
    }

    #[test]
    fn a_set_that_cannot_be_brought_to_its_end_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let hidden = folder.path().join(".dinv-killed");
        fs::create_dir(&hidden).unwrap();
        let names = ["x", "y"].map(str::to_owned).to_vec();
        for name in &names {
            fs::write(hidden.join(name), "new").unwrap();
        }
        fs::write(folder.path().join("y"), "of another").unwrap();
        fs::write(hidden.join(LOCK), "").unwrap();
        let note = Complete {
            names: names.clone(),
            replace: false,
            spent: None,
        };
        fs::write(hidden.join(COMPLETE), serde_json::to_vec(&note).unwrap()).unwrap();
        assert!(sweep(folder.path()).is_empty());
        assert_eq!(entries(folder.path()), ["unplaced-killed", "y"]);
        let aside = folder.path().join("unplaced-killed");
        assert_eq!(entries(&aside), names);
        for name in &names {
            assert_eq!(fs::read_to_string(aside.join(name)).unwrap(), "new");
        }
        let theirs = fs::read_to_string(folder.path().join("y")).unwrap();
        assert_eq!(theirs, "of another");
    }

    #[test]
    fn what_nobody_holds_is_swept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let place_of = |name: &str| folder.path().join(name);
        fs::write(place_of(".dinv-aB3xYz"), "half").unwrap();
        fs::write(place_of(".dinv-notes.txt"), "the user's").unwrap();
        fs::create_dir(place_of(".dinv-cD4xYz")).unwrap();
        fs::write(place_of(".dinv-cD4xYz").join("half"), "half").unwrap();
        let claim = Claim::on(&place_of("x")).unwrap().unwrap();
        let (set, _) = set(folder.path());
        assert!(sweep(folder.path()).is_empty());
        let left = entries(folder.path());
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(set.path("x").exists() && claim.path.exists());
        drop((claim, set));
        assert_eq!(entries(folder.path()), [".dinv-notes.txt"]);
    }

    #[test]
    fn a_name_is_claimed_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let [x, y] = ["x", "y"].map(|name| folder.path().join(name));
        let claim = Claim::on(&x).unwrap().unwrap();
        assert!(Claim::on(&x).unwrap().is_none());
        assert!(Claim::on(&y).unwrap().is_some());
        drop(claim);
        assert!(Claim::on(&x).unwrap().is_some());
        assert!(entries(folder.path()).is_empty());
    }

    #[test]
    fn what_systems_leave_in_a_folder_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".DS_Store", "._photo.png", "Thumbs.db"] {
            assert!(is_empty(folder.path()));
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert!(is_empty(folder.path()));
        fs::create_dir(folder.path().join(".git")).unwrap();
        assert!(!is_empty(folder.path()));
    }

    #[test]
    fn a_folder_is_given_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let hidden = HiddenFolder::new(folder.path()).unwrap();
        fs::write(hidden.path().join("a"), "").unwrap();
        let path = folder.path().join("named");
        hidden.publish(&path).unwrap();
        assert_eq!(entries(&path), ["a"]);
        assert_eq!(entries(folder.path()), ["named"]);
    }
}
