//! `registryfs get`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::context::Context;
use super::globals::Format;
use super::output::{Output, note};
use super::progress::{Bar, LOOK_INTERVAL};
use crate::error::{Error, Result};
use crate::get::{Progress, Report, Request, Spared, get};

/// Copy files, directories and what patterns match out of an image, verified
#[derive(Debug, Args)]
#[command(after_long_help = "\
Paths are kept, as with tar: usr/bin/env becomes DEST/usr/bin/env. If there is one PATTERN, without wildcards, and it \
leads to a regular file, DEST may also name the file to write: it does unless it is a directory or ends with a slash.

In patterns `*` stands for any part of a name, `?` for one byte of it, `[a-z]` and `[!a-z]` for one of a set, `**` for any \
number of directories; `\\` takes the meaning from the character behind it. Names that begin with a dot match as others \
do. A slash at the beginning does not matter; `.` and `/` are everything. A slash at the end matches directories only.

Directories are copied with all that is in them. Symbolic links on the way are resolved inside the image and copied too, \
so the path that was asked for leads to the file also below DEST. A link that is named without wildcards is followed: \
it is copied with what it leads to. One that a wildcard matches, or that is in a copied directory, is copied alone.

As root owners, modes, times, extended attributes, hard links and devices are as in the image. Other users keep what they \
copy as their own, without setuid, setgid, devices and what else they may not make; a warning says how much that was.

A file has a temporary name (.registryfs-*.part) until it is complete; then it replaces what had its name. What was \
fetched stays in the cache, so that after an interruption the same command goes on where it was.")]
pub(super) struct Get {
    /// The image
    reference: String,
    /// The paths in it, with wildcards if you like; quote them
    #[arg(required = true, value_name = "PATTERN")]
    patterns: Vec<OsString>,
    /// The directory to write to, which is made if it is missing; or the file
    #[arg(short, long, value_name = "DEST", default_value = ".")]
    output: PathBuf,
}

impl Get {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        if self.output.as_os_str() == "-" {
            return Err(Error::usage(
                "-o -: files cannot be written to standard output side by side; `registryfs cat` prints one",
            ));
        }
        let request = Request {
            image: context.image(&self.reference),
            patterns: self.patterns.iter().cloned().map(OsString::into_vec).collect(),
            destination: self.output.clone(),
            retries: context.loaded.config.retries,
        };
        let session = Arc::new(context.session());
        let progress = Arc::new(Progress::default());
        let result = {
            let bar = Bar::new(&context.globals, &self.reference);
            let showing = async {
                loop {
                    bar.show(progress.done_bytes(), progress.total_bytes());
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            };
            tokio::select! {
                result = get(&session, &request, &progress) => result,
                () = showing => Err(Error::Interrupted),
            }
        };
        session.close().await;
        let report = result?;
        out.note_stale(report.stale.as_deref());
        if !report.spared.is_empty() {
            note(&format!("warning: {}", spared(&report.spared)));
        }
        if out.format == Format::Json {
            out.json(&report)?;
        }
        outcome(report)
    }
}

/// The first failure is what the command ends with; the others are told before.
fn outcome(report: Report) -> Result<()> {
    let mut failures = report.failures.into_iter();
    let Some(first) = failures.next() else {
        return Ok(());
    };
    let mut told = 1;
    for failure in failures {
        note(&failure.to_string());
        told += 1;
    }
    if report.failure_count > told {
        note(&format!("and {} more", report.failure_count - told));
    }
    Err(first)
}

fn spared(spared: &Spared) -> String {
    let mut parts = Vec::new();
    if spared.owners > 0 {
        parts.push(format!(
            "{} names belong to you instead of their owners",
            spared.owners
        ));
    }
    if spared.set_ids > 0 {
        parts.push(format!("setuid or setgid was taken off {}", spared.set_ids));
    }
    if spared.devices > 0 {
        parts.push(format!("{} devices are left out", spared.devices));
    }
    if !spared.attributes.is_empty() {
        let named = spared
            .attributes
            .iter()
            .map(|(name, count)| format!("{count} {name}"));
        let named: Vec<String> = named.collect();
        parts.push(format!("extended attributes are left out: {}", named.join(", ")));
    }
    parts.join("; ")
}
