//! `registryfs mount`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::context::Context;
use super::mount_options::MountOptions;
use super::output::note;
use super::progress::show_passes;
use crate::daemon::{self, MountRequest, MountSource, allow_other_default};
use crate::error::{Error, Result};
use crate::fuse::resolve_new_mountpoint;

/// Mount registries, or an image, as a directory tree; returns when it answers
#[derive(Debug, Args)]
#[command(override_usage = "registryfs mount [OPTIONS] [SOURCE] <MOUNTPOINT>")]
pub(super) struct Mount {
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Stay in the foreground until it is unmounted
    #[arg(short, long)]
    foreground: bool,
    /// What to mount, and where: SOURCE is nothing or `none` for all registries, a registry, an image, or oci:PATH[:TAG]
    ///
    /// A registry has no slash, and a dot (before its port) or is localhost; or a slash at its end: docker.io,
    /// localhost:5000, registry:5000/. An image is a reference, whose root filesystem is mounted: debian:12,
    /// ghcr.io/org/app@sha256:… . oci:PATH is an OCI image layout on disk: with TAG, or if it has but one image, the root
    /// filesystem of that image, else all its images.
    // One list, because clap puts what follows a `--` into the last of two arguments.
    #[arg(value_names = ["SOURCE", "MOUNTPOINT"], num_args = 1..=2, required = true)]
    places: Vec<PathBuf>,
}

impl Mount {
    pub(super) fn is_foreground(&self) -> bool {
        self.foreground
    }

    pub(super) async fn run(&self, context: &mut Context) -> Result<()> {
        let request = self.request(context)?;
        let verbosity = context.globals.verbosity();
        daemon::mount(
            &context.loaded,
            &request,
            verbosity,
            show_passes(&context.globals),
        )
        .await
    }

    /// Mounts with a runtime of the daemon's own.
    pub(super) fn run_foreground(&self, context: &mut Context) -> Result<()> {
        let request = self.request(context)?;
        daemon::foreground(&context.loaded, request, context.globals.verbosity())
    }

    /// SOURCE and MOUNTPOINT.
    fn places(&self) -> Result<(Option<String>, &Path)> {
        let utf8 = |source: &Path| {
            let why = || Error::usage(format!("SOURCE {} is not UTF-8", source.display()));
            source.to_str().map(str::to_owned).ok_or_else(why)
        };
        match self.places.as_slice() {
            [mountpoint] => Ok((None, mountpoint)),
            [source, mountpoint] => Ok((Some(utf8(source)?), mountpoint)),
            more => Err(Error::usage(format!(
                "{} arguments; mount takes SOURCE and MOUNTPOINT",
                more.len()
            ))),
        }
    }

    fn request(&self, context: &mut Context) -> Result<MountRequest> {
        let (shown_source, mountpoint) = self.places()?;
        let source = MountSource::parse(shown_source.as_deref().unwrap_or_default())?;
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
            mountpoint: resolve_new_mountpoint(mountpoint)?,
            source,
            platform: config.platform.clone(),
            allow_other: options.allow_other.unwrap_or_else(allow_other_default),
            shown_source,
            no_exec: options.no_exec,
            place: None,
            allow: config.allow.clone(),
            deny: config.deny.clone(),
            share_private: config.share_private,
            kernel: config.kernel,
            background: config.background,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        mount: Mount,
    }

    #[test]
    fn the_last_of_one_or_two_arguments_is_the_mountpoint() {
        for (line, source, mountpoint) in [
            ("/m", None, "/m"),
            ("none /m", Some("none"), "/m"),
            ("-- /m", None, "/m"),
            ("-- none /m", Some("none"), "/m"),
            ("none -- /m", Some("none"), "/m"),
            ("-o ro none -f /m", Some("none"), "/m"),
            ("none -o ro /m", Some("none"), "/m"),
            ("none /m -o ro", Some("none"), "/m"),
            ("-- -a -b", Some("-a"), "-b"),
        ] {
            let words = ["mount"].into_iter().chain(line.split(' '));
            let parsed = Line::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
            let places = parsed.mount.places().unwrap();
            assert_eq!(
                places,
                (source.map(str::to_owned), Path::new(mountpoint)),
                "{line}"
            );
        }
        assert!(Line::try_parse_from(["mount", "-f"]).is_err());
        let many = ["mount", "a", "b", "-f", "c"];
        assert!(Line::try_parse_from(many).map_or(true, |line| line.mount.places().is_err()));
    }
}
