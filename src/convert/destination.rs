//! Where a converted image goes: a layout on disk, or a repository of a registry.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde::Serialize;

use crate::convert::on_thread;
use crate::convert::progress::Part;
use crate::daemon::layout_parts;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::registry::reference::{DEFAULT_TAG, Reference, Repository, Target};
use crate::registry::{BlobUpload, Client, LayoutWriter, OCI_MANIFEST, Pushed, unnamed_file};

/// How a blob came to be at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stored {
    /// It was there.
    Present,
    /// The registry took it from another repository.
    Mounted,
    /// It was written or sent.
    Written,
}

/// A destination as users write it.
#[derive(Debug)]
pub(super) enum Place {
    Layout { path: PathBuf, name: String },
    Reference(Reference),
}

impl Place {
    /// Reads a reference or `oci:PATH[:TAG]`; without a tag `latest` is meant.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub(super) fn parse(text: &str) -> Result<Self> {
        if let Some((path, name)) = layout_parts(text)? {
            return Ok(Self::Layout {
                path: path.into(),
                name: name.unwrap_or(DEFAULT_TAG).to_owned(),
            });
        }
        let reference: Reference = text.parse()?;
        match reference.digest {
            None => Ok(Self::Reference(reference)),
            Some(_) => Err(Error::usage(format!(
                "{text}: the digest of a converted image is found out by converting it; name a tag"
            ))),
        }
    }

    /// The registry's name.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Self::Reference(reference) => Some(reference.repository.host()),
            Self::Layout { .. } => None,
        }
    }
}

/// A destination that is being written to.
pub(super) enum Destination {
    Layout {
        layout: Arc<LayoutWriter>,
        path: PathBuf,
        name: String,
    },
    Registry {
        client: Client,
        reference: Reference,
        scratch_dir: PathBuf,
    },
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout { path, name, .. } => write!(f, "oci:{}:{name}", path.display()),
            Self::Registry { reference, .. } => reference.fmt(f),
        }
    }
}

impl Destination {
    /// Opens a layout, or makes it. A registry is not asked anything yet.
    pub(super) async fn open(client: &Client, place: Place, scratch_dir: &Path) -> Result<Self> {
        let (path, place) = match place {
            Place::Layout { path, name } => (path, Ok(name)),
            Place::Reference(reference) => match client.layout_path(reference.repository.host()) {
                Some(path) => (path, Err(reference)),
                None => {
                    return Ok(Self::Registry {
                        client: client.clone(),
                        reference,
                        scratch_dir: scratch_dir.to_owned(),
                    });
                }
            },
        };
        let opened = path.clone();
        let layout = on_thread(move || LayoutWriter::open(&opened)).await?;
        let name = place.unwrap_or_else(|reference| layout.name_of(&reference));
        Ok(Self::Layout {
            layout: Arc::new(layout),
            path,
            name,
        })
    }

    /// A file for [`Self::put`].
    pub(super) async fn scratch(&self) -> Result<File> {
        match self {
            Self::Layout { layout, .. } => {
                let layout = Arc::clone(layout);
                on_thread(move || layout.scratch()).await
            }
            Self::Registry { scratch_dir, .. } => {
                let dir = scratch_dir.clone();
                on_thread(move || unnamed_file(&dir)).await
            }
        }
    }

    /// Whether a blob of `source` is here, or could be got here without anybody sending it.
    pub(super) async fn find(
        &self,
        digest: &Digest,
        size: u64,
        source: &Repository,
    ) -> Result<Option<Stored>> {
        match self {
            Self::Layout { layout, .. } => {
                let (layout, digest) = (Arc::clone(layout), *digest);
                let has = on_thread(move || Ok(layout.has(&digest, size))).await?;
                Ok(has.then_some(Stored::Present))
            }
            Self::Registry {
                client, reference, ..
            } => {
                let to = &reference.repository;
                if client.has_blob(to, digest, size).await? {
                    return Ok(Some(Stored::Present));
                }
                let same = to.host() == source.host() && to != source;
                let mounted = same && client.mount_blob(to, digest, source).await?;
                Ok(mounted.then_some(Stored::Mounted))
            }
        }
    }

    /// Takes a blob from a file of [`Self::scratch`].
    pub(super) async fn put(&self, digest: Digest, size: u64, file: File, part: &Part) -> Result<Stored> {
        part.of.store(size, Ordering::Relaxed);
        match self {
            Self::Layout { layout, .. } => {
                let layout = Arc::clone(layout);
                let put = on_thread(move || {
                    if layout.has(&digest, size) {
                        return Ok(Stored::Present);
                    }
                    layout.put(&digest, &file)?;
                    Ok(Stored::Written)
                });
                put.await
            }
            Self::Registry {
                client, reference, ..
            } => {
                let upload = BlobUpload {
                    digest,
                    size,
                    file: Arc::new(file),
                    mount_from: None,
                    sent_bytes: Arc::clone(&part.done),
                };
                let pushed = client.push_blob(&reference.repository, &upload).await?;
                Ok(match pushed {
                    Pushed::Present => Stored::Present,
                    Pushed::Mounted => Stored::Mounted,
                    Pushed::Sent => Stored::Written,
                })
            }
        }
    }

    /// Takes a small blob.
    pub(super) async fn put_bytes(&self, bytes: &Bytes) -> Result<()> {
        let mut file = self.scratch().await?;
        let text = bytes.clone();
        let file = on_thread(move || {
            file.write_all(&text)
                .map_err(|error| Error::io("temporary file", &error))?;
            Ok(file)
        });
        let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
        self.put(digest, size, file.await?, &Part::default()).await?;
        Ok(())
    }

    /// Takes an image's manifest, whose blobs are here, without a name.
    pub(super) async fn put_manifest(&self, bytes: &Bytes) -> Result<()> {
        match self {
            Self::Layout { .. } => self.put_bytes(bytes).await,
            Self::Registry {
                client, reference, ..
            } => {
                let target = Target::Digest(Digest::of(bytes));
                client
                    .push_manifest(&reference.repository, &target, OCI_MANIFEST, bytes)
                    .await
            }
        }
    }

    /// Takes a manifest or index of media type `media_type`, all parts of which are here, under the destination's name.
    pub(super) async fn name(&self, media_type: &'static str, bytes: &Bytes) -> Result<()> {
        match self {
            Self::Layout { layout, name, .. } => {
                self.put_bytes(bytes).await?;
                let (layout, name) = (Arc::clone(layout), name.clone());
                let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
                let named = on_thread(move || layout.name(&name, media_type, &digest, size));
                named.await
            }
            Self::Registry {
                client, reference, ..
            } => {
                let target = reference.target();
                client
                    .push_manifest(&reference.repository, &target, media_type, bytes)
                    .await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_as_users_write_them() {
        let layout = |text: &str| match Place::parse(text).unwrap() {
            Place::Layout { path, name } => format!("{} {name}", path.display()),
            Place::Reference(reference) => panic!("{reference}"),
        };
        assert_eq!(layout("oci:a/b"), "a/b latest");
        assert_eq!(layout("oci:/a/b:team/app:1"), "/a/b team/app:1");
        let place = Place::parse("h.io/a").unwrap();
        assert_eq!(place.host(), Some("h.io"));
        for text in ["oci:", "De bian", &format!("h.io/a@{}", Digest::of(b""))] {
            assert_eq!(Place::parse(text).unwrap_err().exit_code(), 2, "{text}");
        }
    }
}
