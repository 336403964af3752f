//! Writing the contents of files as they come: on a thread of its own, so that neither a slow disk nor a slow network
//! keeps the other one waiting.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc::Receiver;

use crate::digest::Hasher;
use crate::error::{Error, Result};
use crate::get::attributes::failed;
use crate::get::destination::{Place, Temporary};
use crate::get::{Shared, each_its_own, shown};
use crate::image::plan::{File, Item, What};

/// Zeros of this length, at a multiple of it, become a hole.
const BLOCK_BYTES: u64 = 4096;

/// How writing a batch ended.
#[derive(Debug)]
pub(super) struct Written {
    /// The files whose contents did not come whole, in order.
    pub(super) left: VecDeque<Item>,
    /// Whether anything came.
    pub(super) any: bool,
    /// Why nothing more can be written.
    pub(super) failure: Option<Error>,
}

/// Writes `files`, whose contents come one behind the other. A file that cannot be written is noted and passed over.
pub(super) fn write(shared: &Arc<Shared>, files: VecDeque<Item>, mut pieces: Receiver<Vec<u8>>) -> Written {
    let mut batch = Batch {
        shared,
        left: files,
        current: None,
        known: None,
    };
    let mut any = false;
    let mut failure = None;
    while let Some(piece) = pieces.blocking_recv() {
        any = true;
        if let Err(error) = batch.take(&piece) {
            failure = Some(error);
            break;
        }
    }
    if let Some((_, done)) = &batch.current {
        shared.progress.undone(*done);
    }
    Written {
        left: batch.left,
        any,
        failure,
    }
}

/// Writes an empty file.
pub(super) fn empty(shared: &Shared, item: &Item) -> Result<()> {
    let place = shared.destination.place(item, None)?;
    Output::create(item, &place)?.finish(shared, item)
}

struct Batch<'a> {
    shared: &'a Arc<Shared>,
    left: VecDeque<Item>,
    /// The first of them while it is written (nothing, if it cannot be), and how much of it has come.
    current: Option<(Option<Output>, u64)>,
    /// The place of the last one.
    known: Option<(Item, Place)>,
}

impl Batch<'_> {
    fn take(&mut self, mut piece: &[u8]) -> Result<()> {
        while !piece.is_empty() {
            let Some(item) = self.left.front() else {
                return Err(Error::malformed("contents", "more came than was asked for"));
            };
            let size = file(item)?.size;
            let (output, done) = match self.current.take() {
                Some(current) => current,
                None => {
                    let output = open(self.shared, item, &mut self.known);
                    (self.shared.unless_fatal(output)?, 0)
                }
            };
            let len = (size - done).min(piece.len() as u64);
            let (bytes, rest) = piece.split_at(len as usize);
            piece = rest;
            let output = match output {
                Some(mut output) => {
                    let written = output.write(item, bytes).map(|()| output);
                    self.shared.unless_fatal(written)?
                }
                None => None,
            };
            self.shared.progress.done(len);
            if done + len < size {
                self.current = Some((output, done + len));
                continue;
            }
            if let Some(output) = output {
                let finished = output.finish(self.shared, item);
                self.shared.unless_fatal(finished)?;
            }
            self.left.pop_front();
        }
        Ok(())
    }
}

impl Shared {
    /// Notes a failure, if the next file may fare better.
    fn unless_fatal<T>(&self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => each_its_own(self, error).map(|()| None),
        }
    }
}

fn file(item: &Item) -> Result<&File> {
    match &item.what {
        What::File(file) => Ok(file),
        _ => Err(Error::malformed("plan", "contents of what is no file")),
    }
}

fn open(shared: &Shared, item: &Item, known: &mut Option<(Item, Place)>) -> Result<Output> {
    let before = known.as_ref().map(|(item, place)| (item, place));
    let place = shared.destination.place(item, before)?;
    let output = Output::create(item, &place)?;
    *known = Some((item.clone(), place));
    Ok(output)
}

/// A file under its temporary name.
struct Output {
    file: OwnedFd,
    temporary: Temporary,
    /// Where the next bytes go.
    position: u64,
    /// The end of what was really written: behind it is a hole.
    end: u64,
    hasher: Option<Hasher>,
}

impl Output {
    fn create(item: &Item, place: &Place) -> Result<Self> {
        let temporary = Temporary::new(place);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&*place.dir, &*temporary.name, flags, Mode::from_raw_mode(0o600));
        Ok(Self {
            file: file.map_err(|errno| failed(item, errno))?,
            temporary,
            position: 0,
            end: 0,
            hasher: self::file(item)?.digest.map(|_| Hasher::default()),
        })
    }

    /// Appends bytes, blocks of zeros as holes.
    fn write(&mut self, item: &Item, bytes: &[u8]) -> Result<()> {
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        for (start, run) in runs(self.position, bytes) {
            let mut written = 0;
            while written < run.len() {
                let at = self.position + (start + written) as u64;
                match rustix::io::pwrite(&self.file, &run[written..], at) {
                    Ok(0) => return Err(failed(item, rustix::io::Errno::NOSPC)),
                    Ok(count) => written += count,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(failed(item, errno)),
                }
            }
            self.end = self.position + (start + run.len()) as u64;
        }
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file, which is complete, its attributes and its name.
    fn finish(mut self, shared: &Shared, item: &Item) -> Result<()> {
        if self.end < self.position {
            rustix::fs::ftruncate(&self.file, self.position).map_err(|errno| failed(item, errno))?;
        }
        if let (Some(hasher), Some(expected)) = (self.hasher.take(), file(item)?.digest) {
            let actual = hasher.finish();
            if actual != expected {
                return Err(Error::mismatch(shown(&item.path.0), expected, actual));
            }
        }
        shared.destination.attributes().of_file(self.file.as_fd(), item)?;
        self.temporary.put(item)?;
        shared.made(item);
        shared.count(|report| {
            report.files += 1;
            report.bytes += self.position;
        });
        Ok(())
    }
}

/// What of `bytes`, which stand at `position` of a file, is to be written: all but the blocks of zeros. Each run with
/// where it starts in `bytes`.
fn runs(position: u64, bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let block_end = |at: usize| {
            let to_boundary = BLOCK_BYTES - (position + at as u64) % BLOCK_BYTES;
            bytes.len().min(at + to_boundary as usize)
        };
        let is_zero = |at: usize| bytes[at..block_end(at)].iter().all(|&byte| byte == 0);
        while at < bytes.len() && is_zero(at) {
            at = block_end(at);
        }
        let start = at;
        while at < bytes.len() && !is_zero(at) {
            at = block_end(at);
        }
        (at > start).then(|| (start, &bytes[start..at]))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_everything_but_zeros(
            position in 0..10_000u64,
            blocks in prop::collection::vec((any::<bool>(), 1..9000usize), 0..6),
        ) {
            let bytes: Vec<u8> = blocks
                .iter()
                .flat_map(|&(is_zero, len)| vec![if is_zero { 0 } else { 7 }; len])
                .collect();
            let mut file = vec![0; bytes.len()];
            let mut end = 0;
            for (start, run) in runs(position, &bytes) {
                prop_assert!(start >= end);
                end = start + run.len();
                file[start..end].copy_from_slice(run);
            }
            prop_assert_eq!(&file, &bytes);
            // A whole block of zeros is in no run.
            for block in (0..bytes.len()).filter(|at| (position + *at as u64).is_multiple_of(BLOCK_BYTES)) {
                let block = block..block + BLOCK_BYTES as usize;
                if bytes.get(block.clone()).is_some_and(|block| block.iter().all(|&byte| byte == 0)) {
                    for (start, run) in runs(position, &bytes) {
                        prop_assert!(start + run.len() <= block.start || start >= block.end);
                    }
                }
            }
        }
    }
}
