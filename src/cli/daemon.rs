//! `registryfs daemon`.

use clap::Args;

use super::context::Context;
use super::output::note;
use crate::error::Result;

/// Mount what the configuration names and stay, for a service manager
#[derive(Debug, Args)]
pub(super) struct Daemon {
    /// Take orders from the `mount` that started this process
    #[arg(long, hide = true)]
    spawned: bool,
}

impl Daemon {
    pub(super) fn is_spawned(&self) -> bool {
        self.spawned
    }

    pub(super) fn run(&self, context: &Context) -> Result<()> {
        crate::daemon::daemon(&context.loaded.config, note)
    }
}
