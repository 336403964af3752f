//! What is read from tars: case by case with bytes put together by hand, against other writers, and against bytes that
//! are no tar.

mod cases;
mod hostile;
mod properties;
pub(in crate::layer) mod raw;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layer::entry::Entry;
use crate::layer::tar::scan::{Event, Scanner};

/// The longest hole that is filled with zeros: damage makes holes of any length.
const HOLE_BYTES_MAX: u64 = 16 << 20;

/// An entry with its content, holes filled with zeros.
#[derive(Debug, Clone, PartialEq)]
struct Read {
    entry: Entry,
    content: Vec<u8>,
    holes: Vec<Range<u64>>,
}

/// Reads a tar that comes in pieces of these lengths, over and over.
fn read_in(tar: &[u8], pieces: &[usize]) -> Result<Vec<Read>> {
    let mut scanner = Scanner::default();
    let mut found: Vec<Read> = Vec::new();
    let mut rest = tar;
    let mut lengths = pieces.iter().cycle();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(*lengths.next().unwrap_or(&1)));
        scanner.push(piece, &mut |event| {
            match (event, found.last_mut()) {
                (Event::Entry(entry), _) => found.push(Read {
                    entry: entry.clone(),
                    content: Vec::new(),
                    holes: Vec::new(),
                }),
                (Event::Data { tar_offset, bytes }, Some(last)) => {
                    assert!(tar[tar_offset as usize..].starts_with(bytes));
                    last.content.extend_from_slice(bytes);
                }
                (Event::Hole(bytes), _) if bytes > HOLE_BYTES_MAX => {
                    return Err(Error::malformed("hole", "too long for a test"));
                }
                (Event::Hole(bytes), Some(last)) => {
                    let start = last.content.len() as u64;
                    last.holes.push(start..start + bytes);
                    last.content.resize((start + bytes) as usize, 0);
                }
                (event, None) => panic!("{event:?} before any entry"),
            }
            Ok(())
        })?;
        rest = after;
    }
    scanner.finish()?;
    assert_eq!(scanner.position(), tar.len() as u64);
    for read in &found {
        assert_eq!(read.content.len() as u64, read.entry.size, "{:?}", read.entry);
    }
    Ok(found)
}

fn read(tar: &[u8]) -> Result<Vec<Read>> {
    read_in(tar, &[tar.len().max(1)])
}

/// The only entry of a tar, which is the same in whatever pieces it comes.
fn only(tar: &[u8]) -> Read {
    let found = read(tar).unwrap();
    assert_eq!(found.len(), 1);
    for pieces in [&[1][..], &[511], &[513, 7]] {
        assert_eq!(read_in(tar, pieces).unwrap(), found);
    }
    found.into_iter().next().unwrap()
}
