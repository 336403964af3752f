//! Writing an image from front to back.

use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::erofs::chunks::DEVICES_PER_LAYER;
use crate::image::erofs::dirents::{DOTS, DirBlock};
use crate::image::erofs::disk::{
    BLOCK_BYTES, CHUNK_BYTES, DataLayout, Inode, Superblock, chunk_form, dirent_type, put_device, uuid,
};
use crate::image::erofs::header::{self, COVERED_AT, CRC_AT};
use crate::image::erofs::layout::{Content, Layout, Shape, Source};
use crate::image::erofs::xattrs::{Refusal, Sets};
use crate::image::tree::{Node, Tree};
use crate::layer::entry::Kind;
use crate::layer::index::{DATA_ALIGN_BYTES, DATA_BYTES_MAX, Index};
use crate::layer::index_builder::NAME_BYTES_MAX;

/// So much is written at once.
const WRITE_BYTES: usize = 256 << 10;

/// Writes the image of a tree that was merged under `key` from these layers, base first, to `out`, which is empty.
///
/// Its devices are two a layer, of the size that [`crate::fetch::device::DeviceAt::bytes`] says, and one of a block that
/// nothing refers to: as long as the kernel has it open, it has the image. The two have the same bytes. In the first are the
/// files that are best read with their neighbours, in the second the large ones, which are best read alone.
///
/// # Errors
/// [`Error::Unsupported`] naming the path that EROFS cannot express; [`Error::Malformed`] for a damaged tree or index;
/// [`Error::Io`] from `out`.
pub fn write<B, L, W>(tree: &Tree<B>, layers: &[&Index<L>], key: &Digest, out: W) -> Result<()>
where
    B: Deref<Target = [u8]>,
    L: Deref<Target = [u8]>,
    W: Write + Seek,
{
    let blocks = device_blocks(layers)?;
    let both = blocks.into_iter().flat_map(|blocks| [blocks; DEVICES_PER_LAYER]);
    let devices: Vec<u32> = both.chain([1]).collect();
    write_with(tree, layers, key, &devices, out)
}

/// The sizes of the layers' data files in blocks.
pub(super) fn device_blocks<L: Deref<Target = [u8]>>(layers: &[&Index<L>]) -> Result<Vec<u32>> {
    let blocks = layers.iter().map(|index| {
        let data_bytes = index.summary().data_bytes;
        if !data_bytes.is_multiple_of(BLOCK_BYTES) || data_bytes > DATA_BYTES_MAX {
            return Err(Error::malformed(
                "layer index",
                "its data file has an impossible size",
            ));
        }
        // No more than 2^31, by the check.
        Ok((data_bytes.max(DATA_ALIGN_BYTES) / BLOCK_BYTES) as u32)
    });
    blocks.collect()
}

/// As [`write`], with devices of these sizes in blocks.
pub(super) fn write_with<B, L, W>(
    tree: &Tree<B>,
    layers: &[&Index<L>],
    key: &Digest,
    devices: &[u32],
    out: W,
) -> Result<()>
where
    B: Deref<Target = [u8]>,
    L: Deref<Target = [u8]>,
    W: Write + Seek,
{
    let device_count = u16::try_from(devices.len())
        .map_err(|_| Error::unsupported("image", "more layers than EROFS can have devices"))?;
    let source = Source { tree, layers };
    let mut sets = Sets::of(tree)?;
    let layout = Layout::of(&source, &mut sets, device_count)?;
    let mut writer = Writer {
        source,
        sets,
        layout,
        out: Out::new(out),
    };
    writer.head(key, devices, device_count)?;
    writer.inodes()?;
    writer.content()?;
    writer.shared_xattrs()?;
    writer.out.finish()
}

struct Writer<'a, B, L, W> {
    source: Source<'a, B, L>,
    sets: Sets,
    layout: Layout,
    out: Out<W>,
}

impl<B, L, W> Writer<'_, B, L, W>
where
    B: Deref<Target = [u8]>,
    L: Deref<Target = [u8]>,
    W: Write + Seek,
{
    fn head(&mut self, key: &Digest, devices: &[u32], device_count: u16) -> Result<()> {
        let identity = header::identity(self.source.tree, self.source.layers, key);
        let out = &mut self.out.pending;
        header::put(out, &identity, u64::from(self.layout.blocks) * BLOCK_BYTES);
        Superblock {
            inodes: u64::from(self.source.tree.node_count()),
            blocks: self.layout.blocks,
            inodes_block: self.layout.inodes_block,
            xattrs_block: self.layout.xattrs_block,
            uuid: uuid(key),
            devices: device_count,
        }
        .put(out);
        for &blocks in devices {
            put_device(out, blocks);
        }
        self.out.spill()
    }

    fn inodes(&mut self) -> Result<()> {
        let mut content_block = self.layout.content_block;
        for number in 0..self.source.tree.node_count() {
            let node = self.source.tree.node(number)?;
            self.out.pad_to(self.layout.start(number)?)?;
            let blocks = self
                .inode(&node, content_block)
                .map_err(|why| self.source.refused(number, why))?;
            content_block += blocks;
            self.out.spill_if_full()?;
        }
        self.out
            .pad_to(u64::from(self.layout.content_block) * BLOCK_BYTES)
    }

    /// Appends an inode and what stands behind it, and answers how many blocks of content it has elsewhere.
    fn inode(&mut self, node: &Node, content_block: u32) -> std::result::Result<u32, Refusal> {
        if node.nlink == 0 || node.mtime.nanos >= 1_000_000_000 {
            return Err(damaged("an inode without names, or with a time that is none").into());
        }
        let shape = Shape::of(&self.source, &mut self.sets, node)?;
        let (layout, union, blocks) = match &shape.content {
            Content::Nothing => (DataLayout::Plain, node.device_number(), 0),
            Content::Flat { blocks, tail_bytes } => {
                let layout = if *tail_bytes > 0 {
                    DataLayout::Inline
                } else {
                    DataLayout::Plain
                };
                (layout, content_block, *blocks as u32)
            }
            Content::Chunks(chunks) => (DataLayout::Chunks, chunk_form(chunks.bits), 0),
        };
        let pending = &mut self.out.pending;
        Inode {
            layout,
            xattr_bytes: shape.xattr_bytes,
            kind: node.kind,
            mode: node.mode,
            size: node.size,
            union,
            number: node.number.saturating_add(1),
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            nlink: node.nlink,
        }
        .put(pending);
        self.sets.put_body(self.source.tree, node, pending)?;
        match &shape.content {
            Content::Chunks(chunks) => {
                let table_at = self.out.at().next_multiple_of(CHUNK_BYTES);
                self.out.pad_to(table_at)?;
                chunks.put(&mut self.out.pending);
            }
            Content::Flat { tail_bytes, .. } if *tail_bytes > 0 => self.tail(node)?,
            _ => {}
        }
        Ok(blocks)
    }

    /// Appends the content of a directory or symlink that stands behind its inode.
    fn tail(&mut self, node: &Node) -> std::result::Result<(), Refusal> {
        if node.kind == Kind::Symlink {
            let link = link(self.source.tree, node)?;
            self.out.pending.extend_from_slice(link);
            return Ok(());
        }
        let last = node.size / BLOCK_BYTES;
        let Self {
            source, layout, out, ..
        } = self;
        directory(source, layout, node, &mut |number, block| {
            if number == last {
                out.pending.extend_from_slice(block);
            }
            Ok(())
        })
    }

    /// Appends the content that stands in blocks of its own.
    fn content(&mut self) -> Result<()> {
        for number in 0..self.source.tree.node_count() {
            let node = self.source.tree.node(number)?;
            if matches!(node.kind, Kind::Dir | Kind::Symlink) {
                self.blocks_of(&node)
                    .map_err(|why| self.source.refused(number, why))?;
            }
        }
        self.out.pad_to(u64::from(self.layout.xattrs_block) * BLOCK_BYTES)
    }

    fn blocks_of(&mut self, node: &Node) -> std::result::Result<(), Refusal> {
        let shape = Shape::of(&self.source, &mut self.sets, node)?;
        let blocks = match shape.content {
            Content::Flat { blocks, .. } if blocks > 0 => blocks,
            _ => return Ok(()),
        };
        if node.kind == Kind::Symlink {
            let link = link(self.source.tree, node)?;
            return Ok(self.out.block(link)?);
        }
        let Self {
            source, layout, out, ..
        } = self;
        directory(source, layout, node, &mut |number, block| {
            if number < blocks { out.block(block) } else { Ok(()) }
        })
    }

    fn shared_xattrs(&mut self) -> Result<()> {
        let start = u64::from(self.layout.xattrs_block) * BLOCK_BYTES;
        for number in 0..self.source.tree.node_count() {
            let node = self.source.tree.node(number)?;
            let at = self.out.at() - start;
            self.sets
                .put_shared(self.source.tree, &node, at, &mut self.out.pending)
                .map_err(|why| self.source.refused(number, why))?;
            self.out.spill_if_full()?;
        }
        self.out.pad_to(u64::from(self.layout.blocks) * BLOCK_BYTES)
    }
}

/// The target of a symlink.
fn link<'t, B: Deref<Target = [u8]>>(
    tree: &'t Tree<B>,
    node: &Node,
) -> std::result::Result<&'t [u8], Refusal> {
    let link = tree.link(node)?;
    if link.is_empty() || link.contains(&0) {
        return Err("a symbolic link without a target, or with a NUL in it".into());
    }
    Ok(link)
}

/// Calls `emit` with each block of a directory and its number, without padding.
fn directory<B, L>(
    source: &Source<'_, B, L>,
    layout: &Layout,
    dir: &Node,
    emit: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> std::result::Result<(), Refusal>
where
    B: Deref<Target = [u8]>,
{
    let (mut block, mut bytes, mut number) = (DirBlock::default(), Vec::new(), 0);
    let mut add = |node: u32, kind: Kind, name: &[u8]| -> Result<()> {
        if !block.has_room(name) {
            bytes.clear();
            block.take(&mut bytes);
            emit(number, &bytes)?;
            number += 1;
        }
        block.push(layout.nid(node)?, dirent_type(kind), name);
        Ok(())
    };
    let mut dots = DOTS.iter().zip([dir.number, dir.parent]).peekable();
    let mut last_name: &[u8] = b"";
    for position in 0..dir.child_count {
        let Some((name, child)) = source.tree.child_at(dir, position)? else {
            break;
        };
        check_name(source, dir, name)?;
        if name <= last_name {
            return Err(damaged("names that are not sorted").into());
        }
        last_name = name;
        while let Some((dot, node)) = dots.next_if(|(dot, _)| **dot < name) {
            add(node, Kind::Dir, dot)?;
        }
        add(child, source.tree.node(child)?.kind, name)?;
    }
    for (dot, node) in dots {
        add(node, Kind::Dir, dot)?;
    }
    bytes.clear();
    block.take(&mut bytes);
    if number * BLOCK_BYTES + bytes.len() as u64 != dir.size {
        return Err(damaged("a directory of another size than its names").into());
    }
    Ok(emit(number, &bytes)?)
}

/// Refuses what can be no name in a directory.
fn check_name<B, L>(source: &Source<'_, B, L>, dir: &Node, name: &[u8]) -> Result<()>
where
    B: Deref<Target = [u8]>,
{
    if name.len() > NAME_BYTES_MAX {
        let mut path = source.tree.path_of(dir.number)?;
        path.push(b'/');
        path.extend_from_slice(name);
        let path = String::from_utf8_lossy(&path).into_owned();
        return Err(Error::unsupported(path, "a name over 255 bytes"));
    }
    if name.is_empty() || DOTS.contains(&name) || name.contains(&b'/') || name.contains(&0) {
        return Err(damaged("a name that can be none"));
    }
    Ok(())
}

fn damaged(why: &str) -> Error {
    Error::malformed("merged tree", why)
}

/// Where an image goes: collects, counts, and computes the checksum.
struct Out<W> {
    out: W,
    pending: Vec<u8>,
    written_bytes: u64,
    crc: crc32fast::Hasher,
}

impl<W: Write + Seek> Out<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            pending: Vec::with_capacity(WRITE_BYTES * 2),
            written_bytes: 0,
            crc: crc32fast::Hasher::new(),
        }
    }

    /// Where the next byte will be.
    fn at(&self) -> u64 {
        self.written_bytes + self.pending.len() as u64
    }

    /// Appends zeros up to a place.
    fn pad_to(&mut self, at: u64) -> Result<()> {
        let missing = at.checked_sub(self.at());
        // Between two inodes it is less than a block, and no more anywhere else.
        let missing = missing.filter(|&missing| missing <= 2 * BLOCK_BYTES);
        let missing = missing.ok_or_else(|| damaged("it changed while it was written"))?;
        self.pending.resize(self.pending.len() + missing as usize, 0);
        self.spill_if_full()
    }

    /// Appends a block, padded.
    fn block(&mut self, block: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(block);
        let padded = self.at().next_multiple_of(BLOCK_BYTES);
        self.pad_to(padded)
    }

    fn spill_if_full(&mut self) -> Result<()> {
        if self.pending.len() >= WRITE_BYTES {
            self.spill()
        } else {
            Ok(())
        }
    }

    fn spill(&mut self) -> Result<()> {
        let uncovered = COVERED_AT.saturating_sub(self.written_bytes) as usize;
        self.crc.update(self.pending.get(uncovered..).unwrap_or_default());
        self.out.write_all(&self.pending).map_err(failed)?;
        self.written_bytes += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Writes the rest, and the checksum into its place.
    fn finish(mut self) -> Result<()> {
        self.spill()?;
        let crc = self.crc.finalize().to_le_bytes();
        self.out
            .seek(SeekFrom::Start(CRC_AT))
            .and_then(|_| self.out.write_all(&crc))
            .and_then(|()| self.out.flush())
            .map_err(failed)
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("EROFS image", &error)
}
