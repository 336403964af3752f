//! What only its owner sees of a mount that others may enter: what came with his credentials (`image/openness.rs`).
//!
//! The kernel keeps names and attributes below a digest for ever, so it is the kernel that keeps others out, by modes: an
//! image's directory is 0500 and its owner's until the image is known to be open, and so are reports on failures (0400).
//! The names of a registry that was asked with credentials are the owner's to list, but everyone may walk through them
//! (0511), because what they lead to may be open.
//!
//! A bare name is a directory before anybody knows that it is an image, so the kernel may have let others in by then. They
//! still have to look up a name of the image's own, and who asks is known there. For as long as one of them could be under
//! way, those names are not kept by the kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::Filesystem;
use crate::fs::nodes::{ImageAt, Kind, NameNode, STATE_INO};
use crate::fs::ops::{Caller, Entry, FOREVER};
use crate::image::openness::ImageId;
use crate::image::{Image, Named};
use crate::registry::reference::Repository;

/// How long somebody waits for whether an image is open to everyone, whom it would be closed to otherwise.
const STRANGER_WAIT: Duration = Duration::from_secs(2);
/// How long a walk may take from the kernel's look at a directory's mode, which it keeps for a second, to the lookup of a
/// name in it. Far more than any does.
const WALK_MAX: Duration = Duration::from_secs(10);

/// Whether an image is closed to others than the mount's owner.
#[derive(Debug)]
pub(super) struct Privacy {
    is_hidden: AtomicBool,
    is_checking: AtomicBool,
}

impl Privacy {
    /// Closed until it is known to be open, where the mount hides anything.
    pub(super) fn new(hides: bool) -> Self {
        Self {
            is_hidden: AtomicBool::new(hides),
            is_checking: AtomicBool::new(false),
        }
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.is_hidden.load(Ordering::Acquire)
    }

    fn show(&self) {
        self.is_hidden.store(false, Ordering::Release);
    }
}

/// What must be open for an image to be so: what its reference names, and the image chosen from an index.
fn images_of(repository: &Repository, digest: &Digest, chosen: Option<&Image>) -> Vec<ImageId> {
    let chosen = chosen.map(Image::digest).filter(|chosen| *chosen != digest);
    let digests = std::iter::once(digest).chain(chosen);
    digests.map(|digest| (repository.clone(), *digest)).collect()
}

fn images_at(at: &ImageAt) -> Vec<ImageId> {
    let repository = match &at.named {
        Named::Image(image) => image.repository(),
        Named::Index(index) => &index.repository,
    };
    images_of(repository, at.digest(), at.image.as_deref().ok())
}

fn refused(path: &str) -> Error {
    Error::denied(
        path,
        "it came with the credentials of the mount's owner, who alone may see it without share_private",
    )
}

/// A lookup that was counted and is not answered yet. It is taken back where whoever asked was interrupted, because the
/// kernel, which never learned of it, will not.
struct Counted<'a>(Option<(&'a Filesystem, u64)>);

impl Counted<'_> {
    fn answered(mut self) {
        self.0 = None;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some((filesystem, ino)) = self.0.take() {
            filesystem.nodes().forget(ino, 1);
        }
    }
}

impl Filesystem {
    /// Whether the mount's owner is somebody else, before whom something is hidden. Root is nobody's stranger: the kernel
    /// would let him in.
    pub(super) fn is_stranger(&self, caller: Caller) -> bool {
        let options = self.options();
        options.hides_private && caller.uid != options.owner_uid && caller.uid != 0
    }

    /// The permission bits of a name inode.
    pub(super) fn mode_of(&self, node: &NameNode) -> u16 {
        if !node.is_dir() {
            let is_report = node.parent() == STATE_INO && !node.path.ends_with("/version");
            return match is_report && self.options().hides_private {
                true => 0o400,
                false => 0o444,
            };
        }
        match &node.kind {
            Kind::Registry { host } if !self.is_configured(host) => 0o500,
            _ if node.image().is_some_and(|at| at.privacy.is_hidden()) => 0o500,
            _ if self.is_owners_list(node) => 0o511,
            _ => 0o555,
        }
    }

    /// The registry that a directory of names belongs to, where anything is hidden.
    fn host_of_names<'a>(&self, node: &'a NameNode) -> Option<&'a str> {
        match &node.kind {
            _ if !self.options().hides_private => None,
            Kind::Registry { host } => Some(host),
            Kind::Bare(bare) if node.image().is_none() => Some(&bare.host),
            _ => None,
        }
    }

    /// Whether only the owner may list a directory: its registry was asked with credentials, so its names may be private.
    pub(super) fn is_owners_list(&self, node: &NameNode) -> bool {
        let openness = self.images().resolver().openness();
        self.host_of_names(node)
            .is_some_and(|host| openness.may_be_private(host) == Some(true))
    }

    /// Whether the first answer of its registry decides who may list a directory: until then the kernel asks each time.
    pub(super) fn is_unsettled(&self, node: &NameNode) -> bool {
        let openness = self.images().resolver().openness();
        self.host_of_names(node)
            .is_some_and(|host| openness.may_be_private(host).is_none())
    }

    /// Whether an image at the root of the mount is for its owner only. Its directory is the image's own, so no mode can say
    /// that: nobody else may enter the mount at all.
    pub(super) async fn is_closed_root(
        &self,
        repository: &Repository,
        digest: &Digest,
        chosen: &Image,
    ) -> bool {
        if !self.options().hides_private {
            return false;
        }
        let images = images_of(repository, digest, Some(chosen));
        let check = self.images().resolver().openness().check(&images);
        tokio::time::timeout(STRANGER_WAIT, check).await != Ok(true)
    }

    /// Finds out whether an image that is hidden so far is open: at once if that is known, else in the background.
    pub(super) async fn settle(&self, at: &Arc<ImageAt>) {
        if !at.privacy.is_hidden() {
            return;
        }
        let openness = Arc::clone(self.images().resolver().openness());
        let images = images_at(at);
        if openness.are_open(&images).await {
            return at.privacy.show();
        }
        if at.privacy.is_checking.swap(true, Ordering::AcqRel) {
            return;
        }
        let at = Arc::clone(at);
        self.images().fetcher().runtime().spawn(async move {
            if openness.check(&images).await {
                at.privacy.show();
            }
            at.privacy.is_checking.store(false, Ordering::Release);
        });
    }

    /// Lets the caller into an image, or refuses. Who would be refused waits for what the registry says.
    pub(super) async fn admit(&self, caller: Caller, path: &str, at: &Arc<ImageAt>) -> Result<()> {
        if !self.is_stranger(caller) || !at.privacy.is_hidden() {
            return Ok(());
        }
        let images = images_at(at);
        let check = self.images().resolver().openness().check(&images);
        match tokio::time::timeout(STRANGER_WAIT, check).await {
            Ok(true) => {
                at.privacy.show();
                Ok(())
            }
            Ok(false) | Err(_) => Err(refused(path)),
        }
    }

    /// The answer to the lookup of an image's directory, which has been counted, under a name that is kept for `ttl` if the
    /// image is open. Whoever it is closed to learns so from its mode.
    pub(super) async fn image_entry(&self, caller: Caller, node: &NameNode, mut ttl: Duration) -> Entry {
        let counted = Counted(Some((self, node.ino)));
        if let Kind::Image(at) = &node.kind {
            self.settle(at).await;
            let _ = self.admit(caller, &node.path, at).await;
            if at.privacy.is_hidden() {
                ttl = ttl.min(self.images().resolver().tag_ttl());
            }
        }
        counted.answered();
        self.name_entry(node, ttl)
    }

    /// An answer to the lookup of a name inode.
    pub(super) fn name_entry(&self, node: &NameNode, entry_ttl: Duration) -> Entry {
        Entry {
            attr: self.name_attr(node),
            attr_ttl: self.name_attr_ttl(node),
            entry_ttl,
        }
    }

    /// Refuses what is known to be closed to the caller.
    pub(super) fn admit_now(&self, caller: Caller, dir: &NameNode) -> Result<()> {
        let is_closed = || self.is_owners_list(dir) || dir.image().is_some_and(|at| at.privacy.is_hidden());
        match self.is_stranger(caller) && is_closed() {
            true => Err(refused(&dir.path)),
            false => Ok(()),
        }
    }

    /// How long the kernel may keep one of an image's own names.
    pub(super) fn own_ttl(&self, dir: &NameNode, at: &ImageAt) -> Duration {
        let is_fresh = match &dir.kind {
            Kind::Bare(bare) => bare
                .bound_since
                .get()
                .is_none_or(|since| since.elapsed() < WALK_MAX),
            _ => false,
        };
        match at.privacy.is_hidden() && is_fresh {
            true => Duration::ZERO,
            false => FOREVER,
        }
    }
}
