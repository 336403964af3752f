//! `registryfs mount`.

use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use super::mount_options::MountOptions;
use super::output::note;
use crate::daemon::{self, MountRequest, MountSource, allow_other_default};
use crate::error::Result;
use crate::fuse::resolve_new_mountpoint;

/// Mount registries, or an image, as a directory tree; returns when it answers
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(super) struct Mount {
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Stay in the foreground until it is unmounted
    #[arg(short, long)]
    foreground: bool,
    /// What to mount: nothing or `none` for all registries, a registry, an image, or oci:PATH[:TAG]
    ///
    /// A registry has no slash, and a dot (before its port) or is localhost; or a slash at its end: docker.io,
    /// localhost:5000, registry:5000/. An image is a reference, whose root filesystem is mounted: debian:12,
    /// ghcr.io/org/app@sha256:… . oci:PATH is an OCI image layout on disk: with TAG, or if it has but one image, the root
    /// filesystem of that image, else all its images.
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
        let source = MountSource::parse(self.source.as_deref().unwrap_or_default())?;
        let options = MountOptions::parse(&self.options)?;
        context.with(options.layer)?;
        let config = &context.loaded.config;
        if source == MountSource::Registries
            && config.credential.is_some()
            && config.allow.is_empty()
            && config.registries.is_empty()
        {
            note(
                "warning: the credential goes to every registry below the mount that asks for one; -o allow=HOST limits that",
            );
        }
        Ok(MountRequest {
            mountpoint: resolve_new_mountpoint(&self.mountpoint)?,
            source,
            platform: config.platform.clone(),
            allow_other: options.allow_other.unwrap_or_else(allow_other_default),
            shown_source: self.source.clone(),
            no_exec: options.no_exec,
            place: None,
            allow: config.allow.clone(),
            deny: config.deny.clone(),
            share_private: config.share_private,
        })
    }
}
