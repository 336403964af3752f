//! `registryfs mount`.

use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use super::mount_options::MountOptions;
use super::output::note;
use crate::daemon::{self, MountRequest, allow_other_default};
use crate::error::{Error, Result};
use crate::fuse::resolve_new_mountpoint;

/// Mount registries as a directory tree; returns when it answers
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(super) struct Mount {
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Stay in the foreground until it is unmounted
    #[arg(short, long)]
    foreground: bool,
    /// What to mount: `none`, or nothing, for all registries
    source: Option<String>,
    /// Where
    mountpoint: PathBuf,
}

impl Mount {
    pub(super) fn is_foreground(&self) -> bool {
        self.foreground
    }

    pub(super) async fn run(&self, context: &mut Context) -> Result<()> {
        let request = self.request(context)?;
        daemon::mount(&context.loaded, &request, context.globals.verbosity()).await
    }

    /// Mounts with a runtime of the daemon's own.
    pub(super) fn run_foreground(&self, context: &mut Context) -> Result<()> {
        let request = self.request(context)?;
        daemon::foreground(&context.loaded, request, context.globals.verbosity())
    }

    fn request(&self, context: &mut Context) -> Result<MountRequest> {
        if let Some(source) = self.source.as_deref().filter(|&source| source != "none") {
            return Err(Error::usage(format!(
                "{source}: only all registries together (`none`) can be mounted in this version; registry hosts, references and oci: layouts cannot yet"
            )));
        }
        let options = MountOptions::parse(&self.options)?;
        context.with(options.layer)?;
        let config = &context.loaded.config;
        if config.credential.is_some() && config.allow.is_empty() && config.registries.is_empty() {
            note(
                "warning: the credential goes to every registry below the mount that asks for one; -o allow=HOST limits that",
            );
        }
        Ok(MountRequest {
            mountpoint: resolve_new_mountpoint(&self.mountpoint)?,
            platform: config.platform.clone(),
            allow_other: options.allow_other.unwrap_or_else(allow_other_default),
            shown_source: self.source.clone(),
            no_exec: options.no_exec,
            place: None,
            allow: config.allow.clone(),
            deny: config.deny.clone(),
        })
    }
}
