//! `registryfs config`.

use clap::Args;

use super::context::Context;
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;

/// Print the configuration of an image, byte for byte
#[derive(Debug, Args)]
pub(super) struct Config {
    /// The image
    reference: String,
}

impl Config {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Config {
            image: context.image(&self.reference),
        };
        context.session().stream(query, |bytes| out.bytes(bytes)).await
    }
}
