//! The files of an image that an access profile lists.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fetch::{FileAt, blocking};
use crate::image::images::{Images, Rootfs};
use crate::image::profile::{BYTES_MAX, unpack};
use crate::layer::entry::Kind;

/// How many files that are missing are named.
const MISSING_NAMED_MAX: usize = 10;

/// What of a profile an image has.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// The regular files, in the order of the profile, each once.
    pub(super) files: Vec<FileAt>,
    /// Paths that lead nowhere: the first ones of them.
    pub(super) missing: Vec<String>,
    /// How many these are altogether.
    pub(super) missing_files: u64,
}

impl Images {
    /// The paths of a profile in a file that a command has handed over ([`crate::store::Store::incoming`]).
    ///
    /// # Errors
    /// As [`unpack`]; [`Error::Io`].
    pub async fn profile(&self, file: PathBuf) -> Result<Vec<Vec<u8>>> {
        let store = Arc::clone(self.fetcher().store());
        let read = move || unpack(&store.take_incoming(&file, BYTES_MAX)?);
        blocking(self.fetcher().runtime(), read).await
    }

    /// Finds paths in an image, symlinks resolved as in a chroot. What is no regular file has no content to bring.
    pub(super) async fn listed(&self, rootfs: &Rootfs, paths: &[Vec<u8>]) -> Result<Listed> {
        let mut listed = Listed::default();
        let mut seen = HashSet::new();
        for path in paths {
            let node = match rootfs.tree().resolve(path, true) {
                Ok(number) => rootfs.tree().node(number)?,
                Err(Error::NotFound { .. } | Error::Posix { .. }) => {
                    listed.missing_files += 1;
                    if listed.missing.len() < MISSING_NAMED_MAX {
                        listed.missing.push(String::from_utf8_lossy(path).into_owned());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if node.kind == Kind::File && seen.insert(node.number) {
                listed.files.push(rootfs.file(self.fetcher(), &node).await?);
            }
        }
        rootfs.vouch(listed)
    }
}
