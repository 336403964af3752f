//! An image's root filesystem, mounted at a directory by itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::error::Result;
use crate::fuse::{Attachment, Detach, mounted};
use crate::image::Rootfs;
use crate::kernel::Kernel;
use crate::kernel::places::Owner;
use crate::kernel::superblocks::Target;

/// How long the helper may take.
const DEADLINE: Duration = Duration::from_secs(15);

/// How to mount.
#[derive(Debug, Clone)]
pub struct DirectOptions {
    /// Where, an existing directory.
    pub mountpoint: PathBuf,
    /// Where autofs guards it: another way there.
    pub place: Option<PathBuf>,
    /// What the mount table shows as the source.
    pub source: String,
    /// Whether no program of it can be run.
    pub no_exec: bool,
}

/// The mount of one image. Dropping it takes it out of the tree of directories; who uses it goes on.
#[derive(Debug)]
pub struct KernelMount {
    kernel: Kernel,
    attachment: Attachment,
    gone: watch::Receiver<bool>,
    served_by: String,
}

impl Kernel {
    /// Mounts a merged tree at a directory.
    ///
    /// # Errors
    /// What keeps the image from being written or mounted.
    pub async fn mount_at(&self, rootfs: &Arc<Rootfs>, options: &DirectOptions) -> Result<KernelMount> {
        let target = Target {
            mountpoint: options.mountpoint.clone(),
            guarded: options.place.clone(),
            deadline: DEADLINE,
        };
        let (superblock, attachment) = self
            .attached(rootfs, &options.source, options.no_exec, target)
            .await?;
        let (tell, gone) = watch::channel(false);
        let served_by = superblock.served_by();
        self.note_place(attachment.clone(), superblock, Owner::Mountpoint(tell));
        Ok(KernelMount {
            kernel: self.clone(),
            attachment,
            gone,
            served_by,
        })
    }
}

impl KernelMount {
    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.attachment.mountpoint
    }

    /// In words, how it is served.
    #[must_use]
    pub fn served_by(&self) -> &str {
        &self.served_by
    }

    /// Unmounts. While it is busy this fails and names who uses it; `lazy` takes it out of the tree of directories in any
    /// case, and who uses it goes on. Blocks.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        let how = if lazy { Detach::Lazy } else { Detach::Idle };
        let mut outcomes = self.kernel.detach(std::slice::from_ref(&self.attachment), how)?;
        outcomes.pop().unwrap_or(Ok(()))
    }

    /// Whether it has lost its place, and nothing is left of it but what somebody uses.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        *self.gone.borrow()
    }

    /// Whether it still has its place.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        !self.has_ended()
            && mounted(std::slice::from_ref(&self.attachment))
                .map_or(true, |found| found.iter().any(Option::is_some))
    }

    /// Resolves when it has lost its place, whoever took it.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut gone = self.gone.clone();
        async move {
            // A sender that is gone means the same.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        if self.has_ended() {
            return;
        }
        if let Err(error) = self.unmount(true) {
            tracing::warn!(mountpoint = %self.mountpoint().display(), %error, "could not unmount");
        }
    }
}
