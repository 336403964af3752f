//! `registryfs cat`.

use std::ffi::OsString;

use clap::Args;

use super::context::{Context, path_bytes};
use super::output::Output;
use crate::daemon::Query;
use crate::error::Result;

/// Print a file of an image, verified
#[derive(Debug, Args)]
pub(super) struct Cat {
    /// The image
    reference: String,
    /// The path in it; symbolic links are followed inside the image
    path: OsString,
}

impl Cat {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Cat {
            image: context.image(&self.reference),
            path: path_bytes(Some(&self.path)),
        };
        context.session().stream(query, |bytes| out.bytes(bytes)).await
    }
}
