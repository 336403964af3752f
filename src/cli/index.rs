//! `registryfs index`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::context::Context;
use super::globals::Format;
use super::output::Output;
use super::text::human_bytes;
use crate::daemon::Query;
use crate::error::{Error, Result};
use crate::image::indexes::Imported;
use crate::store::Store;

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
    /// The file
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
        if self.file == Path::new("-") {
            return context.session().stream(query, |bytes| out.bytes(bytes)).await;
        }
        // Under its name only when it is complete.
        let mut part = self.file.clone().into_os_string();
        part.push(format!(".{}.part", std::process::id()));
        let part = Removed(part.into());
        let failed = |error: io::Error| Error::io(self.file.display().to_string(), &error);
        let mut file = fs::File::create(&part.0).map_err(failed)?;
        let mut bytes_written = 0;
        let write = |bytes: &[u8]| {
            bytes_written += bytes.len() as u64;
            file.write_all(bytes).map_err(failed)
        };
        context.session().stream(query, write).await?;
        fs::rename(&part.0, &self.file).map_err(failed)?;
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
        let failed = |error: io::Error| Error::io(self.file.display().to_string(), &error);
        fs::copy(&self.file, &handed.0).map_err(failed)?;
        let imported: Imported = context.session().ask(Query::ImportIndexes { file }).await?;
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

/// A file that is gone at the end, whatever the end is.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It has been taken, or has its name, or was never made.
        let _ = fs::remove_file(&self.0);
    }
}
