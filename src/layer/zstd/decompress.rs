//! Decompresses a zstd blob in one pass and finds the frames from which to decode again.

use super::frames::{self, Header};
use super::stream::{Stopped, Stream};
use crate::error::{Error, Result};
use crate::layer::index::Coding;
use crate::layer::{Checkpoint, Decoded, Decompressor, Format};

/// Decoded bytes between two checkpoints, at least: what reading one evicted file may cost beyond the file.
const SPACING_BYTES: u64 = 1 << 20;

/// A zstd blob on its way.
#[derive(Default)]
pub(in crate::layer) struct ZstdDecompressor {
    /// There from the first frame on.
    stream: Option<Stream>,
    state: State,
    /// The bytes of a header that is not complete, at most 18.
    header: Vec<u8>,
    /// Where the current frame starts in the blob.
    frame_start: u64,
    /// Bytes of the blob so far.
    position: u64,
    /// Decoded bytes so far.
    decoded: u64,
    /// Decoded bytes before the last checkpoint.
    checkpoint: Option<u64>,
}

/// What the next byte is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Header,
    Frame,
    /// A skippable frame that goes on for so many bytes.
    Skippable(u64),
}

impl ZstdDecompressor {
    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::malformed(format!("zstd frame at {}", self.frame_start), why)
    }

    /// Takes the next byte of a header.
    fn header_byte(&mut self, byte: u8, out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        if self.header.is_empty() {
            self.frame_start = self.position;
        }
        self.header.push(byte);
        self.position += 1;
        let Some(header) = frames::parse(&self.header).map_err(|why| self.malformed(why))? else {
            return Ok(());
        };
        let is_due = match (self.checkpoint, header) {
            (None, _) => true,
            (Some(last), Header::Frame) => self.decoded - last >= SPACING_BYTES,
            (Some(_), Header::Skippable(_)) => false,
        };
        if is_due {
            self.checkpoint = Some(self.decoded);
            out(Decoded::Checkpoint(Checkpoint {
                blob_start: self.frame_start,
                coding: Coding::Zstd,
                bits: 0,
                window: Vec::new(),
            }))?;
        }
        let header_bytes = std::mem::take(&mut self.header);
        match header {
            Header::Skippable(bytes) => {
                self.state = State::skippable(bytes);
                Ok(())
            }
            Header::Frame => {
                self.state = State::Frame;
                self.frame(&mut header_bytes.as_slice(), out)
            }
        }
    }

    /// Decodes bytes of a frame.
    fn frame(&mut self, input: &mut &[u8], out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        let start = self.frame_start;
        let decoded = &mut self.decoded;
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(Stream::new(u64::MAX)?),
        };
        let stopped = stream.decode(input, || format!("zstd frame at {start}"), &mut |bytes| {
            *decoded += bytes.len() as u64;
            out(Decoded::Bytes(bytes)).map(|()| true)
        })?;
        if stopped == Stopped::FrameEnded {
            self.state = State::Header;
        }
        Ok(())
    }
}

impl State {
    /// In a skippable frame of which `bytes` are left.
    fn skippable(bytes: u64) -> Self {
        match bytes {
            0 => Self::Header,
            bytes => Self::Skippable(bytes),
        }
    }
}

impl Decompressor for ZstdDecompressor {
    fn format(&self) -> Format {
        Format::Zstd
    }

    fn push(&mut self, mut blob: &[u8], out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        while let Some((&byte, rest)) = blob.split_first() {
            let before = blob.len();
            match self.state {
                State::Header => {
                    self.header_byte(byte, out)?;
                    blob = rest;
                }
                State::Frame => {
                    self.frame(&mut blob, out)?;
                    self.position += (before - blob.len()) as u64;
                }
                State::Skippable(bytes) => {
                    let skipped = bytes.min(before as u64);
                    blob = blob.get(skipped as usize..).unwrap_or_default();
                    self.position += skipped;
                    self.state = State::skippable(bytes - skipped);
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        if self.state == State::Header && self.header.is_empty() && self.checkpoint.is_some() {
            return Ok(());
        }
        Err(self.malformed(format!("the blob ends within it, after {} bytes", self.position)))
    }
}
