//! Manifests and configs by digest. Small, immutable, kept for ever, verified at every read.

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::store::lock::make_dir;
use crate::store::write_whole;

/// The folder of documents.
#[derive(Debug)]
pub struct Documents {
    dir: PathBuf,
    tmp: PathBuf,
}

impl Documents {
    pub(super) fn new(dir: PathBuf, tmp: PathBuf) -> Self {
        Self { dir, tmp }
    }

    /// The document with this digest, if it is here. One that does not have its digest any more is removed.
    ///
    /// # Errors
    /// [`Error::Io`] when it is there but cannot be read.
    pub fn get(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let path = self.path(digest);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path.display().to_string(), &error)),
        };
        let actual = Digest::of(&bytes);
        if actual == *digest {
            return Ok(Some(Bytes::from(bytes)));
        }
        tracing::warn!(%digest, %actual, "a cached document is damaged and will be fetched anew");
        let _ = fs::remove_file(&path);
        Ok(None)
    }

    /// Keeps a document, whose digest the caller has verified.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.path(digest);
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        write_whole(&self.tmp, &path, bytes)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.dir.join(&hex[..2]).join(hex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_document_is_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Documents::new(dir.path().to_owned(), dir.path().to_owned());
        let digest = Digest::of(b"{}");
        assert_eq!(documents.get(&digest).unwrap(), None);
        documents.put(&digest, b"{}").unwrap();
        assert_eq!(documents.get(&digest).unwrap().unwrap(), "{}");
        fs::write(documents.path(&digest), b"[]").unwrap();
        assert_eq!(documents.get(&digest).unwrap(), None);
        assert!(!documents.path(&digest).exists());
    }
}
