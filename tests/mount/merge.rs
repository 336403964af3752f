//! Every rule for merging layers that an eStargz layer can express (the table of the recommended behaviour in which known
//! engines differ), seen through the mount: one image, a directory for each case.
//!
//! An entry is written as a line: type, path, then what differs from mode 0755 or 0644, owner 0:0, time 0 and one name.
//! `=TEXT` is content, `>TARGET` a link's target, `%MODE`, `^UID:GID`, `@SECONDS`, `#MAJOR:MINOR`; in what is found, `*N` is
//! the number of names and `&PATH` the first of them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use registryfs::demo::Content;
use registryfs::layer::entry::{Entry, Kind, Time};

use crate::support::{File, image};
use crate::world::World;

/// Who serves the tree: we, and the kernel where it can.
const MODES: [&str; 2] = ["kernel=off", "kernel=auto"];

struct Case {
    name: &'static str,
    lower: &'static [&'static str],
    upper: &'static [&'static str],
    merged: &'static [&'static str],
}

const fn case(
    name: &'static str,
    lower: &'static [&'static str],
    upper: &'static [&'static str],
    merged: &'static [&'static str],
) -> Case {
    Case {
        name,
        lower,
        upper,
        merged,
    }
}

const CASES: &[Case] = &[
    case(
        "whiteout-then-file",
        &["f a =old"],
        &["f .wh.a", "f a =new"],
        &["f a =new"],
    ),
    case(
        "file-then-whiteout",
        &["f a =old"],
        &["f a =new", "f .wh.a"],
        &["f a =new"],
    ),
    case("whiteout", &["f a =old", "f b =b"], &["f .wh.a"], &["f b =b"]),
    case(
        "whiteout-of-dir",
        &["d d", "f d/x =x", "f y =y"],
        &["f .wh.d"],
        &["f y =y"],
    ),
    case(
        "whiteout-then-dir",
        &["d d", "f d/low =low"],
        &["f .wh.d", "d d", "f d/up =up"],
        &["d d", "f d/up =up"],
    ),
    case(
        "dir-then-whiteout",
        &["d d %700", "f d/low =low"],
        &["d d", "f d/up =up", "f .wh.d"],
        &["d d", "f d/up =up"],
    ),
    case(
        "opaque-last",
        &["d d", "f d/low =low"],
        &["d d", "f d/up =up", "f d/.wh..wh..opq"],
        &["d d", "f d/up =up"],
    ),
    case(
        "opaque-in-implicit-dir",
        &["d d %1777", "f d/low =low"],
        &["f d/.wh..wh..opq", "f d/child =c"],
        &["d d %1777", "f d/child =c"],
    ),
    case(
        "opaque-below",
        &["d d", "d d/e", "f d/e/low =low", "f d/low =low"],
        &["f d/e/.wh..wh..opq"],
        &["d d", "d d/e", "f d/low =low"],
    ),
    case(
        "implicit-parent-keeps-lower",
        &["d tmp %1777 ^7:0 @5000"],
        &["f tmp/x =x"],
        &["d tmp %1777 ^7:0 @5000", "f tmp/x =x"],
    ),
    case(
        "implicit-parent-of-nothing",
        &[],
        &["f a/b/c =c"],
        &["d a", "d a/b", "f a/b/c =c"],
    ),
    case(
        "implicit-dir-over-symlink",
        &["d usr", "f usr/low =low", "l lib >usr"],
        &["f lib/up =up"],
        &["d lib", "d usr", "f lib/up =up", "f usr/low =low"],
    ),
    case(
        "explicit-dir-over-symlink",
        &["d usr", "f usr/low =low", "l lib >usr"],
        &["d lib %700"],
        &["d lib %700", "d usr", "f usr/low =low"],
    ),
    case(
        "symlink-parent-in-same-layer",
        &["d usr", "f usr/low =low"],
        &["l lib >usr", "f lib/up =up"],
        &["d usr", "f usr/low =low", "f usr/up =up", "l lib >usr"],
    ),
    case(
        "hardlink-to-lower",
        &["f a =x %600"],
        &["h b >a"],
        &["f a =x %600 *2 &a", "f b =x %600 *2 &a"],
    ),
    case(
        "hardlink-before-target",
        &[],
        &["h b >a", "f a =x"],
        &["f a =x *2 &a", "f b =x *2 &a"],
    ),
    case(
        "hardlink-chain",
        &[],
        &["f a =x", "h b >a", "h c >b"],
        &["f a =x *3 &a", "f b =x *3 &a", "f c =x *3 &a"],
    ),
    case(
        "hardlink-to-whited-out",
        &["f a =x", "f z =z"],
        &["f .wh.a", "h b >a"],
        &["f z =z"],
    ),
    case("hardlink-to-nothing", &["f z =z"], &["h b >nowhere"], &["f z =z"]),
    case(
        "names-are-counted-anew",
        &["f a =x", "h b >a"],
        &["f .wh.a"],
        &["f b =x"],
    ),
    case(
        "replaced-name-leaves-the-other",
        &["f a =old", "h b >a"],
        &["f a =new"],
        &["f a =new", "f b =old"],
    ),
    case(
        "hardlink-to-symlink",
        &[],
        &["l s >t", "h b >s"],
        &["l b >t *2 &b", "l s >t *2 &b"],
    ),
    case("duplicate", &[], &["f a =one", "f a =two"], &["f a =two"]),
    case(
        "duplicate-dir-then-file",
        &[],
        &["d x", "f x/y =y", "f x =file"],
        &["f x =file"],
    ),
    case(
        "dir-to-file",
        &["d x", "f x/y =y"],
        &["f x =file"],
        &["f x =file"],
    ),
    case(
        "file-to-dir",
        &["f x =file"],
        &["d x", "f x/y =y"],
        &["d x", "f x/y =y"],
    ),
    case(
        "file-to-implicit-dir",
        &["f a =a %600"],
        &["f a/x =x"],
        &["d a", "f a/x =x"],
    ),
    case("file-to-symlink", &["f a =a"], &["l a >b"], &["l a >b"]),
    case(
        "dir-on-dir",
        &["d d %700 ^1:1 @9", "f d/low =low"],
        &["d d %2755 ^2:3 @10"],
        &["d d %2755 ^2:3 @10", "f d/low =low"],
    ),
    case(
        "unclean-paths",
        &[],
        &["f ./e//f =f", "f x/../c =c"],
        &["d e", "f c =c", "f e/f =f"],
    ),
    case(
        "bare-whiteout",
        &["d d", "f d/f =f"],
        &["f d/.wh."],
        &["d d", "f d/f =f"],
    ),
    case("whiteout-in-base", &["f .wh.foo", "f a =a"], &[], &["f a =a"]),
    case(
        "whiteout-and-whiteout-below",
        &["d foo", "f foo/bar =bar", "f foo/baz =baz"],
        &["f .wh.foo", "f foo/.wh.bar"],
        &[],
    ),
    case("whiteout-of-nothing", &["f a =a"], &["f .wh.b"], &["f a =a"]),
    case(
        "device-0-0-is-no-whiteout",
        &["f a =a"],
        &["c a #0:0"],
        &["c a #0:0"],
    ),
    case(
        "special-files",
        &[],
        &["c null #1:3 %666", "b disk #259:70000 %660", "p pipe"],
        &["b disk #259:70000 %660", "c null #1:3 %666", "p pipe"],
    ),
    case("time-before-1970", &[], &["f old @-5"], &["f old"]),
    case(
        "odd-owners-and-bits",
        &[],
        &["f s %6755 ^4294967294:4294967294", "d t %3777 ^1000:100"],
        &["d t %3777 ^1000:100", "f s %6755 ^4294967294:4294967294"],
    ),
    case(
        "odd-names",
        &[],
        &["f .wh =a", "f ..a =b", "f wh. =c", "f \u{e4}\u{1f980} =d"],
        &["f ..a =b", "f .wh =a", "f wh. =c", "f \u{e4}\u{1f980} =d"],
    ),
];

fn pair(text: &str) -> (u32, u32) {
    let (a, b) = text.split_once(':').unwrap();
    (a.parse().unwrap(), b.parse().unwrap())
}

/// The entry that a line says, below `dir`.
fn entry(dir: &str, line: &str) -> File {
    let mut words = line.split(' ');
    let kind = match words.next().unwrap() {
        "d" => Kind::Dir,
        "f" => Kind::File,
        "l" => Kind::Symlink,
        "h" => Kind::Hardlink,
        "c" => Kind::Char,
        "b" => Kind::Block,
        "p" => Kind::Fifo,
        other => panic!("{other}"),
    };
    let mut entry = Entry::new(format!("{dir}{}", words.next().unwrap()), kind);
    let mut payload = Vec::new();
    for word in words {
        let (sign, rest) = word.split_at(1);
        match sign {
            "=" => payload = rest.into(),
            ">" if kind == Kind::Hardlink => entry.link = format!("{dir}{rest}").into(),
            ">" => entry.link = rest.into(),
            "%" => entry.mode = u32::from_str_radix(rest, 8).unwrap(),
            "^" => (entry.uid, entry.gid) = pair(rest),
            "#" => entry.rdev = pair(rest),
            "@" => {
                entry.mtime = Time {
                    seconds: rest.parse().unwrap(),
                    nanos: 0,
                };
            }
            other => panic!("{other}"),
        }
    }
    (entry, payload)
}

/// All paths below `dir`.
fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for item in fs::read_dir(dir).unwrap() {
        let item = item.unwrap();
        found.push(item.path());
        if item.file_type().unwrap().is_dir() {
            walk(&item.path(), found);
        }
    }
}

/// What is below `dir`, as sorted lines.
fn found(dir: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    walk(dir, &mut paths);
    paths.sort();
    let mut first_names = BTreeMap::new();
    let mut lines: Vec<String> = paths
        .iter()
        .map(|path| line(dir, path, &mut first_names))
        .collect();
    lines.sort();
    lines
}

fn line(dir: &Path, path: &Path, first_names: &mut BTreeMap<u64, String>) -> String {
    let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
    let metadata = fs::symlink_metadata(path).unwrap();
    let file_type = metadata.file_type();
    let (kind, mode, content) = match () {
        () if file_type.is_dir() => ('d', 0o755, String::new()),
        () if file_type.is_symlink() => (
            'l',
            0o777,
            format!(" >{}", fs::read_link(path).unwrap().display()),
        ),
        () if file_type.is_file() => (
            'f',
            0o644,
            match fs::read_to_string(path).unwrap() {
                text if text.is_empty() => text,
                text => format!(" ={text}"),
            },
        ),
        () if file_type.is_fifo() => ('p', 0o644, String::new()),
        () => {
            let rdev = metadata.rdev();
            let number = format!(
                " #{}:{}",
                nix::sys::stat::major(rdev),
                nix::sys::stat::minor(rdev)
            );
            (if file_type.is_char_device() { 'c' } else { 'b' }, 0o644, number)
        }
    };
    let mut line = format!("{kind} {name}{content}");
    if metadata.mode() & 0o7777 != mode {
        line += &format!(" %{:o}", metadata.mode() & 0o7777);
    }
    if (metadata.uid(), metadata.gid()) != (0, 0) {
        line += &format!(" ^{}:{}", metadata.uid(), metadata.gid());
    }
    if metadata.mtime() != 0 {
        line += &format!(" @{}", metadata.mtime());
    }
    if !file_type.is_dir() && metadata.nlink() != 1 {
        let first = first_names.entry(metadata.ino()).or_insert(name);
        line += &format!(" *{} &{first}", metadata.nlink());
    }
    line
}

#[test]
fn layers_merge_by_the_rules() {
    let entries = |lines: fn(&Case) -> &'static [&'static str]| -> Vec<File> {
        let of_case = |case: &Case| {
            let dir = format!("{}/", case.name);
            lines(case)
                .iter()
                .map(|line| entry(&dir, line))
                .collect::<Vec<_>>()
        };
        // A case whose files all vanish still has its directory.
        let dirs = CASES.iter().map(|case| entry("", &format!("d {}", case.name)));
        dirs.chain(CASES.iter().flat_map(of_case)).collect()
    };
    let mut content = Content::new();
    let merged = image(&[&entries(|case| case.lower), &entries(|case| case.upper)]);
    content.add_tagged_image("team/app", "1.0", &merged);
    let world = World::new(content);
    for mode in MODES {
        world.mount_with(&["-o", mode]);
        assert_cases(&world.at("team/app/1.0/rootfs"), mode);
        world.umount();
    }
}

/// Fails with all cases that came out otherwise.
fn assert_cases(rootfs: &Path, mode: &str) {
    let mut failures = Vec::new();
    for case in CASES {
        let found = found(&rootfs.join(case.name));
        if found != case.merged {
            failures.push(format!(
                "{}: expected {:#?}, found {found:#?}",
                case.name, case.merged
            ));
        }
    }
    assert!(failures.is_empty(), "{mode}: {}", failures.join("\n"));
    let listed = fs::read_dir(rootfs).unwrap().count();
    assert_eq!(
        listed,
        CASES.len(),
        "{mode}: nothing but the cases, no landmark, no index"
    );
}

#[test]
fn nothing_gets_above_the_root_and_the_root_has_its_own_attributes() {
    let lines: [&[&str]; 3] = [
        &["f /abs/f =abs", "f ../evil =evil", "f a/../../b =b"],
        &[
            "d ./ %700 ^3:4 @7777",
            "l up >../../../..",
            "f up/through =t",
            "f .wh..wh.aufs",
            "d .wh..wh.plnk",
        ],
        &["f late =late"],
    ];
    let layers = lines.map(|lines| lines.iter().map(|line| entry("", line)).collect::<Vec<File>>());
    let mut content = Content::new();
    for (tag, count) in [("plain", 1), ("rooted", 3)] {
        let layers: Vec<_> = layers.iter().take(count).map(Vec::as_slice).collect();
        content.add_tagged_image("team/app", tag, &image(&layers));
    }
    let world = World::new(content);
    for mode in MODES {
        world.mount_with(&["-o", mode]);
        assert_roots(
            &world.at("team/app/plain/rootfs"),
            &world.at("team/app/rooted/rootfs"),
        );
        world.umount();
    }
}

fn assert_roots(plain: &Path, rooted: &Path) {
    assert_eq!(found(plain), ["d abs", "f abs/f =abs", "f b =b", "f evil =evil"]);
    let root = fs::metadata(plain).unwrap();
    assert_eq!(
        (root.mode() & 0o7777, root.uid(), root.gid(), root.mtime()),
        (0o755, 0, 0, 0)
    );
    let root = fs::metadata(rooted).unwrap();
    assert_eq!(
        (root.mode() & 0o7777, root.uid(), root.gid(), root.mtime()),
        (0o700, 3, 4, 7777)
    );
    assert_eq!(
        found(rooted),
        [
            "d abs",
            "f abs/f =abs",
            "f b =b",
            "f evil =evil",
            "f late =late",
            "f through =t",
            "l up >../../../.."
        ]
    );
}

#[test]
fn a_layer_alone_shows_its_whiteouts() {
    let lower = ["d d", "f d/low =low", "f a =a"].map(|line| entry("", line));
    let upper = ["f .wh.a", "d d", "f d/.wh..wh..opq", "f d/up =up"].map(|line| entry("", line));
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&lower, &upper]));
    let world = World::new(content).mounted();
    let layer = |number: u8| found(&world.at(&format!("team/app/1.0/layers/{number}/fs")));
    assert_eq!(layer(0), ["d d", "f a =a", "f d/low =low"]);
    assert_eq!(layer(1), ["d d", "f .wh.a", "f d/.wh..wh..opq", "f d/up =up"]);
    assert_eq!(found(&world.at("team/app/1.0/rootfs")), ["d d", "f d/up =up"]);
    let names = fs::read_dir(world.at("team/app/1.0/layers/1/fs")).unwrap();
    assert!(
        names
            .flatten()
            .all(|entry| !entry.file_name().as_bytes().ends_with(b"landmark"))
    );
}
