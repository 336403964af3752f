//! `registryfs record`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::target::Target;
use crate::daemon::Query;
use crate::error::{Error, Result};
use crate::image::profile;
use crate::image::recorded::Recorded;

/// Write which files of a mounted image were read, in the order of their first reads
#[derive(Debug, Args)]
#[command(after_long_help = "\
Mount the image, run the program in it, then ask while it is mounted: the daemon remembers what was read since it first \
served the image, and forgets it when it ends. The list is an access profile for `prefetch --profile` and `convert --profile`: \
a line is {\"path\":…,\"manifestDigest\":…,\"layerIndex\":…}, as `ctr-remote optimize --record-out` writes it, with \
\"pathBytes\" in base64 for a name that is no UTF-8.

What the kernel reads by itself is not seen; a warning says so. In kernel mode its read-ahead adds files beside those that \
were read: a mount with -o kernel=off leaves these out.")]
pub(super) struct Record {
    /// The image
    reference: String,
    /// Write the list to this file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Afterwards begin anew: what is read from then on, and is not in the kernel's memory, is the next list
    #[arg(long)]
    restart: bool,
}

impl Record {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Record {
            image: context.image(&self.reference),
            restart: self.restart,
        };
        // A place that cannot be written to is told before anything is forgotten.
        let target = self.output.as_deref().map(target).transpose()?;
        let recorded: Recorded = context.session().ask(query).await?;
        out.note_stale(recorded.stale.as_deref());
        for gap in &recorded.gaps {
            note(&format!("warning: files may be missing. {gap}"));
        }
        if recorded.is_rough {
            note(
                "the kernel has served the image: files that it has only read ahead, beside others, may be in the list; \
                 a mount with -o kernel=off leaves these out",
            );
        }
        let mut text = Vec::new();
        for (path, layer) in &recorded.files {
            text.extend(profile::line(&path.0, &recorded.manifest, *layer)?);
        }
        let (Some((mut target, path)), files) = (target, recorded.files.len()) else {
            return out.bytes(&text);
        };
        let write = target.file.write_all(&text).and_then(|()| target.finish());
        write.map_err(|error| failed(path, &error))?;
        match out.format {
            Format::Json => out.json(&serde_json::json!({
                "reference": recorded.reference,
                "files": files,
                "gaps": recorded.gaps,
                "is_rough": recorded.is_rough,
            })),
            Format::Text => out.line(format!("{files} files were read")),
        }
    }
}

fn target(path: &Path) -> Result<(Target, &Path)> {
    let target = Target::new(path).map_err(|error| failed(path, &error))?;
    Ok((target, path))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::io(path.display().to_string(), error)
}
