//! One entry of a layer's tar, as every format's index delivers it and as the writer takes it.

use crate::digest::Digest;

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A directory.
    Dir = 1,
    /// A regular file.
    File = 2,
    /// A symbolic link.
    Symlink = 3,
    /// Another name of an earlier or later entry.
    Hardlink = 4,
    /// A character device.
    Char = 5,
    /// A block device.
    Block = 6,
    /// A named pipe.
    Fifo = 7,
}

impl Kind {
    /// The inverse of `self as u8`.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Dir,
            Self::File,
            Self::Symlink,
            Self::Hardlink,
            Self::Char,
            Self::Block,
            Self::Fifo,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

impl Kind {
    /// The name of the type in tables of contents: those of eStargz and zstd:chunked and SOCI's zTOC have the same.
    #[must_use]
    pub fn toc_name(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::File => "reg",
            Self::Symlink => "symlink",
            Self::Hardlink => "hardlink",
            Self::Char => "char",
            Self::Block => "block",
            Self::Fifo => "fifo",
        }
    }
}

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds after that second.
    pub nanos: u32,
}

/// One entry: what a tar header says, with PAX records applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name as the layer spells it, any bytes (a whiteout is still `.wh.NAME` here).
    pub path: Vec<u8>,
    /// The type.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky (0o7777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Size in bytes of a regular file, else 0.
    pub size: u64,
    /// Target of a symbolic link (verbatim) or of a hard link (a path in the layer), else empty.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Extended attributes: name, value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Digest of the whole content of a regular file, where the layer says it.
    pub digest: Option<Digest>,
}

impl Entry {
    /// An entry with nothing set but its name and type: mode 0755 for directories, 0644 for the rest, root's, at 1970.
    #[must_use]
    pub fn new(path: impl Into<Vec<u8>>, kind: Kind) -> Self {
        Self {
            path: path.into(),
            kind,
            mode: if kind == Kind::Dir { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            size: 0,
            link: Vec::new(),
            rdev: (0, 0),
            xattrs: Vec::new(),
            digest: None,
        }
    }
}

/// A tar name in canonical form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanPath {
    /// Components joined by `/`, without a leading or trailing one; empty for the root.
    pub path: Vec<u8>,
    /// Whether a `..` reached above the root and was held there.
    pub clamped: bool,
}

/// Cleans a tar name as `path.Clean("/" + name)` does: no empty or `.` components, `..` removes its predecessor and
/// stops at the root.
#[must_use]
pub fn clean_path(name: &[u8]) -> CleanPath {
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut clamped = false;
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => clamped |= parts.pop().is_none(),
            _ => parts.push(part),
        }
    }
    CleanPath {
        path: parts.join(&b'/'),
        clamped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_and_held_at_the_root() {
        let cases: [(&str, &str, bool); 8] = [
            ("./", "", false),
            ("/abs/f", "abs/f", false),
            ("./e//f/", "e/f", false),
            ("a/../c", "c", false),
            ("../evil", "evil", true),
            ("a/../../b", "b", true),
            ("..", "", true),
            ("...", "...", false),
        ];
        for (name, path, clamped) in cases {
            assert_eq!(
                clean_path(name.as_bytes()),
                CleanPath {
                    path: path.into(),
                    clamped
                },
                "{name}"
            );
        }
    }
}
