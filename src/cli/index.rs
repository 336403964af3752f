//! `registryfs index`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::context::Context;
use super::globals::Format;
use super::output::Output;
use super::target::{Removed, Target};
use super::text::human_bytes;
use crate::daemon::Query;
use crate::error::{Error, Result};
use crate::image::indexes::{FILE_BYTES_MAX, Imported};
use crate::store::Store;

/// Stands for standard output and standard input.
const STANDARD: &str = "-";
/// Bytes of a file that are copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Hand the indexes of plain layers from machine to machine
#[derive(Debug, Args)]
#[command(after_long_help = "\
A layer without a table of contents (plain gzip, zstd or tar) is read once as a whole to make its index. With the index of \
another machine that is not needed. An index decides what the files of its layer are: import only those of people you \
would let write to the cache.")]
pub(super) struct Index {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Export(Export),
    Import(Import),
}

/// Write the indexes of an image's plain layers to a file
#[derive(Debug, Args)]
struct Export {
    /// The image
    reference: String,
    /// The file, - for standard output
    file: PathBuf,
}

/// Take indexes from a file
#[derive(Debug, Args)]
struct Import {
    /// The file, - for standard input
    file: PathBuf,
}

impl Index {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        match &self.command {
            Command::Export(command) => command.run(context, out).await,
            Command::Import(command) => command.run(context, out).await,
        }
    }
}

impl Export {
    async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::ExportIndexes {
            image: context.image(&self.reference),
        };
        if self.file == Path::new(STANDARD) {
            return context.session().stream(query, |bytes| out.bytes(bytes)).await;
        }
        let failed = |error: io::Error| Error::io(self.file.display().to_string(), &error);
        let mut target = Target::new(&self.file).map_err(failed)?;
        let mut bytes_written = 0;
        let write = |bytes: &[u8]| {
            bytes_written += bytes.len() as u64;
            target.file.write_all(bytes).map_err(failed)
        };
        context.session().stream(query, write).await?;
        target.finish().map_err(failed)?;
        match out.format {
            Format::Json => out.json(&serde_json::json!({ "bytes": bytes_written })),
            Format::Text => out.line(format!("wrote {}", human_bytes(bytes_written))),
        }
    }
}

impl Import {
    async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let file = Store::incoming(&context.loaded.config.cache_dir)?;
        let handed = Removed(file.clone());
        let (from, to) = (self.file.clone(), file.clone());
        // The other end of a pipe may let us wait for ever, and an interruption must not.
        let copied = tokio::task::spawn_blocking(move || hand_over(&from, &to)).await;
        copied.map_err(|error| Error::io(self.file.display().to_string(), &io::Error::other(error)))??;
        let imported: Imported = context.session().ask(Query::ImportIndexes { file }).await?;
        drop(handed);
        match out.format {
            Format::Json => out.json(&imported),
            Format::Text => out.line(format!(
                "imported {}, {} were known",
                imported.imported.len(),
                imported.known.len()
            )),
        }
    }
}

/// Copies a file to where whoever owns the store takes it from: a directory that is for nobody else.
fn hand_over(from: &Path, to: &Path) -> Result<()> {
    let failed = |path: &Path, error: &io::Error| Error::io(path.display().to_string(), error);
    let mut source: Box<dyn Read> = match from == Path::new(STANDARD) {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(from).map_err(|error| failed(from, &error))?),
    };
    let mut copy = File::create_new(to).map_err(|error| failed(to, &error))?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut copied_bytes = 0;
    loop {
        let length = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(from, &error)),
        };
        copied_bytes += length as u64;
        if copied_bytes > FILE_BYTES_MAX {
            let why = format!("more than {FILE_BYTES_MAX} bytes are no file of indexes");
            return Err(Error::malformed(from.display().to_string(), why));
        }
        let bytes = buffer.get(..length).unwrap_or_default();
        copy.write_all(bytes).map_err(|error| failed(to, &error))?;
    }
}
