//! A layer of gzip from its bytes to its files: one pass makes the index, and every file is read back through it.

use super::*;
use crate::layer::scan::LayerScanner;
use crate::layer::{ContentSink, Decoded};

/// Content at its place in the data file.
#[derive(Default)]
struct DataFile(Vec<u8>);

impl ContentSink for DataFile {
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let end = data_offset as usize + bytes.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[data_offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }
}

fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        builder
            .append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn every_file_of_a_layer_is_read_back_by_ranges() {
    let mut files: Vec<(String, Vec<u8>)> = (0..300)
        .map(|n| (format!("dir{}/file{n}", n % 7), text(n * n % 60_000)))
        .collect();
    files.insert(40, ("large".into(), text(11 << 20)));
    files.insert(90, ("noise".into(), noise(5 << 20)));
    files.insert(200, ("zeros".into(), vec![0; 20 << 20]));
    let layer_tar = tar_of(&files);
    // Several members, cut anywhere in the tar.
    let parts = cut(&layer_tar, &[13 << 20, 700, 9 << 20]);
    let blob: Vec<u8> = parts.iter().flat_map(|part| gzip(part, 6)).collect();

    let mut pass = layer::decompressor(&blob[..12]);
    let mut scanner = LayerScanner::new(pass.format());
    let mut data_file = DataFile::default();
    let mut out = |decoded: Decoded<'_>| match decoded {
        Decoded::Bytes(bytes) => scanner.push(bytes, &mut data_file),
        Decoded::Checkpoint(checkpoint) => scanner.checkpoint(checkpoint),
    };
    for piece in cut(&blob, &[16 << 10, 5, 100_000]) {
        pass.push(piece, &mut out).unwrap();
    }
    pass.finish(&mut out).unwrap();
    let scanned = scanner.finish(blob.len() as u64).unwrap();

    assert_eq!(scanned.diff_id, Digest::of(&layer_tar));
    let index = Index::open(scanned.index.as_slice()).unwrap();
    assert_eq!(index.summary().format, Format::Gzip);
    assert!(index.member_count() > 8);
    let chunks = decode(&scanned.index, &blob, &[64 << 10]).unwrap();
    assert_eq!(index.entry_count() as usize, files.len());
    for (number, (name, content)) in files.iter().enumerate() {
        let entry = index.entry(number as u32).unwrap();
        assert_eq!(entry.path, name.as_bytes());
        let read: Vec<u8> = entry
            .chunk_range()
            .flat_map(|chunk| chunks[&chunk].clone())
            .collect();
        assert!(read == *content, "{name} by its chunks");
        let at = entry.data_offset as usize;
        let of_pass = &data_file.0[at.min(data_file.0.len())..];
        assert!(of_pass.starts_with(content), "{name} as the pass had it");
    }
}
