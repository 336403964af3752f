//! Numbering a finished tree and laying it out in the form of [`crate::image::tree::format`].

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::erofs;
use crate::image::tree::arena::{Arena, Made};
use crate::image::tree::format::{CRC_AT, Detail, DirentRecord, HEADER_BYTES, Header, NONE, NodeRecord};
use crate::image::tree::{ROOT, too_large};
use crate::layer::entry::{Kind, Time};
use crate::layer::index::{EntryRef, Index};
use crate::layer::xattrs;

/// Lays out the tree of `arena`, whose inodes are made from the entries of `layers`.
pub(super) fn write<B: Deref<Target = [u8]>>(
    layers: &[&Index<B>],
    mut arena: Arena<'_>,
    key: &Digest,
) -> Result<Vec<u8>> {
    arena.freeze();
    let listing = Listing::of(&arena);
    let numbering = Numbering::of(&arena, &listing);
    let mut writer = Writer {
        layers,
        arena: &arena,
        listing: &listing,
        numbering: &numbering,
        out: Vec::new(),
        file_bytes: 0,
        dirents: 0,
        link_bytes: 0,
        xattrs: XattrPool::default(),
    };
    writer.write(key)
}

/// The names of each directory, sorted.
struct Listing {
    /// The names of directory `dir` are `slots[starts[dir]..starts[dir + 1]]`.
    starts: Vec<u32>,
    slots: Vec<u32>,
}

impl Listing {
    fn of(arena: &Arena<'_>) -> Self {
        let live = || {
            let slots = arena.slots().iter().enumerate();
            slots.filter(|(_, slot)| slot.child().is_some())
        };
        // Counting sort: counts stand two places later at first, so that after filling the starts are in place.
        let mut starts = vec![0u32; arena.node_count() + 2];
        for (_, slot) in live() {
            starts[slot.dir as usize + 2] += 1;
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        let mut slots = vec![0u32; sum as usize];
        for (number, slot) in live() {
            let next = &mut starts[slot.dir as usize + 1];
            slots[*next as usize] = number as u32;
            *next += 1;
        }
        for dir in 0..arena.node_count() {
            let range = starts[dir] as usize..starts[dir + 1] as usize;
            slots[range].sort_unstable_by_key(|&slot| arena.slots()[slot as usize].name);
        }
        Self { starts, slots }
    }

    fn range(&self, dir: u32) -> std::ops::Range<u32> {
        self.starts[dir as usize]..self.starts[dir as usize + 1]
    }

    /// The slots of the names in a directory.
    fn names(&self, dir: u32) -> &[u32] {
        let range = self.range(dir);
        &self.slots[range.start as usize..range.end as usize]
    }
}

/// The final numbers of the inodes that can be reached from the root.
struct Numbering {
    /// Inodes of the arena in the order of their final numbers.
    order: Vec<u32>,
    /// The final number by the arena's.
    numbers: Vec<u32>,
    /// Link count by the arena's number.
    nlinks: Vec<u32>,
    dirents: u64,
    name_bytes: u64,
}

impl Numbering {
    /// Visits the tree depth first, each directory in the order of its names.
    fn of(arena: &Arena<'_>, listing: &Listing) -> Self {
        let mut this = Self {
            order: Vec::with_capacity(listing.slots.len() + 1),
            numbers: vec![NONE; arena.node_count()],
            nlinks: vec![0; arena.node_count()],
            dirents: 0,
            name_bytes: 0,
        };
        let root = arena.root();
        this.visit(root);
        this.nlinks[root as usize] = 2;
        let mut open = vec![(root, listing.range(root))];
        while let Some((dir, names)) = open.last_mut() {
            let Some(position) = names.next() else {
                open.pop();
                continue;
            };
            let dir = *dir;
            let slot = arena.slots()[listing.slots[position as usize] as usize];
            let Some(child) = slot.child() else { continue };
            this.dirents += 1;
            this.name_bytes += slot.name.len() as u64;
            if arena.node(child).kind == Kind::Dir {
                this.nlinks[dir as usize] += 1;
                this.nlinks[child as usize] = 2;
                this.visit(child);
                open.push((child, listing.range(child)));
            } else {
                this.nlinks[child as usize] += 1;
                this.visit(child);
            }
        }
        this
    }

    fn visit(&mut self, node: u32) {
        if self.numbers[node as usize] == NONE {
            self.numbers[node as usize] = self.order.len() as u32;
            self.order.push(node);
        }
    }
}

/// Writes the sections one after the other into one buffer that has the right size from the start.
struct Writer<'w, B> {
    layers: &'w [&'w Index<B>],
    arena: &'w Arena<'w>,
    listing: &'w Listing,
    numbering: &'w Numbering,
    out: Vec<u8>,
    file_bytes: u64,
    /// Dirents and bytes of symlink targets that the inodes so far have.
    dirents: u32,
    link_bytes: u64,
    xattrs: XattrPool,
}

impl<B: Deref<Target = [u8]>> Writer<'_, B> {
    fn write(&mut self, key: &Digest) -> Result<Vec<u8>> {
        let numbering = self.numbering;
        let mut header = Header {
            key: *key,
            nodes: numbering.order.len() as u64,
            dirents: numbering.dirents,
            string_bytes: numbering.name_bytes + self.all_link_bytes()?,
            xattr_bytes: 0,
            file_bytes: 0,
        };
        if header.string_bytes > u64::from(u32::MAX) {
            return Err(too_large("more than 4 GiB of names"));
        }
        self.out.reserve_exact(header.end() as usize);
        self.out.resize(HEADER_BYTES, 0);
        for number in 0..numbering.order.len() as u32 {
            self.node(number)?;
        }
        self.dirents();
        self.strings()?;
        self.out.append(&mut self.xattrs.encoded);
        header.xattr_bytes = self.out.len() as u64 - header.xattrs_start();
        header.file_bytes = self.file_bytes;
        let mut head = Vec::with_capacity(HEADER_BYTES);
        header.put(&mut head);
        self.out[..HEADER_BYTES].copy_from_slice(&head);
        let crc = crc32fast::hash(&self.out[CRC_AT + 4..]);
        self.out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        Ok(std::mem::take(&mut self.out))
    }

    /// The entry that an inode is made from.
    fn entry(&self, made: Made) -> Result<Option<EntryRef<'_>>> {
        if made.entry == NONE {
            return Ok(None);
        }
        self.layers[usize::from(made.layer)].entry(made.entry).map(Some)
    }

    /// The symlinks' targets in the order of the inodes.
    fn links(&self) -> impl Iterator<Item = Result<&[u8]>> {
        let made = self.numbering.order.iter().map(|&node| self.arena.node(node));
        made.filter(|made| made.kind == Kind::Symlink)
            .map(|made| Ok(self.entry(made)?.map(|entry| entry.link).unwrap_or_default()))
    }

    fn all_link_bytes(&self) -> Result<u64> {
        self.links().map(|link| Ok(link?.len() as u64)).sum()
    }

    fn node(&mut self, number: u32) -> Result<()> {
        let node = self.numbering.order[number as usize];
        let made = self.arena.node(node);
        let mut record = NodeRecord {
            kind: made.kind,
            mode: 0o755,
            layer: made.layer,
            link_len: 0,
            uid: 0,
            gid: 0,
            nlink: self.numbering.nlinks[node as usize],
            entry: made.entry,
            mtime: Time::default(),
            parent: ROOT,
            detail: Detail(0),
            xattrs: (0, 0),
            name: NONE,
            dir_bytes: 0,
        };
        if made.kind == Kind::Dir {
            let names = self.listing.names(node);
            let children = names.len() as u32;
            let names = names.iter().map(|&slot| self.arena.slots()[slot as usize].name);
            record.dir_bytes = u32::try_from(erofs::dir_bytes(names))
                .map_err(|_| too_large("a directory with more than 4 GiB of names"))?;
            record.detail = Detail::pair(self.dirents, children);
            self.dirents += children;
        }
        if made.entry != NONE {
            let index = self.layers[usize::from(made.layer)];
            let entry = index.entry(made.entry)?;
            record.mode = (entry.mode & 0o7777) as u16;
            (record.uid, record.gid) = (entry.uid, entry.gid);
            record.mtime = clamp(entry.mtime);
            record.xattrs = self.xattrs.add(index.xattrs(&entry)?)?;
            match made.kind {
                Kind::File => {
                    record.detail = Detail(entry.size);
                    let file_bytes = self.file_bytes.checked_add(entry.size);
                    self.file_bytes = file_bytes.ok_or_else(|| {
                        Error::malformed("layer index", "its files are larger than any disk")
                    })?;
                }
                Kind::Symlink => {
                    record.mode = 0o777;
                    record.link_len = entry.link.len() as u16;
                    record.detail = Detail(self.link_bytes);
                    self.link_bytes += entry.link.len() as u64;
                }
                Kind::Char | Kind::Block => record.detail = Detail::pair(entry.rdev.0, entry.rdev.1),
                Kind::Dir | Kind::Fifo | Kind::Hardlink => {}
            }
        }
        record.put(&mut self.out);
        Ok(())
    }

    /// Writes the names of each directory, in the order of the directories' numbers.
    fn dirents(&mut self) {
        let mut name_at = self.link_bytes;
        let mut position = 0;
        for (number, &dir) in self.numbering.order.iter().enumerate() {
            for &slot in self.listing.names(dir) {
                let slot = self.arena.slots()[slot as usize];
                let Some(child) = slot.child() else { continue };
                let node = self.numbering.numbers[child as usize];
                let name = (name_at as u32, slot.name.len() as u16);
                DirentRecord { node, name }.put(&mut self.out);
                NodeRecord::set_name(&mut self.out, node, number as u32, position);
                name_at += slot.name.len() as u64;
                position += 1;
            }
        }
    }

    /// Writes the symlinks' targets and the names, each in the order in which the records above count on them.
    fn strings(&mut self) -> Result<()> {
        let mut out = std::mem::take(&mut self.out);
        for link in self.links() {
            out.extend_from_slice(link?);
        }
        for &dir in &self.numbering.order {
            for &slot in self.listing.names(dir) {
                out.extend_from_slice(self.arena.slots()[slot as usize].name);
            }
        }
        self.out = out;
        Ok(())
    }
}

/// What containerd does with times before 1970 and beyond 64-bit nanoseconds: they become 1970.
fn clamp(time: Time) -> Time {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    if time.nanos >= 1_000_000_000 || nanos < 0 || nanos > i128::from(i64::MAX) {
        return Time::default();
    }
    time
}

/// Whether an extended attribute is the image's to say. Labels of security modules are the host's, `user.overlay.` and
/// all of `trusted.` are how overlay filesystems keep their own state.
fn is_shown(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

/// Encoded xattrs, equal ones once.
#[derive(Debug, Default)]
struct XattrPool {
    encoded: Vec<u8>,
    /// Place and length by hash. Of two that collide only one is found again: the other is merely stored twice.
    places: HashMap<u64, (u32, u32)>,
    hasher: RandomState,
}

impl XattrPool {
    /// Adds what is to be shown of `all` and returns its place and length. Of two attributes of one name the last counts.
    fn add(&mut self, all: Vec<(&[u8], &[u8])>) -> Result<(u32, u32)> {
        let mut shown: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for (name, value) in all.into_iter().filter(|(name, _)| is_shown(name)) {
            // The index sorts them, so equal names follow one another.
            if shown.last().is_some_and(|(last, _)| last == name) {
                shown.pop();
            }
            shown.push((name.to_vec(), value.to_vec()));
        }
        if shown.is_empty() {
            return Ok((0, 0));
        }
        let encoded = xattrs::encode(&shown)?;
        let hash = self.hasher.hash_one(&encoded);
        if let Some(&(start, len)) = self.places.get(&hash)
            && self.encoded[start as usize..][..len as usize] == encoded
        {
            return Ok((start, len));
        }
        let place = (self.encoded.len() as u64, encoded.len() as u64);
        if place.0 + place.1 > u64::from(u32::MAX) {
            return Err(too_large("more than 4 GiB of extended attributes"));
        }
        let place = (place.0 as u32, place.1 as u32);
        self.encoded.extend_from_slice(&encoded);
        self.places.insert(hash, place);
        Ok(place)
    }
}
