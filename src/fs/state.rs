//! `.registryfs`: what the mount says about itself. Each lookup gives a snapshot of its own, whose size and content are of
//! the same moment.

use bytes::Bytes;

use crate::error::Result;
use crate::fs::Filesystem;
use crate::fs::nodes::{NameNode, STATE_INO};
use crate::fs::ops::{Caller, DirEntry, Entry, FOREVER, FileType, Lookup};
use std::time::Duration;

/// The files of the directory.
const FILES: [&str; 3] = ["version", "status.json", "errors"];

impl Filesystem {
    pub(super) fn lookup_state(&self, caller: Caller, dir: &NameNode, name: &[u8]) -> Result<Lookup> {
        if let Some(staged) = self.lookup_stage(caller, name) {
            return staged;
        }
        let content = match name {
            b"version" => format!("registryfs {}\n", env!("CARGO_PKG_VERSION")),
            b"status.json" => self.status_text(),
            b"errors" => self.journal().to_text(self.covers_failures()),
            _ => return Ok(Lookup::Absent(FOREVER)),
        };
        let path = dir.child_path(&String::from_utf8_lossy(name));
        Ok(Lookup::Found(self.snapshot(dir.ino, path, Bytes::from(content))))
    }

    /// A file that is made anew for each lookup.
    pub(super) fn snapshot(&self, parent_ino: u64, path: String, content: Bytes) -> Entry {
        let node = self.nodes().snapshot(parent_ino, path, content);
        // The name means this snapshot for this one lookup; the snapshot itself does not change.
        let attr = self.name_attr(&node);
        Entry {
            attr,
            attr_ttl: FOREVER,
            entry_ttl: Duration::ZERO,
        }
    }

    pub(super) fn state_entries(&self) -> Vec<DirEntry> {
        let entry = |(position, name): (usize, &&str)| DirEntry {
            name: name.as_bytes().to_vec(),
            ino: STATE_INO + 1 + position as u64,
            kind: FileType::File,
            next: 0,
        };
        FILES.iter().enumerate().map(entry).collect()
    }
}
