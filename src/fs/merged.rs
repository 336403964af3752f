//! Operations on the inside of merged trees. All but content comes from the mapped tree, at once.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fs::Filesystem;
use crate::fs::ops::{Answer, DirEntry, Entry, FOREVER, FileType, Lookup};
use crate::fs::slots::{Slot, file_type};
use crate::image::query::content_digest;
use crate::image::tree::Node;

/// Directory offsets: 1 is behind `.`, 2 behind `..`, then the children count on.
const CHILDREN_AT: u64 = 2;

impl Filesystem {
    pub(super) fn lookup_merged(&self, slot: &Arc<Slot>, dir: u32, name: &[u8]) -> Result<Lookup> {
        let tree = slot.rootfs.tree();
        let Some(number) = slot.rootfs.vouch(tree.lookup(dir, name)?)? else {
            return Ok(Lookup::Absent(FOREVER));
        };
        let node = slot.rootfs.vouch(tree.node(number)?)?;
        Ok(Lookup::Found(self.merged_entry(slot, &node)))
    }

    /// An entry for a node of a tree, counted as one lookup.
    pub(super) fn merged_entry(&self, slot: &Arc<Slot>, node: &Node) -> Entry {
        self.slots().count(slot, node);
        Entry {
            attr: slot.attr(node),
            attr_ttl: FOREVER,
            entry_ttl: FOREVER,
        }
    }

    pub(super) fn readdir_merged(
        &self,
        slot: &Arc<Slot>,
        number: u32,
        offset: u64,
        limit: usize,
    ) -> Result<Vec<DirEntry>> {
        let tree = slot.rootfs.tree();
        let dir = tree.node(number)?;
        if !dir.is_dir() {
            return Err(Error::posix(slot.path_of(number), libc::ENOTDIR));
        }
        let mut entries = Vec::with_capacity(limit.min(dir.child_count as usize + 2));
        if offset == 0 {
            entries.push(special(b".", slot.ino(&dir), 1));
        }
        if offset <= 1 {
            let parent = match &slot.view {
                Some(view) if number == crate::image::tree::ROOT => view.parent_ino,
                _ => slot.ino(&tree.node(dir.parent)?),
            };
            entries.push(special(b"..", parent, CHILDREN_AT));
        }
        let mut position = offset.saturating_sub(CHILDREN_AT);
        while entries.len() < limit.max(1) {
            let Ok(at) = u32::try_from(position) else { break };
            let Some((name, child)) = tree.child_at(&dir, at)? else {
                break;
            };
            let node = tree.node(child)?;
            position += 1;
            entries.push(DirEntry {
                name: name.to_vec(),
                ino: slot.ino(&node),
                kind: file_type(node.kind),
                next: position + CHILDREN_AT,
            });
        }
        slot.rootfs.vouch(entries)
    }

    pub(super) fn read_merged(
        &self,
        slot: &Arc<Slot>,
        node: u32,
        offset: u64,
        len: usize,
    ) -> Answer<Vec<u8>> {
        let node = match slot
            .rootfs
            .tree()
            .node(node)
            .and_then(|node| slot.rootfs.vouch(node))
        {
            Ok(node) => node,
            Err(error) => return Answer::Now(Err(error)),
        };
        let fetcher = self.images().fetcher();
        if let Some(at) = slot.rootfs.file_now(&node) {
            slot.rootfs.note_read(&node, &at);
            if let Some(bytes) = fetcher.read_now(&at, offset, len) {
                return Answer::Now(Ok(bytes));
            }
        }
        let (fetcher, slot) = (Arc::clone(fetcher), Arc::clone(slot));
        let path = merged_path(Arc::clone(&slot), node);
        self.journaled("read", path, async move {
            let at = slot.rootfs.file(&fetcher, &node).await?;
            slot.rootfs.note_read(&node, &at);
            fetcher.read(&at, offset, len).await
        })
    }

    /// The value of an extended attribute: of the image, or one of our own, which no listing shows.
    pub(super) fn getxattr_merged(&self, slot: &Arc<Slot>, number: u32, name: &[u8]) -> Answer<Vec<u8>> {
        let find = || -> Result<(Node, Option<Vec<u8>>)> {
            let tree = slot.rootfs.tree();
            let node = tree.node(number)?;
            let xattrs = tree.xattrs(&node)?;
            let found = xattrs.into_iter().find(|(known, _)| *known == name);
            slot.rootfs.vouch((node, found.map(|(_, value)| value.to_vec())))
        };
        let node = match find() {
            Ok((_, Some(value))) => return Answer::Now(Ok(value)),
            Ok((node, None)) => node,
            Err(error) => return Answer::Now(Err(error)),
        };
        let absent = || Answer::Now(Err(no_attribute(name)));
        let Some(own) = name.strip_prefix(b"user.registryfs.") else {
            return absent();
        };
        let is_file = file_type(node.kind) == FileType::File;
        match own {
            b"layer" if is_file || node.is_dir() => Answer::Now(Ok(node.layer.to_string().into_bytes())),
            b"digest" | b"cached" if is_file => {
                let (fetcher, slot) = (Arc::clone(self.images().fetcher()), Arc::clone(slot));
                let (name, wants_digest) = (name.to_vec(), own == b"digest");
                let path = merged_path(Arc::clone(&slot), node);
                self.journaled("getxattr", path, async move {
                    let at = slot.rootfs.file(&fetcher, &node).await?;
                    let text = if wants_digest {
                        content_digest(&at)?.map(|digest| digest.to_string())
                    } else {
                        Some(at.cached_bytes()?.to_string())
                    };
                    text.map(String::into_bytes).ok_or_else(|| no_attribute(&name))
                })
            }
            _ => absent(),
        }
    }

    pub(super) fn listxattr_merged(&self, slot: &Arc<Slot>, number: u32) -> Result<Vec<u8>> {
        let tree = slot.rootfs.tree();
        let mut names = Vec::new();
        for (name, _) in tree.xattrs(&tree.node(number)?)? {
            names.extend_from_slice(name);
            names.push(0);
        }
        slot.rootfs.vouch(names)
    }
}

/// Finds the path of a node, for a message that may never be needed. A file is shared by all paths that lead to its tree,
/// so its image names it.
fn merged_path(slot: Arc<Slot>, node: Node) -> impl FnOnce() -> String + Send + 'static {
    move || match slot.view {
        Some(_) => slot.path_of(node.number),
        None => format!("{} {}", slot.rootfs.name(), slot.path_of(node.number)),
    }
}

fn special(name: &[u8], ino: u64, next: u64) -> DirEntry {
    DirEntry {
        name: name.to_vec(),
        ino,
        kind: FileType::Dir,
        next,
    }
}

/// ENODATA, which no journal notes: programs ask for attributes all the time.
pub(super) fn no_attribute(name: &[u8]) -> Error {
    Error::posix(String::from_utf8_lossy(name), libc::ENODATA)
}
