//! `registryfs convert`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::profile;
use super::progress::{Bar, LOOK_INTERVAL};
use super::text::visible_name;
use crate::config::parse_bytes;
use crate::convert::{Progress, Report, Request, convert};
use crate::error::{Error, Result};

/// Where large temporary files belong if TMPDIR does not say it.
const SCRATCH_DIR: &str = "/var/tmp";
/// How many missing files are named one by one.
const MISSING_SHOWN_MAX: usize = 10;

/// Write an image's layers as eStargz, into a layout on disk or a registry
#[derive(Debug, Args)]
#[command(after_long_help = "\
Layers of every format are taken. What else there is to the image stays: its history, its configuration but for the DiffIDs, \
its annotations. The media types become those of OCI. The same image and options give the same bytes.

To push, credentials are needed as for pulling; --credential is for the registry of DST. Blobs that are there already are \
not sent again. A layer that is eStargz already is kept, unless an option asks for another.

Each layer under way takes up its unpacked and its new size in temporary files, in TMPDIR or /var/tmp. They have no names \
and vanish with the process.")]
pub(super) struct Convert {
    /// The image: a reference, or oci:PATH[:TAG]
    #[arg(value_name = "SRC")]
    source: String,
    /// Where it goes: a reference, or oci:PATH[:TAG]
    #[arg(value_name = "DST")]
    destination: String,
    /// Cut files into chunks of this size [default: 4MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    chunk_size: Option<u64>,
    /// Compress small files together until they have this size [default: 0, each by itself]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    min_chunk_size: Option<u64>,
    /// Put the files of a profile first, to be prefetched in this order: what `record` wrote, or paths, one a line; - is
    /// standard input
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Compress so much, 0 to 9 [default: 6]
    #[arg(long, value_name = "LEVEL")]
    compression_level: Option<u32>,
    /// Convert the images of all platforms
    #[arg(long)]
    all_platforms: bool,
    /// Write layers anew that are eStargz already
    #[arg(long)]
    force: bool,
}

impl Convert {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let prioritized = match &self.profile {
            Some(file) => Some(profile::read(file).await?),
            None => None,
        };
        let request = Request {
            source: self.source.clone(),
            destination: self.destination.clone(),
            all_platforms: self.all_platforms,
            chunk_bytes: self.chunk_size,
            min_chunk_bytes: self.min_chunk_size,
            level: self.compression_level,
            prioritized,
            force: self.force,
            scratch_dir: scratch_dir(),
        };
        let progress = Arc::new(Progress::default());
        let report = {
            let bar = Bar::new(&context.globals, &self.source);
            let showing = async {
                loop {
                    bar.show(progress.done_bytes(), progress.total_bytes());
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            };
            tokio::select! {
                result = convert(&context.loaded.config, &request, &progress) => result?,
                () = showing => return Err(Error::Interrupted),
            }
        };
        warn(&report);
        match out.format {
            Format::Json => out.json(&report),
            Format::Text => out.line(format_args!("{}@{}", report.reference, report.digest)),
        }
    }
}

/// Where temporary files go: an empty TMPDIR says nothing.
fn scratch_dir() -> PathBuf {
    let dir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
    dir.map_or_else(|| SCRATCH_DIR.into(), PathBuf::from)
}

fn warn(report: &Report) {
    for path in report.missing.iter().take(MISSING_SHOWN_MAX) {
        note(&format!(
            "warning: no layer has the file {} of the profile",
            visible_name(path)
        ));
    }
    let more = report.missing.len().saturating_sub(MISSING_SHOWN_MAX);
    if more > 0 {
        note(&format!("warning: nor {more} more"));
    }
    if report.left_out > 0 {
        note(&format!(
            "warning: {} entries of the index are left out: they are no images, but about the images as they were",
            report.left_out
        ));
    }
}
