//! `registryfs cache`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use clap::{Args, Subcommand};

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::text::human_bytes;
use crate::daemon::Query;
use crate::error::Result;
use crate::image::eviction::Evicted;

/// Look after the cache
#[derive(Debug, Args)]
pub(super) struct Cache {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Evict(Evict),
}

/// Take an image, or paths of it, out of the cache
#[derive(Debug, Args)]
#[command(after_long_help = "\
Without paths that is all of the image; with paths, which are patterns as those of `get`, it is what they match. Layers \
are shared: other images with the same layers fetch these files anew too. What is known about the image stays, so listing \
it costs no request. What the kernel itself has cached of a mount stays there until it needs the memory.")]
struct Evict {
    /// The image
    reference: String,
    /// The paths in it, with wildcards if you like
    #[arg(value_name = "PATH")]
    patterns: Vec<OsString>,
}

impl Cache {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        match &self.command {
            Command::Evict(command) => command.run(context, out).await,
        }
    }
}

impl Evict {
    async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Evict {
            image: context.image(&self.reference),
            patterns: self.patterns.iter().cloned().map(OsString::into_vec).collect(),
        };
        let mut evicted: Evicted = context.session().ask(query).await?;
        out.note_stale(evicted.stale.as_deref());
        match out.format {
            Format::Json => out.json(&evicted)?,
            Format::Text => out.line(format!("evicted {}", human_bytes(evicted.evicted_bytes)))?,
        }
        // The last is what the command ends with; the others are told before.
        let Some(last) = evicted.unmatched.pop() else {
            return Ok(());
        };
        evicted
            .unmatched
            .iter()
            .for_each(|failure| note(&failure.to_string()));
        Err(last)
    }
}
