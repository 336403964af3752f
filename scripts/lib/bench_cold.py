"""What scripts/bench measures of reading all of an image that is not in the cache, in both modes, from a registry on loopback,
beside fetching and decompressing its layers and keeping nothing."""

import random
import shlex

from bench_tools import MODES, TAG_TTL, best_in_turns, drop_caches, seconds

# Format: image, what decompresses its layers, and the goal.
FORMATS = {
    "eStargz": ("lab/debian:v1", "gunzip", 0.8),
    "zstd:chunked": ("lab/formats:zstd-chunked", "zstd -dc", 0.8),
    "plain gzip": ("lab/debian:v1-gzip", "gunzip", 1.0),
}
# Layers of which a first touch is one pass over all: tag, what unpacks and hashes them, and the goal if there is one.
PASSES = (("gzip", "gunzip | sha256sum", 1.1), ("zstd", "zstd -dc | sha256sum", None), ("tar", "sha256sum", None))
SMALL = "etc/debian_version"
NUMPY = "chroot rootfs /usr/bin/python3 -B -c 'import numpy'"
TAR = "tar -cf - rootfs"
SEED = 1
READERS = 4
# Names that one process of a reader is given, so that several have enough to share.
NAMES_EACH = 64


class Cold:
    """A mount for each mode, whose cache is emptied before each run."""

    def __init__(self, bench):
        self.bench = bench
        self.mounts = {mode: bench.new_mount(f"cold-{mode}") for mode in MODES}

    def run(self, mode, reference, command):
        """How long a command takes beside a root filesystem, with nothing of it here."""
        mount = self.mounts[mode]
        mount.empty()
        mount.mount("-o", f"{MODES[mode]},{TAG_TTL}")
        elapsed = seconds(command, self.bench.image(mount, reference))
        mount.umount()
        return elapsed

    def sides(self, reference, command):
        return [lambda mode=mode: self.run(mode, reference, command) for mode in self.mounts]

    def pull(self, reference, unpack):
        """Fetches and decompresses each layer, one after the other, and keeps nothing."""
        commands = [f"curl -fsS {shlex.quote(blob)} | {unpack}" for blob in self.bench.blobs(reference)]
        return lambda: seconds("; ".join(commands), self.bench.scratch)


def cold(bench):
    """tar of all, in each format; starting a program."""
    both = Cold(bench)
    for name, (reference, unpack, goal) in FORMATS.items():
        pull = both.pull(reference, unpack)
        *ours, theirs = best_in_turns(bench.runs, *both.sides(reference, TAR), pull)
        for mode, best in zip(MODES, ours):
            bench.row(f"cold tar, {name}, {mode} / curl | {unpack} of each layer", best, theirs, goal=goal, unit="s")
    reference, unpack, _ = FORMATS["eStargz"]
    *ours, theirs = best_in_turns(bench.runs, *both.sides(reference, NUMPY), both.pull(reference, unpack))
    for mode, best in zip(MODES, ours):
        bench.row(f"cold chroot, python3 -c 'import numpy', {mode} / the same", best, theirs, unit="s")


def touch(bench):
    """The first ls of a root filesystem whose layers have to be read as a whole; afterwards one file alone."""
    both = Cold(bench)
    for tag, unpack, goal in PASSES[:1] if bench.quick else PASSES:
        reference = f"{bench.lab['LAB_FORMATS']}:{tag}"
        *ours, theirs = best_in_turns(bench.runs, *both.sides(reference, "ls rootfs"), both.pull(reference, unpack))
        for mode, best in zip(MODES, ours):
            bench.row(f"first ls of {tag}, nothing here, {mode} / curl | {unpack} of each layer", best, theirs, goal=goal, unit="s")
    afterwards(bench, f"{bench.lab['LAB_FORMATS']}:{PASSES[0][0]}")


def afterwards(bench, reference):
    """What one file asks for that has left the cache."""
    for mode, option in MODES.items():
        line = bench.new_line()
        mount = bench.new_mount(f"afterwards-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        rootfs = bench.image(mount, reference) / "rootfs"
        (rootfs / SMALL).read_bytes()
        mount.command("cache", "evict", f"{bench.registry}/{reference}", f"/{SMALL}")
        drop_caches()
        line.settled()
        (rootfs / SMALL).read_bytes()
        bench.row(f"  afterwards a file that has left our cache, {mode}: requests", len(line.settled()), goal=1)
        mount.discard()


def orders(bench):
    """The files of an image in the order of the tree, in any order, and by several processes at once."""
    both = Cold(bench)
    reference, unpack, _ = FORMATS["eStargz"]
    in_order, at_random = write_lists(bench)
    # All at once, so that one process reads for as long as there is anything.
    one = lambda names: f"xargs -0 -n {NAMES_EACH} cat < {names}"
    several = f"xargs -0 -P {READERS} -n {NAMES_EACH} cat < {in_order}"
    runs = max(1, bench.runs - 1)
    for mode in MODES:
        sides = [lambda command=command: both.run(mode, reference, f"cd rootfs && {command}")
                 for command in (one(in_order), one(at_random), several)]
        ordered, mixed, shared = best_in_turns(runs, *sides)
        bench.row(f"cold, each file in random order, {mode} / in find order", mixed, ordered, goal=2.0, unit="s")
        bench.row(f"cold, by {READERS} processes at once, {mode} / by one", shared, ordered, goal=1.0, unit="s")
    theirs = both.pull(reference, unpack)()
    bench.row(f"  in find order, {list(MODES)[-1]} / curl | {unpack} of each layer", ordered, theirs, goal=0.8, unit="s")


def write_lists(bench):
    """Two lists of the image's files for xargs: as find lists them, and shuffled."""
    mount = bench.new_mount("lists")
    mount.mount("-o", MODES["FUSE"])
    found = bench.scratch / "in-order"
    seconds(f"find . -type f -print0 > {found}", bench.rootfs(mount))
    mount.discard()
    names = found.read_bytes().split(b"\0")[:-1]
    random.Random(SEED).shuffle(names)
    shuffled = bench.scratch / "at-random"
    shuffled.write_bytes(b"\0".join(names) + b"\0")
    return found, shuffled
