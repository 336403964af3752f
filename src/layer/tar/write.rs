//! Tar headers: written as POSIX.1-2001 (ustar with PAX records where ustar has no room), and read as far as the table
//! of contents of an eStargz layer needs it.
//!
//! A header that ustar can hold is written without PAX records, so that the common entry costs one block and every tar
//! reader understands it. Long names always go into a PAX record; ustar's split of a name into prefix and name is not
//! used, because it cannot hold all of them and would be a second way to do the same.

use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::tar::{BLOCK_BYTES, SPECIAL_BYTES_MAX, XATTR_PREFIX, checksums, padding};

/// Longest name and link target in a ustar header, in bytes.
const NAME_BYTES_MAX: usize = 100;
/// Largest number in an 8-byte octal field.
const OCTAL7_MAX: u64 = 0o7_777_777;
/// Largest number in a 12-byte octal field.
const OCTAL11_MAX: u64 = 0o77_777_777_777;
/// The name of every PAX header. Nothing reads it; a fixed one keeps layers free of accidental differences.
const PAX_NAME: &[u8] = b"././@PaxHeader";

/// The blocks in front of an entry's payload: its header, preceded by a PAX header where that is needed. The entry's
/// name and link target are written as they are, without cleaning.
///
/// # Errors
/// [`Error::Malformed`] naming the entry when tar cannot say it: a NUL in a name, `=` or NUL in an attribute's name, a
/// device number over 2097151, or over 1 MiB of PAX records.
pub fn header(entry: &Entry) -> Result<Vec<u8>> {
    let refuse =
        |why: &str| Error::malformed(format!("entry {:?}", String::from_utf8_lossy(&entry.path)), why);
    if entry.path.contains(&0) || entry.link.contains(&0) {
        return Err(refuse("tar cannot hold a name with a NUL"));
    }
    let records = pax_records(entry).map_err(refuse)?;
    if records.len() > SPECIAL_BYTES_MAX {
        return Err(refuse("over 1 MiB of PAX records"));
    }
    let mut out = Vec::with_capacity(BLOCK_BYTES);
    if !records.is_empty() {
        out.extend_from_slice(&Block::new(b'x', PAX_NAME, records.len() as u64).finish());
        out.extend_from_slice(&records);
        out.resize(out.len() + padding(records.len() as u64), 0);
    }
    let (typeflag, size) = match entry.kind {
        Kind::File => (b'0', entry.size),
        Kind::Hardlink => (b'1', 0),
        Kind::Symlink => (b'2', 0),
        Kind::Char => (b'3', 0),
        Kind::Block => (b'4', 0),
        Kind::Dir => (b'5', 0),
        Kind::Fifo => (b'6', 0),
    };
    let mut block = Block::new(typeflag, &entry.path, size);
    block.octal(100..108, u64::from(entry.mode & 0o7777));
    block.octal(108..116, u64::from(entry.uid));
    block.octal(116..124, u64::from(entry.gid));
    block.octal(136..148, u64::try_from(entry.mtime.seconds).unwrap_or(0));
    block.text(157..257, &entry.link);
    if matches!(entry.kind, Kind::Char | Kind::Block) {
        for (range, number) in [(329..337, entry.rdev.0), (337..345, entry.rdev.1)] {
            if u64::from(number) > OCTAL7_MAX {
                return Err(refuse("tar cannot hold a device number over 2097151"));
            }
            block.octal(range, u64::from(number));
        }
    }
    out.extend_from_slice(&block.finish());
    Ok(out)
}

/// The PAX records that `entry` needs beside a ustar header, sorted by key.
fn pax_records(entry: &Entry) -> std::result::Result<Vec<u8>, &'static str> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut add = |key: &str, value: Vec<u8>| records.push((key.into(), value));
    let number = |n: u64| n.to_string().into_bytes();
    for (key, id) in [("gid", entry.gid), ("uid", entry.uid)] {
        if u64::from(id) > OCTAL7_MAX {
            add(key, number(u64::from(id)));
        }
    }
    for (key, text) in [("linkpath", &entry.link), ("path", &entry.path)] {
        if text.len() > NAME_BYTES_MAX || !text.is_ascii() {
            add(key, text.clone());
        }
    }
    let whole = entry.mtime.nanos == 0 && u64::try_from(entry.mtime.seconds).is_ok_and(|s| s <= OCTAL11_MAX);
    if !whole {
        add("mtime", pax_time(entry.mtime));
    }
    if entry.kind == Kind::File && entry.size > OCTAL11_MAX {
        add("size", number(entry.size));
    }
    for (name, value) in &entry.xattrs {
        if name.contains(&0) || name.contains(&b'=') {
            return Err("tar cannot hold an extended attribute whose name has a NUL or a =");
        }
        records.push(([XATTR_PREFIX, name].concat(), value.clone()));
    }
    records.sort();
    Ok(records
        .iter()
        .flat_map(|(key, value)| pax_record(key, value))
        .collect())
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts the record's bytes, its own digits included.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Decimal seconds with as many fraction digits as needed.
fn pax_time(time: Time) -> Vec<u8> {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let (sign, nanos) = (if nanos < 0 { "-" } else { "" }, nanos.unsigned_abs());
    let fraction = format!("{:09}", nanos % 1_000_000_000);
    let text = format!("{sign}{}.{fraction}", nanos / 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').into()
}

/// One header block in the making.
struct Block([u8; BLOCK_BYTES]);

impl Block {
    fn new(typeflag: u8, name: &[u8], size: u64) -> Self {
        let mut block = Self([0; BLOCK_BYTES]);
        block.text(0..100, name);
        block.octal(100..108, 0o644);
        block.octal(108..116, 0);
        block.octal(116..124, 0);
        block.octal(124..136, size);
        block.octal(136..148, 0);
        block.0[156] = typeflag;
        block.text(257..265, b"ustar\x0000");
        block.octal(329..337, 0);
        block.octal(337..345, 0);
        block
    }

    /// As much of `text` as fits, with `?` for what is not ASCII: the PAX record has the real one.
    fn text(&mut self, field: std::ops::Range<usize>, text: &[u8]) {
        for (to, from) in self.0[field].iter_mut().zip(text) {
            *to = if from.is_ascii() { *from } else { b'?' };
        }
    }

    /// A number in octal with a NUL behind it, 0 where it does not fit: the PAX record has the real one.
    fn octal(&mut self, field: std::ops::Range<usize>, number: u64) {
        let digits = field.len() - 1;
        let fits = number >> (3 * digits) == 0;
        let text = format!("{:0digits$o}", if fits { number } else { 0 });
        self.0[field][..digits].copy_from_slice(text.as_bytes());
    }

    fn finish(mut self) -> [u8; BLOCK_BYTES] {
        let (sum, _) = checksums(&self.0);
        self.octal(148..155, sum);
        self.0[155] = b' ';
        self.0
    }
}

/// Reads the header of a plain regular file named `name` and returns the size of its payload in bytes. Everything that
/// would make the header mean something else (extensions, prefixes, other types) is refused.
///
/// # Errors
/// A sentence that says which rule is broken.
pub fn read_plain_header(block: &[u8; BLOCK_BYTES], name: &[u8]) -> std::result::Result<u64, &'static str> {
    if parse_octal(&block[148..156]) != Some(checksums(block).0) {
        return Err("its tar header has a wrong checksum");
    }
    let field = &block[..NAME_BYTES_MAX];
    let stored = field.split(|&byte| byte == 0).next().unwrap_or_default();
    let has_prefix = &block[257..262] == b"ustar" && block[345] != 0;
    if stored != name || has_prefix {
        return Err("its tar header has another name");
    }
    if !matches!(block[156], b'0' | 0) {
        return Err("its tar entry is no regular file");
    }
    parse_octal(&block[124..136]).ok_or("its tar header has no valid size")
}

/// Octal digits, with spaces before and spaces or NULs behind.
fn parse_octal(field: &[u8]) -> Option<u64> {
    let digits = field.trim_ascii_start();
    let end = digits
        .iter()
        .position(|byte| !(b'0'..=b'7').contains(byte))
        .unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    if digits.is_empty() || rest.iter().any(|byte| !matches!(byte, b' ' | 0)) {
        return None;
    }
    digits
        .iter()
        .try_fold(0u64, |n, digit| Some(n.checked_mul(8)? | u64::from(digit - b'0')))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;
    use crate::layer::tar::END_BYTES;

    /// One entry as another tar reader sees it: the entry, and the payload.
    fn read_back(bytes: &[u8]) -> (Entry, Vec<u8>) {
        let mut archive = ::tar::Archive::new(bytes);
        let mut found = archive.entries().unwrap().next().unwrap().unwrap();
        let kind = match found.header().entry_type().as_byte() {
            b'0' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            _ => Kind::Fifo,
        };
        let mut entry = Entry::new(found.path_bytes().into_owned(), kind);
        entry.link = found
            .link_name_bytes()
            .map(std::borrow::Cow::into_owned)
            .unwrap_or_default();
        entry.size = found.size();
        let header = found.header().clone();
        entry.mode = header.mode().unwrap();
        entry.uid = header.uid().unwrap() as u32;
        entry.gid = header.gid().unwrap() as u32;
        entry.mtime.seconds = header.mtime().unwrap() as i64;
        if matches!(kind, Kind::Char | Kind::Block) {
            let number = |n: std::io::Result<Option<u32>>| n.unwrap().unwrap();
            entry.rdev = (number(header.device_major()), number(header.device_minor()));
        }
        if let Some(records) = found.pax_extensions().unwrap() {
            for record in records.map(std::result::Result::unwrap) {
                let text = || record.value().unwrap();
                match record.key().unwrap() {
                    "uid" => entry.uid = text().parse().unwrap(),
                    "gid" => entry.gid = text().parse().unwrap(),
                    "mtime" => entry.mtime = decimal(text()),
                    key => {
                        if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                            entry.xattrs.push((name.into(), record.value_bytes().into()));
                        }
                    }
                }
            }
        }
        let mut payload = Vec::new();
        found.read_to_end(&mut payload).unwrap();
        (entry, payload)
    }

    /// The time that decimal seconds mean.
    fn decimal(text: &str) -> Time {
        let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
        let nanos: i128 = whole.parse::<i128>().unwrap() * 1_000_000_000
            + format!("{fraction:0<9}").parse::<i128>().unwrap();
        let nanos = sign * nanos;
        Time {
            seconds: nanos.div_euclid(1_000_000_000) as i64,
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        }
    }

    /// Any byte but a newline, at which the `tar` crate ends a record instead of by its length.
    fn any_byte() -> impl Strategy<Value = u8> {
        any::<u8>().prop_filter("newline", |&byte| byte != b'\n')
    }

    prop_compose! {
        pub(in crate::layer::tar) fn any_entry()(
            path in "[a-zäß/. ]{1,20}|[a-z]{99,102}|(dir/){60}x",
            kind in (1..=7u8).prop_map(|byte| Kind::from_byte(byte).unwrap()),
            link in "[a-zö/.]{1,20}|[a-z]{99,102}",
            mode in 0..=0o7777u32,
            (uid, gid) in (prop_oneof![0..5000u32, any::<u32>()], prop_oneof![0..5000u32, any::<u32>()]),
            seconds in prop_oneof![Just(0i64), 0..1i64 << 34, -(1i64 << 40)..1i64 << 40],
            nanos in prop_oneof![Just(0), 0..1_000_000_000u32],
            rdev in (0..=0o7_777_777u32, 0..=0o7_777_777u32),
            xattrs in prop::collection::btree_map("user\\.[a-z]{1,90}", prop::collection::vec(any_byte(), 0..200), 0..3),
        ) -> Entry {
            let is_link = matches!(kind, Kind::Symlink | Kind::Hardlink);
            let is_device = matches!(kind, Kind::Char | Kind::Block);
            Entry {
                mode,
                uid,
                gid,
                mtime: Time { seconds, nanos },
                link: if is_link { link.into_bytes() } else { Vec::new() },
                rdev: if is_device { rdev } else { (0, 0) },
                xattrs: xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect(),
                ..Entry::new(path, kind)
            }
        }
    }

    proptest! {
        #[test]
        fn another_reader_reads_what_was_written(entry in any_entry(), payload in prop::collection::vec(any::<u8>(), 0..1500)) {
            let payload = if entry.kind == Kind::File { payload } else { Vec::new() };
            let entry = Entry { size: payload.len() as u64, ..entry };
            let mut bytes = header(&entry).unwrap();
            prop_assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            bytes.extend_from_slice(&payload);
            bytes.resize(bytes.len() + padding(entry.size) + END_BYTES, 0);
            prop_assert_eq!(read_back(&bytes), (entry, payload));
        }
    }

    #[test]
    fn what_ustar_can_say_takes_one_block() {
        let mut entry = Entry::new("a".repeat(100), Kind::File);
        (entry.uid, entry.gid, entry.size) = (0o7_777_777, 0o7_777_777, OCTAL11_MAX);
        assert_eq!(header(&entry).unwrap().len(), BLOCK_BYTES);
        entry.size += 1;
        let large = header(&entry).unwrap();
        assert_eq!(large.len(), 3 * BLOCK_BYTES);
        assert!(large[BLOCK_BYTES..].starts_with(b"19 size=8589934592\n"));
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        for value_len in 0..2000 {
            let record = pax_record(b"path", &vec![b'x'; value_len]);
            let digits = record.split(|&byte| byte == b' ').next().unwrap();
            assert_eq!(std::str::from_utf8(digits).unwrap().parse(), Ok(record.len()));
        }
    }

    #[test]
    fn what_tar_cannot_say_is_refused() {
        let base = Entry::new("a", Kind::Char);
        let xattr = |name: &[u8]| vec![(name.to_vec(), Vec::new())];
        let cases = [
            Entry {
                path: b"a\0".to_vec(),
                ..base.clone()
            },
            Entry {
                link: b"a\0".to_vec(),
                ..base.clone()
            },
            Entry {
                rdev: (0, OCTAL7_MAX as u32 + 1),
                ..base.clone()
            },
            Entry {
                xattrs: xattr(b"a=b"),
                ..base.clone()
            },
            Entry {
                xattrs: xattr(b"a\0"),
                ..base.clone()
            },
            Entry {
                xattrs: vec![(b"a".to_vec(), vec![0; 1 << 20])],
                ..base
            },
        ];
        for entry in cases {
            assert!(
                matches!(header(&entry), Err(Error::Malformed { .. })),
                "{entry:?}"
            );
        }
    }

    #[test]
    fn a_plain_header_is_read_and_nothing_else() {
        let entry = Entry {
            size: 12_345,
            ..Entry::new("name", Kind::File)
        };
        let good: [u8; BLOCK_BYTES] = header(&entry).unwrap().try_into().unwrap();
        assert_eq!(read_plain_header(&good, b"name"), Ok(12_345));
        assert!(read_plain_header(&good, b"nam").is_err());
        let edited = |at: usize, bytes: &[u8]| {
            let mut block = Block(good);
            block.0[at..at + bytes.len()].copy_from_slice(bytes);
            read_plain_header(&block.finish(), b"name")
        };
        assert_eq!(edited(0, b"name"), Ok(12_345));
        assert_eq!(edited(124, b"       17 \0 "), Ok(15));
        assert!(edited(124, b"-0000000017\0").is_err());
        assert!(edited(124, b"\x80\0\0\0\0\0\0\0\0\0\0\x11").is_err());
        assert!(edited(124, &[0; 12]).is_err());
        assert!(edited(156, b"x").is_err());
        assert!(edited(345, b"prefix").is_err());
        let mut unsigned = good;
        unsigned[0] ^= 1;
        assert!(read_plain_header(&unsigned, b"oame").is_err());
    }

    proptest! {
        #[test]
        fn no_header_panics(bytes in prop::collection::vec(any::<u8>(), BLOCK_BYTES)) {
            let block: [u8; BLOCK_BYTES] = bytes.try_into().unwrap();
            let _ = read_plain_header(&block, b"name");
            let _ = read_plain_header(&Block(block).finish(), b"");
        }
    }
}
