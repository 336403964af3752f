//! A tree and what carries it to programs: a FUSE mount of ours, whose root filesystems the kernel may have mounted over, or,
//! for a single image, the kernel's own mount.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::digest::Digest;
use crate::error::Result;
use crate::fs::Filesystem;
use crate::fuse::Mount;
use crate::kernel::{Covering, KernelMount};

/// What serves a tree, as it is to be mounted.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) tree: Filesystem,
    pub(super) kernel: Carried,
}

/// What kernel mode does for a tree.
#[derive(Debug, Clone)]
pub(super) enum Carried {
    /// It mounts root filesystems over the tree's.
    Covered(Arc<Covering>),
    /// It can mount the one image that the tree shows.
    Whole(crate::kernel::Kernel),
    /// Nothing, because of this.
    Not(String),
}

/// A tree and its mount. Dropping it unmounts: nothing may be left without someone who answers.
#[derive(Debug)]
pub(super) struct Mounted {
    carrier: Carrier,
    tree: Filesystem,
}

#[derive(Debug)]
enum Carrier {
    Fuse { mount: Arc<Mount>, kernel: Carried },
    Kernel(KernelMount),
}

impl Mounted {
    /// A tree that we serve, with what kernel mode does for it.
    pub(super) fn by_fuse(mount: Mount, tree: Filesystem, kernel: Carried) -> Self {
        let mount = Arc::new(mount);
        if let Carried::Covered(covering) = &kernel {
            covering.begin(&tree, &mount);
        }
        Self {
            carrier: Carrier::Fuse { mount, kernel },
            tree,
        }
    }

    /// The tree of one image, which the kernel serves.
    pub(super) fn by_kernel(mount: KernelMount, tree: Filesystem) -> Self {
        Self {
            carrier: Carrier::Kernel(mount),
            tree,
        }
    }

    /// Unmounts; blocks. A busy mount is [`crate::error::Error::Busy`] naming who is busy.
    pub(super) fn unmount(&self) -> Result<()> {
        match &self.carrier {
            Carrier::Kernel(mount) => mount.unmount(false),
            Carrier::Fuse {
                mount,
                kernel: Carried::Covered(covering),
            } => {
                covering.pause();
                mount.unmount(false).inspect_err(|_| covering.resume())?;
                covering.end();
                Ok(())
            }
            Carrier::Fuse { mount, .. } => mount.unmount(false),
        }
    }

    /// Unmounts whoever uses it; blocks.
    pub(super) fn abort(&self) -> Result<()> {
        match &self.carrier {
            Carrier::Kernel(mount) => mount.unmount(true),
            Carrier::Fuse { mount, kernel } => {
                if let Carried::Covered(covering) = kernel {
                    covering.end();
                }
                mount.abort()
            }
        }
    }

    /// Whether nobody can use it any more.
    pub(super) fn has_ended(&self) -> bool {
        match &self.carrier {
            Carrier::Fuse { mount, .. } => mount.has_ended(),
            Carrier::Kernel(mount) => mount.has_ended(),
        }
    }

    /// Whether it still has its place in the tree; one that was unmounted lazily has not.
    pub(super) fn is_attached(&self) -> bool {
        match &self.carrier {
            Carrier::Fuse { mount, .. } => mount.is_attached(),
            Carrier::Kernel(mount) => mount.is_attached(),
        }
    }

    /// Sees that it answers; blocks. Needs no network. What the kernel serves always does.
    pub(super) fn see_it_answers(&self) -> Result<()> {
        match &self.carrier {
            Carrier::Fuse { mount, .. } => mount.see_it_answers(),
            Carrier::Kernel(_) => Ok(()),
        }
    }

    /// Waits until the mount is gone, whoever unmounted.
    pub(super) async fn ended(&self) {
        match &self.carrier {
            Carrier::Fuse { mount, .. } => mount.ended().await,
            Carrier::Kernel(mount) => mount.ended().await,
        }
    }

    /// The requests that reached the daemon, by operation. The kernel's own mounts make none.
    pub(super) fn requests(&self) -> Value {
        match &self.carrier {
            Carrier::Fuse { mount, .. } => json!(mount.counters().by_operation),
            Carrier::Kernel(_) => json!({}),
        }
    }

    /// What serves its root filesystems, in words, and how many the kernel does now.
    pub(super) fn kernel(&self) -> Value {
        match &self.carrier {
            Carrier::Kernel(mount) => json!({ "served_by": mount.served_by() }),
            Carrier::Fuse {
                kernel: Carried::Covered(covering),
                ..
            } => json!({ "served_by": "kernel (EROFS), at first access", "mounted": covering.count() }),
            Carrier::Fuse {
                kernel: Carried::Not(why),
                ..
            } => json!({ "served_by": "FUSE", "why": why }),
            Carrier::Fuse { .. } => json!({ "served_by": "FUSE" }),
        }
    }

    /// Whether nobody but the owner may enter, because what is mounted came with his credentials.
    pub(super) fn is_private(&self) -> bool {
        self.tree.is_private()
    }

    /// The image that is mounted, where it is one.
    pub(super) fn digest(&self) -> Option<Digest> {
        self.tree.digest()
    }

    /// The last failed operations, each an object.
    pub(super) fn errors(&self) -> Vec<Value> {
        let entries = self.tree.journal().entries();
        entries.iter().map(|failure| json!(failure)).collect()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What covers the tree knows the tree, and the tree what covers it.
        if let Carrier::Fuse {
            kernel: Carried::Covered(covering),
            ..
        } = &self.carrier
        {
            covering.end();
        }
    }
}
