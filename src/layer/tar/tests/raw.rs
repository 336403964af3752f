//! Tar put together byte by byte, also as no writer would.

use crate::layer::tar::{BLOCK_BYTES, checksums, padding};

/// A header block in the making.
#[derive(Clone)]
pub(in crate::layer) struct Raw([u8; BLOCK_BYTES]);

impl Raw {
    pub(in crate::layer) fn of(block: [u8; BLOCK_BYTES]) -> Self {
        Self(block)
    }

    /// As the seventh Unix had it: no magic number.
    pub(in crate::layer) fn v7(typeflag: u8, name: &str, size: u64) -> Self {
        Self([0; BLOCK_BYTES])
            .put(0, name.as_bytes())
            .put(100, b"0000644\0")
            .put(108, b"0000000\0")
            .put(116, b"0000000\0")
            .put(124, format!("{size:011o}\0").as_bytes())
            .put(136, b"00000000000\0")
            .put(156, &[typeflag])
    }

    pub(in crate::layer) fn ustar(typeflag: u8, name: &str, size: u64) -> Self {
        Self::v7(typeflag, name, size).put(257, b"ustar\x0000")
    }

    pub(in crate::layer) fn gnu(typeflag: u8, name: &str, size: u64) -> Self {
        Self::v7(typeflag, name, size).put(257, b"ustar  \0")
    }

    pub(in crate::layer) fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The block with its checksum.
    pub(in crate::layer) fn finish(self) -> Vec<u8> {
        let sum = checksums(&self.0).0;
        self.put(148, format!("{sum:06o}\0 ").as_bytes()).0.to_vec()
    }

    /// The block and its payload, padded.
    pub(in crate::layer) fn with(self, payload: &[u8]) -> Vec<u8> {
        [self.finish(), padded(payload)].concat()
    }
}

pub(in crate::layer) fn padded(payload: &[u8]) -> Vec<u8> {
    let mut bytes = payload.to_vec();
    bytes.resize(payload.len() + padding(payload.len() as u64), 0);
    bytes
}

/// The payload of an extended header.
pub(in crate::layer) fn records<V: AsRef<[u8]>>(records: &[(&str, V)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (key, value) in records {
        let rest = [b" ", key.as_bytes(), b"=", value.as_ref(), b"\n"].concat();
        let mut len = rest.len();
        while len != rest.len() + len.to_string().len() {
            len = rest.len() + len.to_string().len();
        }
        payload.extend_from_slice(len.to_string().as_bytes());
        payload.extend_from_slice(&rest);
    }
    payload
}

/// An extended header.
pub(in crate::layer) fn pax<V: AsRef<[u8]>>(of: &[(&str, V)]) -> Vec<u8> {
    let payload = records(of);
    Raw::ustar(b'x', "PaxHeader", payload.len() as u64).with(&payload)
}

/// A sparse file in PAX version 1.0: what is in `segments` is `payload`.
pub(in crate::layer) fn sparse(name: &str, size: u64, segments: &[(u64, u64)], payload: &[u8]) -> Vec<u8> {
    let mut map = format!("{}\n", segments.len());
    for (offset, bytes) in segments {
        map += &format!("{offset}\n{bytes}\n");
    }
    let stored = [padded(map.as_bytes()), payload.to_vec()].concat();
    let head = pax(&[
        ("GNU.sparse.major", "1".to_owned()),
        ("GNU.sparse.minor", "0".to_owned()),
        ("GNU.sparse.name", name.to_owned()),
        ("GNU.sparse.realsize", size.to_string()),
    ]);
    let file = Raw::ustar(b'0', "GNUSparseFile.0/x", stored.len() as u64).with(&stored);
    [head, file].concat()
}
