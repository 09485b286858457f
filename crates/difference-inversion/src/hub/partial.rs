//! A file while it is downloaded.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The beginning of a file, kept between attempts, with its digest so far.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    digest: Sha256,
}

impl Partial {
    /// Opens the data of an earlier attempt, or an empty file.
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(&path)?;
        let mut digest = Sha256::new();
        let len = io::copy(&mut file, &mut digest)?;
        Ok(Self {
            path,
            file,
            len,
            digest,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of bytes so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends bytes. A partial write on a full disk is undone.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(bytes) {
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.digest.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Starts again.
    pub(super) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.len = 0;
        self.digest = Sha256::new();
        Ok(())
    }

    /// SHA-256 of the bytes so far, in hexadecimal digits.
    pub(super) fn sha256(&self) -> String {
        crate::util::digest::hex(self.digest.clone())
    }

    /// Moves the whole file to its final path.
    pub(super) fn finish(self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, path)
    }

    /// Deletes it.
    pub(super) fn discard(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of "abc", from FIPS 180-4.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn the_digest_goes_on_where_the_file_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.incomplete");
        let mut first = Partial::open(path.clone()).unwrap();
        first.append(b"a").unwrap();
        drop(first);
        let mut second = Partial::open(path.clone()).unwrap();
        assert_eq!(second.len(), 1);
        second.append(b"bc").unwrap();
        assert_eq!((second.len(), second.sha256().as_str()), (3, ABC));
        second.restart().unwrap();
        second.append(b"abc").unwrap();
        assert_eq!(second.sha256(), ABC);
        second.finish(&folder.path().join("x")).unwrap();
        assert_eq!(fs::read(folder.path().join("x")).unwrap(), b"abc");
        assert!(!path.exists());
    }
}
