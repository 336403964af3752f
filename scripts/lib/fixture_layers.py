"""The layers whose every entry is a case of its own.

`write_lower` puts down what `write_upper` then deletes, hides, replaces and links to, so an image
needs both, in this order, to show the merge rules at work. Everything lives below `srv/lab`,
except for a few changes to Debian's own files. Cases in which umoci goes wrong belong into unit
tests: here its result is the truth to compare with.
"""

import io
import random
import tarfile

ROOT = "srv/lab"
MTIME = 1_650_000_000
MIB = 1 << 20
ESTARGZ_CHUNK_BYTES = 4 * MIB

# struct vfs_cap_data, revision 2: cap_net_raw permitted and effective.
CAP_NET_RAW = b"\x01\x00\x00\x02\x00\x20" + b"\x00" * 14


def noise(size, seed):
    """Bytes that do not compress, the same on every machine."""
    return random.Random(seed).randbytes(size)


class LayerTar:
    """A PAX tar writer with one short method for each type of entry."""

    def __init__(self, path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tar.close()

    def _add(self, name, kind, mode, data=None, **options):
        info = tarfile.TarInfo(name)
        info.type = kind
        info.mode = mode
        info.uid = options.pop("uid", 0)
        info.gid = options.pop("gid", 0)
        info.mtime = options.pop("mtime", MTIME)
        info.linkname = options.pop("target", "")
        info.devmajor, info.devminor = options.pop("device", (0, 0))
        for key, value in options.pop("xattrs", {}).items():
            # The writer encodes records as UTF-8, so a value must be ASCII to stay itself.
            info.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("ascii")
        if options:
            raise TypeError(f"unknown options {sorted(options)}")
        if data is not None:
            info.size = len(data)
        self.tar.addfile(info, None if data is None else io.BytesIO(data))

    def directory(self, name, mode=0o755, **options):
        self._add(name, tarfile.DIRTYPE, mode, **options)

    def file(self, name, data, mode=0o644, **options):
        data = data.encode() if isinstance(data, str) else data
        self._add(name, tarfile.REGTYPE, mode, data, **options)

    def symlink(self, name, target, **options):
        self._add(name, tarfile.SYMTYPE, 0o777, target=target, **options)

    def hard_link(self, name, target):
        self._add(name, tarfile.LNKTYPE, 0o644, target=target)

    def fifo(self, name, mode=0o600):
        self._add(name, tarfile.FIFOTYPE, mode)

    def character_device(self, name, major, minor, mode=0o666):
        self._add(name, tarfile.CHRTYPE, mode, device=(major, minor))

    def block_device(self, name, major, minor, mode=0o660, gid=6):
        self._add(name, tarfile.BLKTYPE, mode, device=(major, minor), gid=gid)

    def whiteout(self, name):
        parent, _, base = name.rpartition("/")
        self.file(f"{parent}/.wh.{base}", b"")

    def opaque(self, directory):
        self.file(f"{directory}/.wh..wh..opq", b"")


def write_lower(tar):
    """The layer below: what the upper one will change."""
    tar.directory("srv")
    tar.directory(ROOT)
    tar.file(f"{ROOT}/kept", "kept\n")
    tar.file(f"{ROOT}/shadowed", "lower\n")
    tar.file(f"{ROOT}/whited-out-file", "gone\n")
    for name in ("whited-out-dir", "opaque-first", "opaque-last", "rewritten", "dir-to-file",
                 "dir-to-symlink"):
        tar.directory(f"{ROOT}/{name}")
        tar.file(f"{ROOT}/{name}/low", f"low in {name}\n")
        tar.directory(f"{ROOT}/{name}/sub")
        tar.file(f"{ROOT}/{name}/sub/deep", f"deep in {name}\n")
    for name in ("file-to-dir", "file-to-symlink", "file-to-fifo"):
        tar.file(f"{ROOT}/{name}", f"{name}\n")
    for name in ("symlink-to-dir", "symlink-to-file"):
        tar.symlink(f"{ROOT}/{name}", "kept")
    tar.directory(f"{ROOT}/reattributed", xattrs={"user.lower": b"1"})
    tar.file(f"{ROOT}/reattributed/low", "stays\n")
    tar.directory(f"{ROOT}/implicit", 0o1777, uid=7, gid=8, mtime=5000)
    tar.file(f"{ROOT}/implicit/low", "stays\n")
    tar.directory(f"{ROOT}/links")
    tar.file(f"{ROOT}/links/a", "a and b\n")
    tar.hard_link(f"{ROOT}/links/b", f"{ROOT}/links/a")
    tar.file(f"{ROOT}/links/c", "c and d\n")
    tar.hard_link(f"{ROOT}/links/d", f"{ROOT}/links/c")


def write_upper(tar, version):
    """The layer above; version 1 and 2 differ in a few entries."""
    _deletions(tar, version)
    _replacements(tar)
    _links(tar)
    _special_files(tar)
    _sizes(tar, version)
    _names(tar)
    _times_and_owners(tar)
    _version_differences(tar, version)


def _deletions(tar, version):
    tar.whiteout(f"{ROOT}/whited-out-file")
    tar.whiteout(f"{ROOT}/whited-out-dir")
    tar.directory(f"{ROOT}/opaque-first", 0o750, gid=5)
    tar.opaque(f"{ROOT}/opaque-first")
    tar.directory(f"{ROOT}/opaque-first/sub")
    tar.file(f"{ROOT}/opaque-first/sub/up", "up\n")
    # Last in its directory it must still hide only what is below this layer. No `sub` here:
    # umoci would empty the lower one and leave its modification time changed.
    tar.directory(f"{ROOT}/opaque-last")
    tar.file(f"{ROOT}/opaque-last/up", "up\n")
    tar.directory(f"{ROOT}/opaque-last/new")
    tar.file(f"{ROOT}/opaque-last/new/up", "up\n")
    tar.opaque(f"{ROOT}/opaque-last")
    tar.whiteout(f"{ROOT}/rewritten")
    tar.directory(f"{ROOT}/rewritten")
    tar.file(f"{ROOT}/rewritten/up", "up\n")
    tar.whiteout("usr/share/doc/git")
    if version == 2:
        tar.whiteout("usr/share/doc/perl")
    tar.directory("usr/share/git-core/templates")
    tar.opaque("usr/share/git-core/templates")
    tar.file("usr/share/git-core/templates/description", "A lab image.\n")


def _replacements(tar):
    tar.file(f"{ROOT}/dir-to-file", "now a file\n")
    tar.symlink(f"{ROOT}/dir-to-symlink", "kept")
    for name in ("file-to-dir", "symlink-to-dir"):
        tar.directory(f"{ROOT}/{name}")
        tar.file(f"{ROOT}/{name}/child", "child\n")
    tar.symlink(f"{ROOT}/file-to-symlink", "kept")
    tar.fifo(f"{ROOT}/file-to-fifo")
    tar.file(f"{ROOT}/symlink-to-file", "now a file\n")
    tar.directory(f"{ROOT}/reattributed", 0o2710, uid=3, gid=4, xattrs={"user.upper": b"2"})
    # No entry for its parent: the lower directory's attributes and time must stay.
    tar.file(f"{ROOT}/implicit/up", "up\n")


def _links(tar):
    tar.whiteout(f"{ROOT}/links/b")
    tar.hard_link(f"{ROOT}/links/from-upper", f"{ROOT}/links/c")
    tar.file(f"{ROOT}/links/e", "e, f and g\n", 0o640, uid=11)
    tar.hard_link(f"{ROOT}/links/f", f"{ROOT}/links/e")
    tar.hard_link(f"{ROOT}/links/g", f"{ROOT}/links/f")
    tar.symlink(f"{ROOT}/links/dangling", "/nowhere/at/all")
    tar.symlink(f"{ROOT}/links/loop", "loop")
    tar.symlink(f"{ROOT}/links/absolute", f"/{ROOT}/kept")
    tar.symlink(f"{ROOT}/links/above-root", "../../../../../../etc/hostname")
    tar.symlink(f"{ROOT}/links/long", "x/" * 1000 + "end")
    tar.directory(f"{ROOT}/links/real")
    tar.symlink(f"{ROOT}/links/alias", "real")
    tar.file(f"{ROOT}/links/alias/through-alias", "lands in real\n")


def _special_files(tar):
    tar.directory(f"{ROOT}/special")
    tar.file(f"{ROOT}/special/setuid", "#!/bin/sh\n", 0o4755)
    tar.file(f"{ROOT}/special/setgid", "#!/bin/sh\n", 0o2755, gid=42)
    tar.directory(f"{ROOT}/special/sticky", 0o1777)
    tar.file(f"{ROOT}/special/no-permission", "root only\n", 0o000)
    tar.fifo(f"{ROOT}/special/fifo")
    tar.character_device(f"{ROOT}/special/null", 1, 3)
    tar.block_device(f"{ROOT}/special/loop200", 7, 200)
    tar.file(f"{ROOT}/special/capability", "raw\n", 0o755, xattrs={"security.capability": CAP_NET_RAW})
    attributes = {"user.text": b"some text", "user.nul": b"a\x00b\n=c"}
    tar.file(f"{ROOT}/special/xattrs", "attributes\n", xattrs=attributes)
    tar.directory(f"{ROOT}/special/xattrs-dir", xattrs={"user.long": b"v" * 2000})


def _sizes(tar, version):
    tar.directory(f"{ROOT}/sizes")
    edges = (0, 1, 511, 512, 513, 4095, 4096, 4097)
    around_chunk = (ESTARGZ_CHUNK_BYTES - 1, ESTARGZ_CHUNK_BYTES, ESTARGZ_CHUNK_BYTES + 1)
    for size in edges + around_chunk:
        tar.file(f"{ROOT}/sizes/{size}", noise(size, size))
    tar.file(f"{ROOT}/sizes/zeros", bytes(9 * MIB))
    many_chunks = bytearray(noise(20 * MIB + 12345, "many chunks"))
    if version == 2:
        # One byte in the middle: all other chunks stay the same in both versions.
        many_chunks[10 * MIB] ^= 0xFF
    tar.file(f"{ROOT}/sizes/many-chunks", bytes(many_chunks))
    tar.directory(f"{ROOT}/sizes/many-entries")
    for number in range(2000):
        tar.file(f"{ROOT}/sizes/many-entries/{number:04}", f"{number}\n")


def _names(tar):
    tar.directory(f"{ROOT}/names")
    names = ("größe", "日本語", "emoji-🦀", "e\u0301-decomposed", "\u00e9-composed", "with space",
             "quote'\"`", "back\\slash", "-dash", "#hash", "%41", "*?[x]", "$HOME", "x" * 255,
             "ü" * 127, "..dots", ".hidden", "UPPER", "upper", "a:b", "a@b", ".wh", "wh.x")
    for name in names:
        tar.file(f"{ROOT}/names/{name}", f"{name}\n")
    deep = f"{ROOT}/names/deep"
    tar.directory(deep)
    for level in range(40):
        deep = f"{deep}/level-{level:02}-of-a-long-path"
        tar.directory(deep)
    tar.file(f"{deep}/bottom", "reached\n")
    tar.directory(f"{ROOT}/names/empty-dir")


def _times_and_owners(tar):
    tar.directory(f"{ROOT}/times", mtime=86_400)
    for name, mtime in (("epoch", 0), ("second", 1), ("past-2038", 2**31 + 5),
                        ("fraction", MTIME + 0.25), ("year-2200", 7_258_118_400)):
        tar.file(f"{ROOT}/times/{name}", f"{name}\n", mtime=mtime)
    tar.symlink(f"{ROOT}/times/old-symlink", "epoch", mtime=1_000_000)
    tar.file(f"{ROOT}/times/big-ids", "ids\n", uid=4_000_000_000, gid=3_000_000)


def _version_differences(tar, version):
    tar.directory(f"{ROOT}/version")
    tar.file(f"{ROOT}/version/number", f"{version}\n")
    tar.file(f"{ROOT}/version/only-in-v{version}", "here\n")
    tar.file(f"{ROOT}/version/mode", "same\n", 0o600 if version == 1 else 0o644)
    tar.file(f"{ROOT}/version/mtime", "same\n", mtime=MTIME + 100 * version)
    tar.file(f"{ROOT}/version/same-size-and-time", f"content {version}\n")
    tar.symlink(f"{ROOT}/version/symlink", f"target-{version}")
    tar.file(f"{ROOT}/version/xattr", "same\n", xattrs={"user.version": str(version).encode()})
    if version == 2:
        tar.file(f"{ROOT}/shadowed", "upper\n")
    tar.directory("etc")
    tar.file("etc/issue", f"Lab image, version {version}\n")
