//! The files of a layer as they are found.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};
use crate::layer::index::Index;
use crate::store::chunk_map::ChunkMap;
use crate::store::mapped::Mapped;

/// A data file that is to take the place of another.
pub(super) const DATA_ASIDE: &str = "data.new";

/// The data file and the chunk map of the layer in `dir`. Where one is not what the other describes both begin anew, and
/// the data in another file: the kernel may have the old one, from a process before this.
pub(super) fn open_files(dir: &Path, index: &Index<Mapped>, index_id: u32) -> Result<(File, ChunkMap)> {
    let failed = |e: std::io::Error| Error::io(dir.display().to_string(), &e);
    let (data, map, aside) = (dir.join("data"), dir.join("map"), dir.join(DATA_ASIDE));
    let (chunks, data_bytes) = (index.chunk_count(), index.summary().data_bytes);
    let _ = std::fs::remove_file(&aside);
    let old = File::options().read(true).write(true).open(&data);
    let fits = |old: &File| old.metadata().is_ok_and(|metadata| metadata.len() == data_bytes);
    if let Some(old) = old.ok().filter(fits)
        && ChunkMap::is_kept(&map, chunks, index_id)
    {
        let map = ChunkMap::open(&map, chunks, index_id)?;
        // Lent is what is complete: an eviction was cut off.
        if !map.is_lent() || map.count() == chunks {
            return Ok((old, map));
        }
    }
    match std::fs::remove_file(&map) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let new = new_data(&aside, data_bytes).map_err(failed)?;
    std::fs::rename(&aside, &data).map_err(failed)?;
    Ok((new, ChunkMap::open(&map, chunks, index_id)?))
}

/// A data file that is one hole.
pub(in crate::store) fn new_data(path: &Path, data_bytes: u64) -> std::io::Result<File> {
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(data_bytes)?;
    Ok(file)
}
