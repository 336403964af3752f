//! `registryfs prefetch`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::profile;
use super::progress::Bar;
use super::target::handed_over;
use super::text::{human_bytes, visible_name};
use crate::daemon::Query;
use crate::error::{Error, Result};
use crate::image::copy::{Prefetched, Summary};
use crate::image::profile::pack;

/// Bring an image, or paths of it, into the cache
#[derive(Debug, Args)]
#[command(after_long_help = "\
Without paths that is all of the image: afterwards every file of it can be read without the registry. With paths, which \
are patterns as those of `get`, it is what they match. What is in the cache already is not fetched again, and what came \
before an interruption stays.")]
pub(super) struct Prefetch {
    /// The image
    reference: String,
    /// The paths in it, with wildcards if you like
    #[arg(value_name = "PATH")]
    patterns: Vec<OsString>,
    /// Bring the files of a profile instead, in its order: what `record` wrote, or paths, one a line; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "patterns")]
    profile: Option<PathBuf>,
}

impl Prefetch {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let profile = match &self.profile {
            Some(file) => Some(handed_over(
                &context.loaded.config,
                &pack(&profile::read(file).await?),
            )?),
            None => None,
        };
        let query = Query::Prefetch {
            image: context.image(&self.reference),
            patterns: self.patterns.iter().cloned().map(OsString::into_vec).collect(),
            profile: profile.as_ref().map(|file| file.0.clone()),
            retries: context.loaded.config.retries,
        };
        let bar = Bar::new(&context.globals, &self.reference);
        let mut summary = None;
        let mut line = Vec::new();
        let take = |piece: &[u8]| {
            for part in piece.split_inclusive(|&byte| byte == b'\n') {
                line.extend_from_slice(part);
                if !line.ends_with(b"\n") {
                    continue;
                }
                let told = serde_json::from_slice(&std::mem::take(&mut line));
                match told.map_err(|error| Error::malformed("answer", error.to_string()))? {
                    Prefetched::Progress {
                        done_bytes,
                        total_bytes,
                    } => bar.show(done_bytes, total_bytes),
                    Prefetched::Done(done) => summary = Some(done),
                }
            }
            Ok(())
        };
        let result = context.session().stream(query, take).await;
        drop((bar, profile));
        result?;
        let summary = summary.ok_or_else(|| Error::malformed("answer", "it ends early"))?;
        out.note_stale(summary.stale.as_deref());
        note_missing(&summary);
        match out.format {
            Format::Json => out.json(&summary)?,
            Format::Text => out.line(text(&summary))?,
        }
        outcome(summary)
    }
}

/// Names files of the profile that are skipped.
fn note_missing(summary: &Summary) {
    for path in &summary.missing {
        note(&format!(
            "skipped: the image does not have {}",
            visible_name(path)
        ));
    }
    let more = summary.missing_files.saturating_sub(summary.missing.len() as u64);
    if more > 0 {
        note(&format!("skipped: nor {more} more files of the profile"));
    }
}

/// The first failure is what the command ends with; the others are told before.
fn outcome(summary: Summary) -> Result<()> {
    if summary.files == 0 && summary.missing_files > 0 {
        let why = "the image has none of the profile's files; is it the profile of another image?";
        return Err(Error::not_found(summary.reference, why));
    }
    let mut failures = summary.unmatched.into_iter().chain(summary.failure);
    let Some(first) = failures.next() else {
        return Ok(());
    };
    failures.for_each(|failure| note(&failure.to_string()));
    Err(first)
}

fn text(summary: &Summary) -> String {
    format!(
        "fetched {}; {} of {} files are in the cache, {} were before",
        human_bytes(summary.fetched_bytes),
        human_bytes(summary.cached_bytes),
        summary.files,
        human_bytes(summary.cached_before_bytes),
    )
}
