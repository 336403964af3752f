"""What scripts/bench --kernel shows behind the rows of both modes: one image read where the kernel's EROFS serves it and where we
do, from several states of our cache, beside the same tree on ext4: first with an empty page cache, then again; what reached
the daemon, what was fetched, and how often the page cache holds what was read."""

import os
import stat
import sys
import time
from pathlib import Path

from bench_tools import TAG_TTL, drop_caches, print_table, seconds

OTHER_TAG = "v2"
# What the store has of the image where it has a part: about a third of its bytes.
PART = "usr/lib/x86_64-linux-gnu"
# Shell commands beside the root filesystem `a`; `b` is that of the other image. git refuses devices, so it gets a part.
COMMANDS = {
    "find -ls": "cd {a} && find . -ls",
    "ls -lR": "cd {a} && ls -lR",
    "tar": "cd {a} && tar -cf - .",
    "grep -r in usr": "cd {a} && grep -r registryfs-bench usr || true",
    "diff -r": "diff -r --no-dereference {a} {b} || test $? = 1",
    "git diff, usr": "git diff --no-index {a}/usr {b}/usr || test $? = 1",
    "chroot, numpy": "chroot {a} /usr/bin/python3 -B -c 'import numpy'",
}
SMALL = "etc/debian_version"
READ_AHEAD_KIB = (16, 128, 1024)
# Second copies in the page cache are given up a moment later, and what was just written some seconds after that.
SETTLED_AFTER_S = 12
PAGE_BYTES = 4096
ALL = "cd {a} && tar -cf - ."


class State:
    """What of the image is here, and who serves it."""

    def __init__(self, name, options, has):
        self.name, self.options, self.has = name, options, has


EXT4 = State("ext4", None, "all")
LOCAL = State("kernel, all here", "kernel=require", "all")
PARTIAL = State("kernel, a part here", "kernel=require", "part")
EMPTY = State("kernel, nothing here", "kernel=require", "nothing")
FUSE = State("FUSE, all here", "kernel=off", "all")
FUSE_EMPTY = State("FUSE, nothing here", "kernel=off", "nothing")
STATES = (EXT4, LOCAL, PARTIAL, EMPTY, FUSE, FUSE_EMPTY)


class Run:
    """One command, once: how long it took, what reached the daemon meanwhile, and what that fetched."""

    def __init__(self, elapsed, requests=0, fetched=0):
        self.elapsed, self.requests, self.fetched = elapsed, requests, fetched

    def text(self):
        asked = f", {self.requests} req" if self.requests else ""
        return f"{self.elapsed:.3f} s{asked}" + (f", {self.fetched / 1e6:.1f} MB" if self.fetched else "")


class Kernel:
    """Measurements in both modes. `bench` makes its mounts."""

    def __init__(self, bench):
        self.bench, self.runs = bench, bench.runs
        self.mount = bench.new_mount("kernel")
        self.has = None
        # (command, state) to the best first and the best second run.
        self.best = {}

    def places(self, state):
        """The directory in which a state's commands run, and the names there of its two root filesystems."""
        if state is EXT4:
            return self.bench.unpacked, "v1", OTHER_TAG
        repository = self.bench.rootfs(self.mount).parent.parent
        name = self.bench.rootfs(self.mount).parent.name.partition(":")[0]
        return repository, f"{name}:v1/rootfs", f"{name}:{OTHER_TAG}/rootfs"

    def shell(self, state, command):
        directory, a, b = self.places(state)
        return seconds(command.format(a=a, b=b), directory)

    def prepare(self, state):
        """Mounts with the store that the state names, and an empty page cache."""
        if state is not EXT4:
            if self.mount.mounted:
                self.mount.umount()
            if state.has != "all" or self.has != "all":
                self.mount.empty()
                self.fill(state)
            self.has = state.has
            self.mount.mount("-o", f"{state.options},{TAG_TTL}")
        drop_caches()

    def fill(self, state):
        """Puts into the store what it is to have."""
        if state.has == "nothing":
            return
        self.mount.mount("-o", f"{state.options},{TAG_TTL}")
        if state.has == "all":
            self.shell(state, ALL)
            self.shell(state, ALL.replace("{a}", "{b}"))
        else:
            self.shell(state, f"tar -C {{a}} -cf - {PART}")
        self.mount.umount()

    def measured(self, state, command):
        if state is EXT4:
            return Run(self.shell(state, command))
        requests, fetched = self.mount.reached()
        elapsed = self.shell(state, command)
        # A read-ahead may still be on its way when its reader has ended.
        time.sleep(0.05)
        after, fetched_after = self.mount.reached()
        return Run(elapsed, after - requests, fetched_after - fetched)

    def commands(self):
        for name, command in COMMANDS.items():
            for _ in range(self.runs):
                for state in STATES:
                    self.prepare(state)
                    first, again = self.measured(state, command), self.measured(state, command)
                    if state.has == "all":
                        # Once more: the second run still promotes what the first one brought.
                        again = min(again, self.measured(state, command), key=lambda run: run.elapsed)
                    self.keep(name, state, first, again)
            self.bench.say(f"{name}: " + "; ".join(
                f"{state.name}: {' then '.join(run.text() for run in self.best[name, state])}" for state in STATES))

    def keep(self, name, state, *runs):
        before = self.best.get((name, state), runs)
        self.best[name, state] = tuple(min(pair, key=lambda run: run.elapsed) for pair in zip(before, runs))

    def memory(self):
        """How often the page cache holds a root filesystem that was read once."""
        size = content_bytes_in_pages(self.bench.ext4)
        self.prepare(EMPTY)
        self.read_blobs()
        fetched = self.cached_by(EMPTY)
        drop_caches()
        through_us = self.cached_by(EMPTY)
        self.prepare(FUSE)
        fuse = self.cached_by(FUSE)
        self.prepare(LOCAL)
        local = self.cached_by(LOCAL)
        drop_caches()
        ext4 = self.cached_by(EXT4)
        for name, grown, goal in (
            ("kernel mode, complete layers as local files", local, 1.1),
            ("kernel mode, through us, all here", through_us, 2.2),
            ("kernel mode, through us, fetched meanwhile", fetched, 2.2),
            ("FUSE mode, all here", fuse, None),
            ("ext4", ext4, None),
        ):
            self.bench.row(f"page cache {SETTLED_AFTER_S} s after reading all once, {name} / rootfs", grown / 1e6, size / 1e6, goal=goal, unit="MB")

    def read_blobs(self):
        """Has the registry's own files in the page cache before what is fetched from it is measured there."""
        for blob in self.bench.blobs(self.bench.reference):
            seconds(f"curl -fsS {blob}", self.bench.scratch)

    def cached_by(self, state):
        before = cached_bytes()
        self.shell(state, ALL)
        time.sleep(SETTLED_AFTER_S)
        return cached_bytes() - before

    def read_ahead(self):
        """What the read-ahead of the device files costs and gains."""
        for kib in READ_AHEAD_KIB:
            small = [self.with_read_ahead(kib, f"cat {{a}}/{SMALL}") for _ in range(self.runs)]
            whole = [self.with_read_ahead(kib, ALL) for _ in range(self.runs)]
            best = [min(runs, key=lambda run: run.elapsed).text() for runs in (small, whole)]
            self.bench.say(f"devices with {kib} KiB of read-ahead: cat {SMALL}: {best[0]}; tar: {best[1]}")

    def with_read_ahead(self, kib, command):
        """A command on an image that is mounted, with nothing of its data here."""
        if self.mount.mounted:
            self.mount.umount()
        before = backing_devices()
        self.prepare(EMPTY)
        # Before the image is mounted: the kernel looks at it when it opens the devices.
        set_read_ahead(backing_devices() - before, kib)
        self.shell(EMPTY, "ls {a}")
        return self.measured(EMPTY, command)

    def measure(self):
        self.memory()
        self.read_ahead()
        self.commands()

    def print(self):
        """Every command in every state: with an empty page cache, and again."""
        head = ("command", *(state.name for state in STATES))
        rows = []
        for name in COMMANDS:
            for which, when in enumerate(("first", "again")):
                rows.append((f"{name}, {when}", *(self.best[name, state][which].text() for state in STATES)))
        print_table(head, rows)
        print()


def content_bytes_in_pages(root):
    """Bytes of the regular files below a directory, each once and in whole pages, as the page cache has them at the least."""
    seen = {}
    for directory, _, files in os.walk(root):
        for name in files:
            status = os.lstat(Path(directory, name))
            if stat.S_ISREG(status.st_mode):
                seen[status.st_ino] = -(-status.st_size // PAGE_BYTES) * PAGE_BYTES
    return sum(seen.values())


def cached_bytes():
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Cached:")) * 1024


def backing_devices():
    return {path.name for path in Path("/sys/class/bdi").iterdir() if path.name.startswith("0:")}


def set_read_ahead(devices, kib):
    """Sets the read-ahead of the connection that shows data devices: of `devices`, the one that is mounted nowhere."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        devices = devices - {line.split()[2] for line in table}
    if len(devices) != 1:
        sys.exit(f"scripts/bench: which of {sorted(devices)} shows the data devices cannot be told")
    Path("/sys/class/bdi", devices.pop(), "read_ahead_kb").write_text(str(kib), encoding="ascii")
