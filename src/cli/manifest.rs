//! `registryfs manifest`.

use clap::Args;

use super::context::Context;
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;

/// Print a manifest or index, byte for byte
#[derive(Debug, Args)]
pub(super) struct Manifest {
    /// The image
    reference: String,
}

impl Manifest {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Manifest {
            reference: self.reference.clone(),
        };
        context.session().stream(query, |bytes| out.bytes(bytes)).await
    }
}
