//! `registryfs ls`.

use std::ffi::OsString;

use clap::Args;

use super::context::{Context, path_bytes};
use super::globals::Format;
use super::output::Output;
use super::text::{date, mode_text, name_text, size_text, table};
use crate::daemon::Query;
use crate::error::Result;
use crate::image::answers::FileInfo;

/// List a directory of an image as `ls -l` does, times in UTC
#[derive(Debug, Args)]
pub(super) struct Ls {
    /// The image
    reference: String,
    /// The path in it
    path: Option<OsString>,
}

impl Ls {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let query = Query::Ls {
            image: context.image(&self.reference),
            path: path_bytes(self.path.as_ref()),
        };
        let files: Vec<FileInfo> = context.session().ask(query).await?;
        if out.format == Format::Json {
            return out.json(&files);
        }
        let rows: Vec<Vec<String>> = files.iter().map(row).collect();
        table(&rows, &[1, 4]).iter().try_for_each(|line| out.line(line))
    }
}

fn row(file: &FileInfo) -> Vec<String> {
    vec![
        mode_text(&file.kind, file.mode),
        file.nlink.to_string(),
        file.uid.to_string(),
        file.gid.to_string(),
        size_text(file),
        date(file.mtime),
        name_text(file),
    ]
}
