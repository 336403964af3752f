//! `registryfs umount`.

use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use super::output::note;
use crate::daemon;
use crate::error::Result;
use crate::fuse::Unmount;

/// Unmount; returns when the daemon has ended, if that was its last mount
#[derive(Debug, Args)]
pub(super) struct Umount {
    /// Take a mount that is in use out of the tree at once; who uses it goes on
    #[arg(short, long)]
    lazy: bool,
    /// Take it out of the tree at once, and let every use of it fail
    #[arg(short, long, conflicts_with = "lazy")]
    force: bool,
    /// Remove every mount whose daemon is gone
    #[arg(long, conflicts_with_all = ["lazy", "force", "mountpoint"])]
    dead: bool,
    /// Where
    #[arg(required_unless_present = "dead")]
    mountpoint: Option<PathBuf>,
}

impl Umount {
    pub(super) async fn run(&self, context: &Context) -> Result<()> {
        let how = match self {
            Self { force: true, .. } => Unmount::Abort,
            Self { lazy: true, .. } => Unmount::Lazy,
            _ => Unmount::Idle,
        };
        if let Some(mountpoint) = &self.mountpoint {
            return daemon::unmount(&context.loaded, mountpoint, how).await;
        }
        for mountpoint in daemon::unmount_dead().await? {
            note(&format!("removed the dead mount at {}", mountpoint.display()));
        }
        Ok(())
    }
}
