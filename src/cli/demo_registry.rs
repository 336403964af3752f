//! `registryfs demo-registry`.

use clap::Args;

use super::output::Output;
use crate::error::{Error, Result};

/// Serve made-up images on loopback, for trying and for tests
#[derive(Debug, Args)]
pub(super) struct DemoRegistry {}

impl DemoRegistry {
    pub(super) async fn run(&self, _out: &mut Output) -> Result<()> {
        Err(Error::unsupported("demo-registry", "not merged yet"))
    }
}
