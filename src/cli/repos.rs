//! `registryfs repos`.

use clap::Args;

use super::context::Context;
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;

/// List the repositories of a registry
#[derive(Debug, Args)]
pub(super) struct Repos {
    /// The registry
    host: String,
}

impl Repos {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Repos {
            host: self.host.clone(),
        };
        out.listing(&context.session().ask(query).await?)
    }
}
