//! Paths inside an image, as a process in a chroot on it would walk them.

use super::*;
use crate::error::Error;

fn linked(path: &str, kind: Kind, link: &str) -> Entry {
    Entry {
        link: link.into(),
        ..Entry::new(path, kind)
    }
}

/// An image in which `usr/bin/sh` is a file and much else leads to it.
fn image() -> Tree<Vec<u8>> {
    let symlink = |path, target| linked(path, Kind::Symlink, target);
    let entries = [
        Entry::new("usr/bin/sh", Kind::File),
        symlink("bin", "usr/bin"),
        symlink("abs", "/usr/bin"),
        symlink("up", "../../../usr"),
        symlink("usr/bin/ash", "sh"),
        symlink("usr/bin/dash", "/bin/ash"),
        symlink("slash", "usr/bin/"),
        symlink("fileslash", "usr/bin/sh/"),
        symlink("dangling", "nothing/there"),
        symlink("loop", "loop2"),
        symlink("loop2", "./loop"),
        linked("hard", Kind::Hardlink, "usr/bin/sh"),
    ];
    merged(&[layer(&entries)], Whiteouts::Apply).0
}

#[test]
fn paths_resolve_as_in_a_chroot() {
    let tree = image();
    let shell = tree.resolve(b"usr/bin/sh", true).unwrap();
    for path in [
        "/usr/bin/sh",
        "//usr/./bin//sh",
        "bin/sh",
        "abs/sh",
        "up/bin/sh",
        "../../bin/../bin/sh",
        "bin/../bin/sh",
        "usr/bin/ash",
        "bin/dash",
        "slash/sh",
        "hard",
    ] {
        assert_eq!(tree.resolve(path.as_bytes(), true).unwrap(), shell, "{path}");
    }
    for path in ["", "/", ".", "..", "/../..", "usr/..", "bin/../.."] {
        assert_eq!(tree.resolve(path.as_bytes(), true).unwrap(), 0, "{path}");
    }
}

#[test]
fn the_last_symlink_is_followed_when_asked_or_before_a_slash() {
    let tree = image();
    let kind = |path: &str, follow| {
        tree.node(tree.resolve(path.as_bytes(), follow).unwrap())
            .unwrap()
            .kind
    };
    assert_eq!(kind("bin", false), Kind::Symlink);
    assert_eq!(kind("bin", true), Kind::Dir);
    assert_eq!(kind("bin/", false), Kind::Dir);
    assert_eq!(kind("bin/.", false), Kind::Dir);
    assert_eq!(kind("dangling", false), Kind::Symlink);
    assert_eq!(kind("bin/dash", false), Kind::Symlink);
}

#[test]
fn paths_that_lead_nowhere_say_why() {
    let tree = image();
    let errno = |path: &str| tree.resolve(path.as_bytes(), true).unwrap_err().errno();
    assert_eq!(errno("nothing"), libc::ENOENT);
    assert_eq!(errno("dangling"), libc::ENOENT);
    for path in ["hard/", "hard/.", "hard/..", "hard/x", "fileslash"] {
        assert_eq!(errno(path), libc::ENOTDIR, "{path}");
    }
    assert_eq!(errno("loop"), libc::ELOOP);
    assert_eq!(errno("loop/x"), libc::ELOOP);
    let error = tree.resolve(b"usr/local/x", true).unwrap_err();
    assert!(
        matches!(&error, Error::NotFound { what, why } if what == "usr/local/x" && why.contains("local")),
        "{error}"
    );
}

#[test]
fn forty_symlinks_are_followed_and_no_more() {
    let mut entries = vec![Entry::new("0", Kind::File)];
    for number in 1..=41 {
        let target = (number - 1).to_string();
        entries.push(linked(&number.to_string(), Kind::Symlink, &target));
    }
    let (tree, _) = merged(&[layer(&entries)], Whiteouts::Apply);
    assert!(tree.resolve(b"40", true).is_ok());
    assert_eq!(tree.resolve(b"41", true).unwrap_err().errno(), libc::ELOOP);
}

#[test]
fn names_are_looked_up_in_directories_only() {
    let tree = image();
    let file = tree.resolve(b"hard", false).unwrap();
    assert_eq!(tree.lookup(file, b"x").unwrap_err().errno(), libc::ENOTDIR);
    assert_eq!(tree.lookup(0, b"usr/bin").unwrap(), None);
    assert_eq!(tree.child_at(&tree.node(file).unwrap(), 0).unwrap(), None);
}
