//! `registryfs umount`.

use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use crate::daemon;
use crate::error::Result;

/// Unmount; returns when the daemon has ended, if that was its last mount
#[derive(Debug, Args)]
pub(super) struct Umount {
    /// Where
    mountpoint: PathBuf,
}

impl Umount {
    pub(super) async fn run(&self, context: &Context) -> Result<()> {
        daemon::unmount(&context.loaded, &self.mountpoint).await
    }
}
