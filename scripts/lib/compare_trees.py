#!/usr/bin/env python3
"""Compares two directory trees entry by entry, as an unpacker of images would be judged.

Compared are the type, mode, owner, group, modification time (within a second, as eStargz keeps
whole seconds, or with --exact-times to the nanosecond), size and SHA-256 of regular files, symlink targets, device numbers, link counts,
hard-link groups and extended attributes. Directory sizes and link counts are not: they
belong to the filesystem, not to the image.

With --everything those are compared too, and whatever else programs can see but the numbers of
filesystem and inodes: all three times, blocks on disk and their size, the types that a directory
read gives, what a name that is not there is answered, and names of attributes that are listed twice.
So two filesystems that are to show the same are told apart by nothing.

Every difference is one line. Exit status: 0 equal, 1 different, 2 trouble.
"""

import argparse
import concurrent.futures
import errno
import hashlib
import os
import stat
import sys

MTIME_TOLERANCE_NS = 1_000_000_000
READ_BYTES = 1 << 20
HASH_THREADS = 4
ABSENT_NAMES = (b"registryfs-absent", b".wh.registryfs-absent", b"\xff\xfe", b"n" * 255, b"n" * 256)

TYPE_NAMES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class Tree:
    """One side of the comparison: every path below a root, with its lstat result."""

    def __init__(self, root):
        self.root = os.fsencode(root)
        self.entries = {b".": os.lstat(self.root)}
        self.listed_types = {}
        self._walk(b".")
        self.link_leaders = self._link_leaders()

    def path(self, name):
        return os.path.join(self.root, name)

    def _walk(self, top):
        pending = [top]
        while pending:
            directory = pending.pop()
            with os.scandir(self.path(directory)) as children:
                listed = list(children)
            for child in listed:
                name = child.name if directory == b"." else directory + b"/" + child.name
                if name in self.entries:
                    raise OSError(errno.EEXIST, "listed twice", name)
                # As the directory read gave them, not as the entry itself says.
                self.listed_types[name] = (child.is_dir(follow_symlinks=False), child.is_file(follow_symlinks=False),
                                           child.is_symlink())
                status = os.lstat(self.path(name))
                self.entries[name] = status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(name)

    def _link_leaders(self):
        """Maps each path that is no directory to the first path, by name, of the same inode.

        Two trees have the same hard-link groups exactly when these maps are equal.
        """
        leader_of_inode = {}
        leaders = {}
        for name in sorted(self.entries):
            status = self.entries[name]
            if not stat.S_ISDIR(status.st_mode):
                inode = (status.st_dev, status.st_ino)
                leaders[name] = leader_of_inode.setdefault(inode, name)
        return leaders

    def xattrs(self, name):
        path = self.path(name)
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return {}
            raise
        if len(names) != len(set(names)):
            raise OSError(errno.EEXIST, "attributes are listed twice", name)
        return {key: os.getxattr(path, key, follow_symlinks=False) for key in names}

    def absent(self, name):
        """What names that are not there are answered: in a directory others than its own, below anything else any."""
        said = []
        for child in ABSENT_NAMES:
            path = name + b"/" + child
            if path in self.entries or (name == b"." and child in self.entries):
                continue
            try:
                os.lstat(self.path(path))
                said.append("found")
            except OSError as error:
                said.append(errno.errorcode.get(error.errno, error.errno))
        return said

    def absent_attribute(self, name):
        """What an attribute that is not there is answered."""
        try:
            os.getxattr(self.path(name), "security.registryfs-absent", follow_symlinks=False)
            return "found"
        except OSError as error:
            return errno.errorcode.get(error.errno, error.errno)

    def sha256(self, name):
        digest = hashlib.sha256()
        with open(self.path(name), "rb", buffering=0) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()


def type_name(status):
    return TYPE_NAMES.get(stat.S_IFMT(status.st_mode), "unknown type")


def shown(name):
    return ascii(os.fsdecode(name))[1:-1]


def metadata_differences(a, b, name, tolerance_ns):
    """Yields (what, value in A, value in B) for everything but file contents."""
    sa, sb = a.entries[name], b.entries[name]
    if stat.S_IFMT(sa.st_mode) != stat.S_IFMT(sb.st_mode):
        yield "type", type_name(sa), type_name(sb)
        return
    ma, mb = stat.S_IMODE(sa.st_mode), stat.S_IMODE(sb.st_mode)
    if ma != mb:
        yield "mode", f"{ma:04o}", f"{mb:04o}"
    if sa.st_uid != sb.st_uid:
        yield "uid", sa.st_uid, sb.st_uid
    if sa.st_gid != sb.st_gid:
        yield "gid", sa.st_gid, sb.st_gid
    if abs(sa.st_mtime_ns - sb.st_mtime_ns) > tolerance_ns:
        yield "mtime", sa.st_mtime_ns / 1e9, sb.st_mtime_ns / 1e9
    if not stat.S_ISDIR(sa.st_mode):
        if sa.st_size != sb.st_size:
            yield "size", sa.st_size, sb.st_size
        if sa.st_nlink != sb.st_nlink:
            yield "link count", sa.st_nlink, sb.st_nlink
        la, lb = a.link_leaders.get(name), b.link_leaders.get(name)
        if la != lb:
            yield "hard-link group, by its first name", shown(la), shown(lb)
    if stat.S_ISLNK(sa.st_mode):
        ta, tb = os.readlink(a.path(name)), os.readlink(b.path(name))
        if ta != tb:
            yield "symlink target", shown(ta), shown(tb)
    if stat.S_ISCHR(sa.st_mode) or stat.S_ISBLK(sa.st_mode):
        da, db = [(os.major(s.st_rdev), os.minor(s.st_rdev)) for s in (sa, sb)]
        if da != db:
            yield "device number", da, db
    xa, xb = a.xattrs(name), b.xattrs(name)
    for key in sorted(xa.keys() | xb.keys()):
        if xa.get(key) != xb.get(key):
            yield f"xattr {key}", xa.get(key), xb.get(key)


def other_differences(a, b, name):
    """Yields the same for what belongs to a filesystem more than to an image."""
    sa, sb = a.entries[name], b.entries[name]
    for what in ("st_size", "st_nlink", "st_blocks", "st_blksize", "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_rdev"):
        va, vb = getattr(sa, what), getattr(sb, what)
        if va != vb:
            yield what, va, vb
    if a.listed_types.get(name) != b.listed_types.get(name):
        yield "type in its directory", a.listed_types.get(name), b.listed_types.get(name)
    # Both would lead out of the tree through a symlink.
    if not stat.S_ISLNK(sa.st_mode):
        for what, of in (("absent names", Tree.absent), ("absent attribute", Tree.absent_attribute)):
            va, vb = of(a, name), of(b, name)
            if va != vb:
                yield what, va, vb


def content_difference(a, b, name):
    """Returns the difference in contents of two regular files of one size, or None."""
    da, db = a.sha256(name), b.sha256(name)
    return None if da == db else ("content sha256", da, db)


def compare_entry(a, b, name, tolerance_ns, everything):
    """Returns the differences at `name`, each a printable line."""
    if name not in a.entries or name not in b.entries:
        side = a if name in a.entries else b
        other = "B" if side is a else "A"
        return [f"{shown(name)}: {type_name(side.entries[name])} is missing in {other}"]
    try:
        found = list(metadata_differences(a, b, name, tolerance_ns))
        if everything:
            found += other_differences(a, b, name)
        both_regular = all(stat.S_ISREG(t.entries[name].st_mode) for t in (a, b))
        if both_regular and a.entries[name].st_size == b.entries[name].st_size:
            content = content_difference(a, b, name)
            if content:
                found.append(content)
    except OSError as error:
        return [f"{shown(name)}: cannot be read: {error}"]
    return [f"{shown(name)}: {what}: A {va}, B {vb}" for what, va, vb in found]


def main():
    parser = argparse.ArgumentParser(
        prog="lab compare", description="Compares two trees entry by entry, metadata included."
    )
    parser.add_argument("--exact-times", action="store_true", help="modification times to the nanosecond")
    parser.add_argument("--everything", action="store_true", help="all that programs can see, as of two mounts of one image")
    parser.add_argument("tree_a", metavar="TREE_A")
    parser.add_argument("tree_b", metavar="TREE_B")
    arguments = parser.parse_args()
    try:
        a, b = Tree(arguments.tree_a), Tree(arguments.tree_b)
    except OSError as error:
        print(f"lab compare: {error}", file=sys.stderr)
        return 2

    everything = arguments.everything
    tolerance_ns = 0 if arguments.exact_times or everything else MTIME_TOLERANCE_NS
    names = sorted(a.entries.keys() | b.entries.keys())
    differences = 0
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        for lines in pool.map(lambda name: compare_entry(a, b, name, tolerance_ns, everything), names):
            differences += len(lines)
            for line in lines:
                print(line)
    print(f"{len(names)} entries compared, {differences} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
