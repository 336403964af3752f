//! Which chunks of a layer are in its data file: one bit each, in a small memory-mapped file.
//!
//! The map is a hint about the data, and says so: it survives a crash of the process as it is, because the page cache
//! holds data and map alike; after an unclean reboot neither is sure to have reached the disk, so every bit becomes a
//! *suspect* that is verified by its digest before use. The file keeps its bits and the old boot's id until no suspect is
//! left, so that what nobody looked at is not lost. A clean shutdown syncs the data first and then says `clean`, and no
//! mark is set in between. The mark of a chunk is set only after its bytes were verified and written.
//!
//! The map also remembers two things of the data file that hold for one boot: that every marked chunk was verified in it
//! (also those that a clean shutdown made trustworthy without looking), and that the file was lent to the kernel, which may
//! have it still, whatever became of the process that lent it (see [`crate::store::lending`]).
//!
//! ```text
//! magic 8 | version u32 | clean u32 | chunks u64 | boot id 16 | index id u32 | boot id of verification 16 | boot id of
//! lending 16 | … | at 4096: bits, u64 little-endian words
//! ```
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use parking_lot::RwLock;

use crate::error::{Error, Result};
use crate::store::sigbus::Guard;

const MAGIC: [u8; 8] = *b"RFSCHMAP";
const VERSION: u32 = 1;
const BITS_AT: usize = 4096;
const CLEAN_AT: usize = 12;
const BOOT_AT: usize = 24;
const VERIFIED_AT: usize = 44;
const LENT_AT: usize = 60;

/// The kernel's id of a boot.
type BootId = [u8; 16];
/// No boot's: nothing is known.
const NO_BOOT: BootId = [0; 16];

/// The chunk map of one layer.
#[derive(Debug)]
pub struct ChunkMap {
    // Declared before the map, so that the guard ends first.
    _guard: Option<Guard>,
    map: MmapRaw,
    chunks: u32,
    boot: BootId,
    suspects: Option<Suspects>,
    /// Whether the file says `clean`, so that the first mark must take that back.
    clean: AtomicBool,
    /// Shared by those who mark, exclusive for who changes what the file says of itself.
    state: RwLock<()>,
}

/// Bits that were set before an unclean reboot. Emptied as they are looked at.
#[derive(Debug)]
struct Suspects {
    words: Box<[AtomicU64]>,
    left: AtomicU32,
}

impl ChunkMap {
    /// Opens or creates the map of a layer with `chunks` chunks whose index is known by `index_id`. A map that does not
    /// fit is begun anew: that costs fetches, never wrong bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, chunks: u32, index_id: u32) -> Result<Self> {
        Self::open_at_boot(path, chunks, index_id, boot_id())
    }

    /// A map that no file could take. Nothing is present.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no memory.
    pub fn in_memory(chunks: u32) -> Result<Self> {
        let map = MmapOptions::new().len(file_bytes(chunks)).map_anon();
        let map = map.map_err(|e| Error::io("chunk map", &e))?;
        Ok(Self {
            _guard: None,
            map: MmapRaw::from(map),
            chunks,
            boot: NO_BOOT,
            suspects: None,
            clean: AtomicBool::new(false),
            state: RwLock::new(()),
        })
    }

    /// Whether there is a map that [`Self::open`] would not begin anew.
    #[must_use]
    pub fn is_kept(path: &Path, chunks: u32, index_id: u32) -> bool {
        let fits =
            File::open(path).and_then(|file| fits(&file, &header(chunks, index_id), file_bytes(chunks)));
        fits.unwrap_or(false)
    }

    pub(super) fn open_at_boot(path: &Path, chunks: u32, index_id: u32, boot: BootId) -> Result<Self> {
        let failed = |e: std::io::Error| Error::io(path.display().to_string(), &e);
        let len = file_bytes(chunks);
        let header = header(chunks, index_id);
        let mut options = File::options();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        if !fits(&file, &header, len).map_err(failed)? {
            // Zeros are written, not left as a hole: a full disk must not turn a mark into SIGBUS.
            let mut zeros = vec![0; len];
            zeros[..header.len()].copy_from_slice(&header);
            zeros[BOOT_AT..BOOT_AT + 16].copy_from_slice(&boot);
            zeros[40..44].copy_from_slice(&index_id.to_le_bytes());
            zeros[VERIFIED_AT..VERIFIED_AT + 16].copy_from_slice(&boot);
            file.set_len(0)
                .and_then(|()| file.write_all(&zeros))
                .map_err(failed)?;
        }
        let map = MmapRaw::map_raw(&file).map_err(failed)?;
        let guard = Guard::new(map.as_ptr(), map.len());
        let mut map = Self {
            _guard: guard,
            map,
            chunks,
            boot,
            suspects: None,
            clean: AtomicBool::new(false),
            state: RwLock::new(()),
        };
        map.adopt();
        Ok(map)
    }

    /// Decides what the bits are worth after the boot that the file names.
    fn adopt(&mut self) {
        // Bits of no chunk would be counted as chunks.
        if let (Some(last), Some(used)) = (
            self.words().last(),
            self.chunks.checked_rem(64).filter(|&used| used > 0),
        ) {
            last.fetch_and((1 << used) - 1, Ordering::Relaxed);
        }
        let clean = self.header_word(CLEAN_AT) == 1;
        self.clean.store(clean, Ordering::Release);
        // A boot without an id is not known to be the same as any other.
        let same_boot = self.header_id(BOOT_AT) == self.boot && self.boot != NO_BOOT;
        let load = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        let words: Box<[AtomicU64]> = self.words().iter().map(load).collect();
        let left = count_ones(&words);
        if left == 0 {
            self.set_header_id(VERIFIED_AT, self.boot);
        }
        if clean || same_boot || left == 0 {
            self.set_header_id(BOOT_AT, self.boot);
        } else {
            let left = AtomicU32::new(left);
            self.suspects = Some(Suspects { words, left });
        }
    }

    /// Whether every chunk that is present was verified since the machine started.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.boot != NO_BOOT && self.header_id(VERIFIED_AT) == self.boot && !self.has_suspects()
    }

    /// Whether every chunk is marked, some of them without having been verified since the machine started.
    #[must_use]
    pub fn is_to_verify(&self) -> bool {
        self.boot != NO_BOOT && !self.is_verified() && count_ones(self.words()) == self.chunks
    }

    /// Notes that every chunk that is present was verified since the machine started.
    pub fn note_verified(&self) {
        self.set_header_id(VERIFIED_AT, self.boot);
    }

    /// Notes that what is present may not be what was verified.
    pub fn note_doubted(&self) {
        self.set_header_id(VERIFIED_AT, NO_BOOT);
    }

    /// Whether the kernel may have the data file: it was lent since the machine started, by this process or another.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        match self.header_id(LENT_AT) {
            NO_BOOT => false,
            // Without an id it is not known to be another boot.
            lent => self.boot == NO_BOOT || lent == self.boot,
        }
    }

    /// Notes that the data file is lent, before it is.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be told; [`Error::Unsupported`] where nobody would know later in which boot it was.
    pub fn note_lent(&self) -> Result<()> {
        if self.boot == NO_BOOT {
            return Err(Error::unsupported("chunk map", "the kernel says no boot id"));
        }
        self.set_header_id(LENT_AT, self.boot);
        let flushed = self.map.flush_range(0, BITS_AT);
        flushed.map_err(|e| Error::io("chunk map", &e))
    }

    /// Notes that the data file is another one than was lent.
    pub fn forget_lent(&self) {
        self.set_header_id(LENT_AT, NO_BOOT);
    }

    /// Whether a chunk is in the data file, verified.
    #[must_use]
    pub fn is_present(&self, chunk: u32) -> bool {
        let marked = self
            .word(chunk)
            .is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0);
        marked && !self.is_suspect(chunk)
    }

    /// Whether a chunk was there before an unclean reboot, and has not been looked at since.
    #[must_use]
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.suspect(chunk)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Sets the mark of a chunk whose verified bytes have been written.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be told that it is not clean any more; the mark is not set then.
    pub fn mark(&self, chunk: u32) -> Result<()> {
        let mut marking = self.state.read();
        while self.clean.load(Ordering::Acquire) {
            drop(marking);
            self.take_clean_back()?;
            marking = self.state.read();
        }
        if let Some((word, bit)) = self.word(chunk) {
            word.fetch_or(bit, Ordering::SeqCst);
        }
        self.clear_suspect(chunk);
        drop(marking);
        Ok(())
    }

    /// Takes the mark of a chunk away, before its bytes go. Answers whether it had one, as a suspect also has.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be told that it is not clean any more; the mark stays then.
    pub fn clear(&self, chunk: u32) -> Result<bool> {
        let mut marking = self.state.read();
        while self.clean.load(Ordering::Acquire) {
            drop(marking);
            self.take_clean_back()?;
            marking = self.state.read();
        }
        let was_marked = self
            .word(chunk)
            .is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0);
        self.clear_suspect(chunk);
        drop(marking);
        Ok(was_marked)
    }

    fn take_clean_back(&self) -> Result<()> {
        let _changing = self.state.write();
        if self.clean.load(Ordering::Acquire) {
            self.set_header_word(CLEAN_AT, 0);
            self.map
                .flush_range(0, BITS_AT)
                .map_err(|e| Error::io("chunk map", &e))?;
            self.clean.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// A suspect was found wanting: it is not there.
    pub fn drop_suspect(&self, chunk: u32) {
        if let (Some((word, bit)), true) = (self.word(chunk), self.is_suspect(chunk)) {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
        self.clear_suspect(chunk);
    }

    fn clear_suspect(&self, chunk: u32) {
        let (Some(suspects), Some((word, bit))) = (&self.suspects, self.suspect(chunk)) else {
            return;
        };
        let was_suspect = word.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
        if was_suspect && suspects.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.set_header_id(BOOT_AT, self.boot);
            self.set_header_id(VERIFIED_AT, self.boot);
        }
    }

    fn has_suspects(&self) -> bool {
        let suspects = self.suspects.as_ref();
        suspects.is_some_and(|suspects| suspects.left.load(Ordering::Acquire) > 0)
    }

    /// Number of chunks that are present.
    #[must_use]
    pub fn count(&self) -> u32 {
        let suspects = self
            .suspects
            .as_ref()
            .map_or(0, |suspects| count_ones(&suspects.words));
        count_ones(self.words()).saturating_sub(suspects)
    }

    /// Syncs the data with `sync_data` and then says in the file that data and bits are on the disk. No mark is set
    /// meanwhile. While suspects are left, the file stays as it is.
    ///
    /// # Errors
    /// Those of `sync_data`; [`Error::Io`].
    pub fn make_clean(&self, sync_data: impl FnOnce() -> Result<()>) -> Result<()> {
        let _changing = self.state.write();
        if self.has_suspects() || self.clean.load(Ordering::Acquire) {
            return Ok(());
        }
        sync_data()?;
        let flushed = self.map.flush().and_then(|()| {
            self.set_header_word(CLEAN_AT, 1);
            self.map.flush()
        });
        flushed.map_err(|e| Error::io("chunk map", &e))?;
        self.clean.store(true, Ordering::Release);
        Ok(())
    }

    fn words(&self) -> &[AtomicU64] {
        let count = (self.chunks as usize).div_ceil(64);
        // SAFETY: the file was made `BITS_AT + count * 8` bytes long and is mapped whole and shared; `BITS_AT` keeps the
        // alignment of a page; the words are only ever accessed as atomics; the map lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().add(BITS_AT).cast(), count) }
    }

    fn word(&self, chunk: u32) -> Option<(&AtomicU64, u64)> {
        bit_of(self.words(), chunk)
    }

    fn suspect(&self, chunk: u32) -> Option<(&AtomicU64, u64)> {
        bit_of(&self.suspects.as_ref()?.words, chunk)
    }

    fn header_atomic(&self, at: usize) -> &std::sync::atomic::AtomicU32 {
        debug_assert!(at.is_multiple_of(4) && at < BITS_AT);
        // SAFETY: `at` is a constant of this file, 4-aligned and within the header page, which is mapped for as long as
        // `self` lives and only accessed as atomics.
        unsafe { &*self.map.as_mut_ptr().add(at).cast() }
    }

    fn header_word(&self, at: usize) -> u32 {
        u32::from_le(self.header_atomic(at).load(Ordering::Acquire))
    }

    fn set_header_word(&self, at: usize, value: u32) {
        self.header_atomic(at).store(value.to_le(), Ordering::Release);
    }

    fn header_id(&self, at: usize) -> BootId {
        let mut id = NO_BOOT;
        for (i, word) in id.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&self.header_word(at + 4 * i).to_le_bytes());
        }
        id
    }

    fn set_header_id(&self, at: usize, id: BootId) {
        for (i, word) in id.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            self.set_header_word(at + 4 * i, word);
        }
    }
}

fn count_ones(words: &[AtomicU64]) -> u32 {
    words
        .iter()
        .map(|word| word.load(Ordering::Relaxed).count_ones())
        .sum()
}

fn bit_of(words: &[AtomicU64], chunk: u32) -> Option<(&AtomicU64, u64)> {
    Some((words.get(chunk as usize / 64)?, 1 << (chunk % 64)))
}

/// The length of the map of so many chunks.
fn file_bytes(chunks: u32) -> usize {
    BITS_AT + (chunks as usize).div_ceil(64) * 8
}

/// The part of the header that does not change.
fn header(chunks: u32, index_id: u32) -> [u8; 44] {
    let mut header = [0; 44];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&u64::from(chunks).to_le_bytes());
    header[40..44].copy_from_slice(&index_id.to_le_bytes());
    header
}

fn fits(file: &File, expected: &[u8; 44], len: usize) -> std::io::Result<bool> {
    use std::os::unix::fs::FileExt;
    if file.metadata()?.len() != len as u64 {
        return Ok(false);
    }
    let mut found = [0; 44];
    file.read_exact_at(&mut found, 0)?;
    Ok(found[..12] == expected[..12] && found[16..24] == expected[16..24] && found[40..] == expected[40..])
}

/// The kernel's random id of this boot; zeros (which equal no boot's) where it cannot be read, so that nothing is trusted.
fn boot_id() -> BootId {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .filter_map(|d| u8::try_from(d).ok())
        .collect();
    let mut id = NO_BOOT;
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    id
}

#[cfg(test)]
mod tests;
