//! `registryfs digest`.

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;
use crate::image::answers::Resolved;

/// Print the digest that a reference names now
#[derive(Debug, Args)]
pub(super) struct Digest {
    /// The image
    reference: String,
}

impl Digest {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Resolve {
            reference: self.reference.clone(),
        };
        let resolved: Resolved = context.session().ask(query).await?;
        out.note_stale(resolved.stale.as_deref());
        match out.format {
            Format::Json => out.json(&resolved),
            Format::Text => out.line(resolved.digest),
        }
    }
}
