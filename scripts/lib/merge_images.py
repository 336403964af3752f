#!/usr/bin/env python3
"""The cases in which engines differ when they put layers together, as images of plain tar layers, and what should come out.

    merge_images.py write LAYOUT         writes an OCI layout with an image for each case, tagged with its name
    merge_images.py names                prints the names
    merge_images.py check REPOSITORY     compares REPOSITORY:NAME/rootfs of each, as a mount shows it, with what should be
                                         there; prints a table. Exit status: 0 all as it should be, 1 not

An entry is written as a line: type, path, then what differs from mode 0755 or 0644, owner 0:0, time 0 and one name.
`=TEXT` is content, `>TARGET` a link's target, `%MODE`, `^UID:GID`, `@SECONDS`, `#MAJOR:MINOR`, `~NAME=VALUE` an extended
attribute; in what is found, `*N` is the number of names and `&PATH` the first of them. The root is found only where it
is not 0755 0:0 of 1970. In a tar, `!` asks for GNU's form of a header instead of PAX's, and type `g` is a global header.
Bytes that are no UTF-8 are surrogates, as Python has them everywhere.
"""

import argparse
import os
import stat
import sys
import tarfile
from collections import namedtuple

from build_originals import DEBIAN_ARCHITECTURES
from oci_layout import Layer, Layout

TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"
TYPES = {"d": tarfile.DIRTYPE, "f": tarfile.REGTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE, "c": tarfile.CHRTYPE,
         "b": tarfile.BLKTYPE, "p": tarfile.FIFOTYPE}
CAP_NET_RAW = "\x01\x00\x00\x02\x00\x20" + "\x00" * 14
# What extended attributes are worth a name for: values that are not spelled in lines.
VALUES = {"CAP_NET_RAW": CAP_NET_RAW}

Case = namedtuple("Case", "name layers merged")


def case(name, *layers):
    """A case: its layers, base first, and last what should come out."""
    return Case(name, layers[:-1], layers[-1])


CASES = (
    case("whiteout-then-file", ["f a =old"], ["f .wh.a", "f a =new"], ["f a =new"]),
    case("file-then-whiteout", ["f a =old"], ["f a =new", "f .wh.a"], ["f a =new"]),
    case("whiteout-then-dir", ["d d", "f d/low =low"], ["f .wh.d", "d d", "f d/up =up"], ["d d", "f d/up =up"]),
    case("dir-then-whiteout", ["d d", "f d/low =low"], ["d d", "f d/up =up", "f .wh.d"], ["d d", "f d/up =up"]),
    case("opaque-last", ["d d", "f d/low =low"], ["d d", "f d/up =up", "f d/.wh..wh..opq"], ["d d", "f d/up =up"]),
    case("opaque-in-implicit-dir",
         ["d d %1777", "f d/low =low"], ["f d/.wh..wh..opq", "f d/child =c"], ["d d %1777", "f d/child =c"]),
    case("implicit-parent", ["d tmp %1777 ^7:0 @5000"], ["f tmp/x =x"], ["d tmp %1777 ^7:0 @5000", "f tmp/x =x"]),
    case("implicit-parent-over-symlink",
         ["d usr", "d usr/lib", "f usr/lib/low =low", "l lib >usr/lib"], ["f lib/up =up"],
         ["d lib", "f lib/up =up", "d usr", "d usr/lib", "f usr/lib/low =low"]),
    case("explicit-dir-over-symlink",
         ["d usr", "d usr/lib", "f usr/lib/low =low", "l lib >usr/lib"], ["d lib %700", "f lib/up =up"],
         ["d lib %700", "f lib/up =up", "d usr", "d usr/lib", "f usr/lib/low =low"]),
    case("symlink-parent-in-same-layer",
         ["d usr", "f usr/low =low"],
         ["l lib >usr", "f lib/up =up", "l out >../../..", "f out/held =at-the-root"],
         ["f held =at-the-root", "l lib >usr", "l out >../../..", "d usr", "f usr/low =low", "f usr/up =up"]),
    case("hardlink-to-lower", ["f a =x %600"], ["h b >a"], ["f a =x %600 *2 &a", "f b =x %600 *2 &a"]),
    case("hardlink-before-target", ["h b >a", "f a =x"], ["f a =x *2 &a", "f b =x *2 &a"]),
    case("hardlink-to-whited-out", ["f a =x", "f z =z"], ["f .wh.a", "h b >a"], ["f z =z"]),
    case("whiteout-of-one-name", ["f a =x", "h b >a"], ["f .wh.a"], ["f b =x"]),
    case("hardlink-to-symlink", ["l s >t", "h b >s"], ["l b >t *2 &b", "l s >t *2 &b"]),
    case("duplicate-path", ["f a =one", "f a =two"], ["f a =two"]),
    case("duplicate-dir-then-file", ["d x", "f x/y =y", "f x =file"], ["f x =file"]),
    case("dir-to-file-and-file-to-dir",
         ["d d", "f d/y =y", "f f =f"], ["f d =file", "d f", "f f/x =x"], ["f d =file", "d f", "f f/x =x"]),
    case("file-to-implicit-dir", ["f a =a %600 ^5:5"], ["f a/x =x"], ["d a", "f a/x =x"]),
    case("unclean-paths",
         ["f /abs/f =abs", "d a", "f a/../c =c", "f ./e//f =f"],
         ["d a", "d abs", "f abs/f =abs", "f c =c", "d e", "f e/f =f"]),
    case("above-the-root", ["f ../evil =evil", "f a/../../b =b"], ["f b =b", "f evil =evil"]),
    case("bare-whiteout", ["d d", "f d/f =f"], ["f d/.wh."], ["d d", "f d/f =f"]),
    case("whiteout-in-base", ["f .wh.foo", "f a =a"], ["f a =a"]),
    case("whiteout-and-one-below",
         ["d foo", "f foo/bar =bar", "f foo/baz =baz", "f z =z"], ["f .wh.foo", "f foo/.wh.bar"], ["f z =z"]),
    case("device-0-0", ["f a =a"], ["c a #0:0"], ["c a #0:0"]),
    case("mtime-with-fraction", ["f a @1650000000.123456789"], ["f a @1650000000.123456789"]),
    case("mtime-out-of-range", ["f before @-5.25", "f beyond @99999999999"], ["f before", "f beyond"]),
    case("xattrs",
         ["f a ~user.a=1 ~trusted.x=2 ~security.selinux=3 ~security.capability=CAP_NET_RAW ~trusted.overlay.opaque=y"
          " ~user.overlay.opaque=y", "d d ~user.lower=1"],
         ["d d ~user.upper=2"],
         ["f a ~security.capability=CAP_NET_RAW ~user.a=1", "d d ~user.upper=2"]),
    case("root-entry", ["f a =a"], ["d ./ %700 ^3:0 @7777"], ["f b =b"], ["d . %700 ^3:0 @7777", "f a =a", "f b =b"]),
    case("no-root-entry", ["f a =a"], ["f a =a"]),
    case("mode-and-owner",
         ["f s %6755 ^4294967294:4294967294", "d t %3777 ^1000:100"],
         ["f s %6755 ^4294967294:4294967294", "d t %3777 ^1000:100"]),
    case("names-not-utf-8",
         ["f gone\udcff =gone", "f pax\udce9 =pax", "f gnu\udce9 =gnu !", "f both-ü\udc80 =b"], ["f .wh.gone\udcff"],
         ["f both-ü\udc80 =b", "f gnu\udce9 =gnu", "f pax\udce9 =pax"]),
    case("special-files",
         ["c null #1:3 %666", "b disk #259:70000 %660", "p pipe %600"],
         ["b disk #259:70000 %660", "c null #1:3 %666", "p pipe %600"]),
    # What reference engines do, without a row of its own in the table.
    case("whiteout-of-another-type",
         ["f a =a", "f b =b", "f c =c", "f z =z"], ["d .wh.a", "l .wh.b >x", "c .wh.c #0:0"], ["f z =z"]),
    case("aufs-leftovers",
         ["f a =a", "f .wh..wh.aufs", "d .wh..wh.orph", "d .wh..wh.plnk", "f .wh..wh.plnk/1.2 =x",
          "h b >.wh..wh.plnk/1.2", "h c >.wh..wh.plnk/1.2"],
         ["f a =a", "f b =x *2 &b", "f c =x *2 &b"]),
    case("global-header", ["g mtime=77", "f a =a"], ["f a =a"]),
    case("opaque-only-by-its-very-name", ["d d", "f d/low =low"], ["f d/.wh..wh..opqX"], ["d d", "f d/low =low"]),
    case("opaque-through-a-lower-symlink",
         ["d real", "f real/low =low", "l alias >real"], ["f alias/.wh..wh..opq", "f alias/up =up"],
         ["d alias", "f alias/up =up", "d real", "f real/low =low"]),
)


def pair(text):
    return tuple(int(number) for number in text.split(":"))


def packed(line):
    """A tar entry as a line says it."""
    kind, name, *words = line.split(" ")
    if kind == "g":
        key, _, value = name.partition("=")
        return tarfile.TarInfo.create_pax_global_header({key: value})
    info = tarfile.TarInfo(name)
    info.type = TYPES[kind]
    info.mode = 0o755 if kind == "d" else 0o777 if kind == "l" else 0o644
    content, form = b"", tarfile.PAX_FORMAT
    for word in words:
        sign, rest = word[0], word[1:]
        if sign == "=":
            content = rest.encode()
        elif sign == ">":
            info.linkname = rest
        elif sign == "%":
            info.mode = int(rest, 8)
        elif sign == "^":
            info.uid, info.gid = pair(rest)
        elif sign == "#":
            info.devmajor, info.devminor = pair(rest)
        elif sign == "@":
            # As text: a float would lose the nanoseconds.
            info.pax_headers["mtime"] = rest
        elif sign == "~":
            key, _, value = rest.partition("=")
            info.pax_headers[f"SCHILY.xattr.{key}"] = VALUES.get(value, value)
        elif sign == "!":
            form = tarfile.GNU_FORMAT
        else:
            raise ValueError(line)
    info.size = len(content)
    return info.tobuf(form, "utf-8", "surrogateescape") + content + bytes(-len(content) % tarfile.BLOCKSIZE)


class PlainLayout(Layout):
    """A layout of images whose layers nothing compressed."""

    def add_tar(self, lines):
        tar = b"".join(map(packed, lines)) + bytes(2 * tarfile.BLOCKSIZE)
        descriptor = self._add_blob(tar, TAR_TYPE)
        return Layer(descriptor, descriptor["digest"])


def write(path):
    layout = PlainLayout(path)
    platform = {"architecture": DEBIAN_ARCHITECTURES[os.uname().machine], "os": "linux"}
    for named in CASES:
        layers = [layout.add_tar(lines) for lines in named.layers]
        layout.tag(layout.add_image(layers, platform), named.name)
    layout.finish()


def seconds(time_ns):
    whole, fraction = divmod(time_ns, 1_000_000_000)
    return f"{whole}.{fraction:09}" if fraction else f"{whole}"


def shown_value(value):
    text = value.decode("utf-8", "surrogateescape")
    return next((name for name, known in VALUES.items() if known == text), text)


def found_line(root, name, first_names):
    """The line that says what a path is."""
    path = os.path.join(root, name)
    status = os.lstat(path)
    kind, usual, what = {
        stat.S_IFDIR: ("d", 0o755, ""), stat.S_IFREG: ("f", 0o644, ""), stat.S_IFLNK: ("l", 0o777, ""),
        stat.S_IFCHR: ("c", 0o644, ""), stat.S_IFBLK: ("b", 0o644, ""), stat.S_IFIFO: ("p", 0o644, ""),
    }[stat.S_IFMT(status.st_mode)]
    if kind == "f":
        with open(path, "rb") as file:
            content = file.read().decode("utf-8", "surrogateescape")
        what = f" ={content}" if content else ""
    elif kind == "l":
        what = f" >{os.readlink(path)}"
    elif kind in "bc":
        what = f" #{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    line = f"{kind} {name}{what}"
    if stat.S_IMODE(status.st_mode) != usual:
        line += f" %{stat.S_IMODE(status.st_mode):o}"
    if (status.st_uid, status.st_gid) != (0, 0):
        line += f" ^{status.st_uid}:{status.st_gid}"
    if status.st_mtime_ns:
        line += f" @{seconds(status.st_mtime_ns)}"
    for key in sorted(os.listxattr(path, follow_symlinks=False)):
        line += f" ~{key}={shown_value(os.getxattr(path, key, follow_symlinks=False))}"
    if kind != "d" and status.st_nlink != 1:
        line += f" *{status.st_nlink} &{first_names.setdefault(status.st_ino, name)}"
    return line


def found(root):
    """All that is below a root, as lines."""
    names, pending = [], [""]
    while pending:
        directory = pending.pop()
        for entry in os.scandir(os.path.join(root, directory)):
            name = os.path.join(directory, entry.name)
            names.append(name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
    first_names = {}
    lines = [found_line(root, name, first_names) for name in sorted(names)]
    of_root = found_line(root, ".", first_names)
    return ([] if of_root == "d ." else [of_root]) + lines


def check(repository):
    failed = 0
    width = max(len(named.name) for named in CASES)
    for named in CASES:
        try:
            seen = found(f"{repository}:{named.name}/rootfs")
        except OSError as error:
            seen = [str(error)]
        same = sorted(seen) == sorted(named.merged)
        failed += not same
        print(f"{named.name:{width}}  {'as it should be' if same else 'OTHERWISE'}  {ascii('; '.join(seen))[1:-1]}")
        if not same:
            print(f"{'':{width}}  should be       {ascii('; '.join(named.merged))[1:-1]}")
    print(f"{len(CASES)} cases, {failed} not as they should be")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("layout")
    commands.add_parser("names")
    commands.add_parser("check").add_argument("repository")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return check(arguments.repository)
    if arguments.command == "write":
        write(arguments.layout)
    else:
        print("\n".join(named.name for named in CASES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
