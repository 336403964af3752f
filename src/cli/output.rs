//! Standard output and standard error. Everything that a command prints goes through here.

use std::fmt::Display;
use std::io::{self, BufWriter, Stdout, Write};

use serde::Serialize;

use super::globals::Format;
use super::progress::beside_bar;
use super::text::{table, visible, visible_name};
use crate::error::{Error, Result};
use crate::image::answers::Listing;

const STDOUT: &str = "standard output";

/// Standard output, buffered.
#[derive(Debug)]
pub(super) struct Output {
    /// How to print.
    pub(super) format: Format,
    out: BufWriter<Stdout>,
}

impl Output {
    /// Standard output for answers in this format.
    pub(super) fn new(format: Format) -> Self {
        Self {
            format,
            out: BufWriter::with_capacity(64 << 10, io::stdout()),
        }
    }

    /// Prints a line of text.
    pub(super) fn line(&mut self, text: impl Display) -> Result<()> {
        writeln!(self.out, "{text}").map_err(|error| Error::io(STDOUT, &error))
    }

    /// Prints a value as JSON.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)
            .map_err(|error| Error::io(STDOUT, &error.into()))?;
        self.line("")
    }

    /// Prints bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .map_err(|error| Error::io(STDOUT, &error))
    }

    /// Prints names with their values, aligned.
    pub(super) fn pairs(&mut self, pairs: &[(&str, String)]) -> Result<()> {
        let rows: Vec<Vec<String>> = pairs
            .iter()
            .map(|(name, value)| vec![(*name).to_owned(), value.clone()])
            .collect();
        table(&rows, &[]).iter().try_for_each(|line| self.line(line))
    }

    /// Prints a list of names.
    pub(super) fn listing(&mut self, listing: &Listing) -> Result<()> {
        self.note_stale(listing.stale.as_deref());
        match self.format {
            Format::Json => self.json(listing),
            Format::Text => listing
                .names
                .iter()
                .try_for_each(|name| self.line(visible_name(name))),
        }
    }

    /// Warns that an answer is an old one, and says why.
    pub(super) fn note_stale(&self, why: Option<&str>) {
        if let Some(why) = why {
            note(&format!(
                "warning: the registry could not be asked; this is what it said before: {why}"
            ));
        }
    }

    /// Writes out what is buffered. A full disk shows only here.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.out.flush().map_err(|error| Error::io(STDOUT, &error))
    }
}

/// Whether whoever read our output has had enough, which is no failure.
pub(super) fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { what, errno, .. } if what == STDOUT && *errno == libc::EPIPE)
}

/// Tells the user something that is not the answer.
pub(super) fn note(text: &str) {
    beside_bar(|| {
        // Where standard error is closed there is no one to tell.
        let _ = writeln!(io::stderr(), "registryfs: {}", visible(text));
    });
}
