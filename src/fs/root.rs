//! What a mount shows at its root: all registries, one of them, or the root filesystem of one image.
//!
//! The kernel's name for the root is always inode 1. Which inode of ours that is gets decided here once, when the tree is
//! opened: the tree of names has an inode 1 of its own; a merged tree has its root in a slot, and 1 stands for that.

use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::Filesystem;
use crate::fs::ino::{Place, in_slot, place};
use crate::fs::nodes::Kind;
use crate::fs::ops::{Caller, ROOT_INO};
use crate::fs::slots::Slot;
use crate::image::Rootfs;
use crate::image::tree::ROOT;
use crate::registry::reference::Reference;

/// What is to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// All registries, by their hosts.
    Registries,
    /// The repositories of one registry, by its canonical host.
    Registry(String),
    /// The root filesystem of an image, as the reference resolves when the tree is opened.
    Rootfs(Reference),
}

impl Root {
    /// The one registry that is shown, if it is but one.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Self::Registries => None,
            Self::Registry(host) => Some(host),
            Self::Rootfs(reference) => Some(reference.repository.host()),
        }
    }

    /// What inode 1 of the tree of names is.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Registry(host) => Kind::Registry { host: host.clone() },
            Self::Registries | Self::Rootfs(_) => Kind::Root,
        }
    }
}

/// A root that was resolved.
#[derive(Debug)]
pub(super) enum Top {
    /// The root of the tree of names.
    Names,
    /// The root of a merged tree.
    Tree {
        slot: Arc<Slot>,
        /// What the reference names.
        digest: Digest,
        /// Whether it is for the mount's owner only.
        is_private: bool,
    },
}

impl Top {
    /// The merged tree that is shown.
    pub(super) fn rootfs(&self) -> Option<&Arc<Rootfs>> {
        match self {
            Self::Names => None,
            Self::Tree { slot, .. } => Some(&slot.rootfs),
        }
    }
}

impl Filesystem {
    /// The digest of the image whose root filesystem is shown, as its reference named it when the tree was opened.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        match self.top() {
            Top::Names => None,
            Top::Tree { digest, .. } => Some(*digest),
        }
    }

    /// Whether nobody but the owner may enter the mount, because what it shows came with his credentials.
    #[must_use]
    pub fn is_private(&self) -> bool {
        matches!(self.top(), Top::Tree { is_private: true, .. })
    }

    /// Says which table knows an inode by the number that the kernel has for it.
    pub(super) fn place(&self, ino: u64) -> Place {
        match self.top() {
            Top::Tree { slot, .. } if ino == ROOT_INO => Place::Slot {
                slot: slot.number,
                node: ROOT,
            },
            _ => place(ino),
        }
    }

    /// Refuses a registry that this mount's configuration does not allow.
    pub(super) fn check_root(&self, root: &Root) -> Result<()> {
        let owner = Caller {
            pid: 0,
            uid: self.options().owner_uid,
            gid: 0,
        };
        match root.host().filter(|host| !self.may_be_reached(owner, host)) {
            Some(host) => Err(Error::denied(
                host,
                "the configuration does not allow this registry here: see allow and deny",
            )),
            None => Ok(()),
        }
    }

    /// Resolves a reference and opens its root filesystem, for good: the image stays what it is now.
    pub(super) async fn open_top(&self, reference: &Reference) -> Result<Top> {
        let images = self.images();
        let (digest, stale) = images.digest(reference).await?;
        if let Some(why) = stale {
            tracing::warn!(%reference, %digest, %why, "cannot ask the registry: this is what was last heard");
        }
        let platform = &self.options().platform;
        let image = images.image(&reference.repository, &digest, platform).await?;
        let rootfs = images.rootfs(&image).await?;
        self.touch(&rootfs);
        let is_private = self.is_closed_root(&reference.repository, &digest, &image).await;
        let path = String::new();
        let dirs = self.slot(self.view_key(&path, &digest)).await?;
        let files = Slot::files(self.slot(format!("files {}", rootfs.key())).await?, rootfs);
        // Above the root is the root, as in every filesystem.
        let slot = Slot::view(dirs, path, in_slot(dirs, ROOT), files);
        let root = slot.rootfs.vouch(slot.rootfs.tree().node(ROOT)?)?;
        // The kernel holds the root from the beginning to the end, without a lookup.
        self.slots().count(&slot, &root);
        Ok(Top::Tree {
            slot,
            digest,
            is_private,
        })
    }
}
