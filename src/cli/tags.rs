//! `registryfs tags`.

use clap::Args;

use super::context::Context;
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;

/// List the tags of a repository
#[derive(Debug, Args)]
pub(super) struct Tags {
    /// The repository
    repository: String,
}

impl Tags {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Tags {
            repository: self.repository.clone(),
        };
        out.listing(&context.session().ask(query).await?)
    }
}
