//! Access profiles in files, for the commands that take one.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::image::profile::{BYTES_MAX, parse};

/// Stands for standard input.
const STANDARD: &str = "-";

/// The paths in a profile.
pub(super) async fn read(file: &Path) -> Result<Vec<Vec<u8>>> {
    let what = format!("--profile {}", file.display());
    let path = file.to_owned();
    // The other end of a pipe may let us wait for ever, and an interruption must not.
    let read = tokio::task::spawn_blocking(move || bytes(&path)).await;
    let text = read
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|error| Error::usage(format!("{what}: {error}")))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(Error::usage(format!(
            "{what}: it has more than {BYTES_MAX} bytes"
        )));
    }
    let paths = parse(&text).map_err(|error| Error::usage(format!("{what}: {error}")))?;
    match paths.is_empty() {
        true => Err(Error::usage(format!("{what}: no file is named in it"))),
        false => Ok(paths),
    }
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let source: Box<dyn Read> = match path == Path::new(STANDARD) {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(path)?),
    };
    let mut bytes = Vec::new();
    source.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
