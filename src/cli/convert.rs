//! `registryfs convert`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::progress::{Bar, LOOK_INTERVAL};
use super::text::visible_name;
use crate::config::parse_bytes;
use crate::convert::{Progress, Report, Request, convert};
use crate::error::{Error, Result};

/// The most bytes of a list of files.
const LIST_BYTES_MAX: u64 = 256 << 20;
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
    /// Put the files whose paths are in FILE, one a line, first, to be prefetched in this order
    #[arg(long, value_name = "FILE")]
    prioritized_files: Option<PathBuf>,
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
        let request = Request {
            source: self.source.clone(),
            destination: self.destination.clone(),
            all_platforms: self.all_platforms,
            chunk_bytes: self.chunk_size,
            min_chunk_bytes: self.min_chunk_size,
            level: self.compression_level,
            prioritized: self.prioritized_files.as_deref().map(paths).transpose()?,
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

/// The lines of a file.
fn paths(list: &Path) -> Result<Vec<Vec<u8>>> {
    let failed =
        |error: &std::io::Error| Error::usage(format!("--prioritized-files {}: {error}", list.display()));
    let mut text = Vec::new();
    let file = File::open(list).map_err(|error| failed(&error))?;
    file.take(LIST_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|error| failed(&error))?;
    if text.len() as u64 > LIST_BYTES_MAX {
        let why = format!("it has more than {LIST_BYTES_MAX} bytes");
        return Err(Error::usage(format!(
            "--prioritized-files {}: {why}",
            list.display()
        )));
    }
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    Ok(lines.map(<[u8]>::to_vec).collect())
}

fn warn(report: &Report) {
    for path in report.missing.iter().take(MISSING_SHOWN_MAX) {
        note(&format!(
            "warning: no layer has the prioritized file {}",
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
