//! Receiving a plan: see [`crate::image::plan`].

use std::sync::Arc;

use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::daemon::{Query, Session};
use crate::error::{Error, Result};
use crate::get::Request;
use crate::image::plan::{Head, Item};

/// Pieces of the plan that may wait.
const PIECES_WAITING_MAX: usize = 4;

/// What to write.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) head: Head,
    pub(super) items: Vec<Item>,
}

impl Plan {
    /// Asks for the plan of a request.
    pub(super) async fn ask(session: &Arc<Session>, request: &Request) -> Result<Self> {
        let query = Query::Plan {
            image: request.image.clone(),
            patterns: request.patterns.clone(),
        };
        let (sender, mut pieces) = mpsc::channel::<Vec<u8>>(PIECES_WAITING_MAX);
        let receive = async {
            let mut lines = Lines::default();
            let mut head: Option<Head> = None;
            let mut items = Vec::new();
            while let Some(piece) = pieces.recv().await {
                lines.push(&piece, |line| {
                    match head {
                        None => head = Some(parse(line)?),
                        Some(_) => items.push(checked(parse(line)?)?),
                    }
                    Ok(())
                })?;
            }
            Ok((head, items))
        };
        let ((), (head, items)) = tokio::try_join!(session.answer(query, sender), receive)?;
        match head {
            Some(head) if head.items == items.len() as u64 => Ok(Self { head, items }),
            _ => Err(Error::malformed("plan", "it ends early")),
        }
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T> {
    serde_json::from_slice(line).map_err(|error| Error::malformed("plan", error.to_string()))
}

/// Refuses a path that could mean anything but a place below the destination.
fn checked(item: Item) -> Result<Item> {
    let path = &item.path.0;
    let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
    if path.is_empty() || path.split(|&byte| byte == b'/').all(is_name) {
        return Ok(item);
    }
    let why = "not a path below the image's root";
    Err(Error::malformed(String::from_utf8_lossy(path), why))
}

/// Lines out of pieces.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, piece: &[u8], mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line = rest.get(..end).unwrap_or_default();
            rest = rest.get(end + 1..).unwrap_or_default();
            if self.0.is_empty() {
                each(line)?;
            } else {
                self.0.extend_from_slice(line);
                each(&std::mem::take(&mut self.0))?;
            }
        }
        self.0.extend_from_slice(rest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::plan::{Name, What};

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let item = |path: &str| Item {
            path: Name(path.into()),
            what: What::Fifo,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
        };
        for path in ["", "a", "a/b", "..a/...", "\u{ff}"] {
            assert!(checked(item(path)).is_ok(), "{path}");
        }
        for path in ["..", "/a", "a/../b", "a//b", "a/", "a/.", "a\0b"] {
            assert!(checked(item(path)).is_err(), "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn lines_survive_any_cut(lines in prop::collection::vec("[ab]{0,5}", 0..8), cut in 1..7usize) {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let (mut pieces, mut seen) = (Lines::default(), Vec::new());
            for piece in text.as_bytes().chunks(cut) {
                pieces.push(piece, |line| {
                    seen.push(String::from_utf8(line.to_vec()).unwrap());
                    Ok(())
                }).unwrap();
            }
            prop_assert_eq!(seen, lines);
        }
    }
}
