"""What scripts/bench measures of many readers at once: of one cold file, of different ones over a slow link, and of files that
are here while others wait for a registry that hangs or for a busy disk."""

import collections
import hashlib
import os
import stat
import statistics
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

from bench_link import MBIT_PER_S, ROUND_TRIP_MS
from bench_tools import MODES, TAG_TTL, asked_twice, seconds

# A file of several chunks that do not compress.
SHARED = "srv/lab/sizes/many-chunks"
SHARING = 100
# Readers of different files, and the sizes of these: several together keep the link busy for about a second.
DIFFERENT, DIFFERENT_BYTES = 64, (200_000, 1_000_000)
# How many reads make a percentile, how many files they are of, and how often it is measured.
PROBES, PROBED_FILES, ROUNDS = 1000, 200, 5
PROBE_BYTES = 4096
STUCK = 64


def shared(bench):
    """All read the same."""
    for mode, option in MODES.items():
        line = bench.new_line(5)
        mount = bench.new_mount(f"shared-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        rootfs = bench.rootfs(mount)
        (rootfs / "srv").stat()
        line.settled()
        readers = f"for i in $(seq {SHARING}); do cat {SHARED} >/dev/null & done; wait"
        elapsed = seconds(readers, rootfs)
        asked, twice = asked_twice(line.settled())
        expected = hashlib.sha256((bench.ext4 / SHARED).read_bytes()).digest()
        if hashlib.sha256((rootfs / SHARED).read_bytes()).digest() != expected:
            sys.exit(f"scripts/bench: {SHARED} is not what was unpacked")
        bench.say(f"{SHARING} readers of one file, {mode}: {elapsed:.2f} s")
        bench.row(f"{SHARING} readers of one cold file, {mode}: bytes asked for more than once", twice, goal=0)
        stored = bench.tocs(bench.reference).stored_bytes(SHARED)
        bench.row("  the same: KiB asked for beside its chunks", (asked - stored) / 1024, goal=256, unit="KiB")
        mount.umount()


def different(bench):
    """Each reads a file of its own, over the link."""
    paths = spread(bench.ext4, DIFFERENT, *DIFFERENT_BYTES)
    tocs = bench.tocs(bench.reference)
    least = [ranged_get(*tocs.stored_at(path)) for path in paths]
    for mode, option in MODES.items():
        line = bench.new_line(ROUND_TRIP_MS, MBIT_PER_S)
        mount = bench.new_mount(f"different-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        rootfs = bench.rootfs(mount)
        os.listdir(rootfs)
        line.settled()
        elapsed = read_at_once([rootfs / path for path in paths])
        requests = line.settled()
        theirs = line.replay([least])
        bench.row(f"{DIFFERENT} readers of different cold files over the link, {mode} / a request for each at once",
                  elapsed, theirs, goal=1.2, unit="s")
        bench.row("  the same: requests", len(requests))
        mount.umount()


def ranged_get(url, start, end):
    """A request for a part of a blob, as replay.py sends it."""
    place = urlsplit(url)
    sent = f"GET {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
    return {"port": place.port, "sent": sent, "status": 206}


def spread(root, count, least, most):
    """Files of a size, spread evenly over a tree."""
    found = files_below(root, lambda size: least <= size <= most)
    return found[:: len(found) // count][:count]


def files_below(root, wanted):
    found = []
    for directory, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode) and wanted(status.st_size):
                found.append(os.path.relpath(os.path.join(directory, name), root))
    return sorted(found)


def read_at_once(paths):
    threads = [threading.Thread(target=path.read_bytes) for path in paths]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start


def beside(bench):
    """Reads of what is here: alone, while cold reads hang on a dead registry, and while the cache disk is busy."""
    paths = spread(bench.ext4, PROBED_FILES, PROBE_BYTES, 1 << 20)
    for mode, option in MODES.items():
        line = bench.new_line()
        mount = bench.new_mount(f"beside-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        cold = bench.image(mount, bench.lab["LAB_LARGE"]) / "rootfs"
        os.listdir(cold)
        rootfs = bench.rootfs(mount)
        seconds("tar -cf - .", rootfs)
        os.sync()
        alone = probe(rootfs, paths)
        with Busy(bench.scratch):
            busy, on_ext4 = probe(rootfs, paths), probe(bench.ext4, paths)
        line.hang("plain")
        with Stuck(cold):
            stuck = probe(rootfs, paths)
        row = lambda what, ours, theirs: bench.row(what, ours * 1e6, theirs * 1e6, goal=2.0, unit="us")
        row(f"p99 of warm reads while {STUCK} cold ones hang on a dead registry, {mode} / alone", stuck.warm_s, alone.warm_s)
        row("  the same from our cache, not in the page cache", stuck.from_disk_s, alone.from_disk_s)
        row(f"p99 of warm reads while the cache disk is busy, {mode} / alone", busy.warm_s, alone.warm_s)
        row("  the same from our cache, not in the page cache / from ext4 meanwhile", busy.from_disk_s, on_ext4.from_disk_s)
        mount.discard()


Percentiles = collections.namedtuple("Percentiles", "warm_s from_disk_s")


def probe(root, paths):
    """The 99th percentile of opening a file and reading its first page, where the page cache has it and where not: each the
    median of some rounds."""
    files = [root / path for path in paths]
    rounds = {True: [], False: []}
    for drop in rounds:
        p99_s(files, False)
        rounds[drop] = [p99_s(files, drop) for _ in range(ROUNDS)]
    return Percentiles(statistics.median(rounds[False]), statistics.median(rounds[True]))


def p99_s(files, drop):
    taken = []
    for number in range(PROBES):
        path = files[number % len(files)]
        if drop:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        start = time.monotonic()
        file = os.open(path, os.O_RDONLY)
        os.pread(file, PROBE_BYTES, 0)
        os.close(file)
        taken.append(time.monotonic() - start)
    return statistics.quantiles(taken, n=100)[98]


class Background:
    """Shell commands that run during a block."""

    def __init__(self, commands):
        self.commands, self.processes = commands, []

    def __enter__(self):
        for command in self.commands:
            process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
            self.processes.append(process)
        time.sleep(1)
        return self

    def __exit__(self, *_):
        for process in self.processes:
            os.killpg(process.pid, 9)
        for process in self.processes:
            process.wait()


class Busy(Background):
    """Writers that keep the disk of a directory at work, past the page cache and through it. They get only what others leave
    of the cores: it is the disk that is busy."""

    def __init__(self, directory):
        self.files = [directory / f"busy-{number}" for number in range(3)]
        write = "while :; do chrt --idle 0 dd if=/dev/zero of={file} bs=4M count=64 {how}; done"
        how = ("oflag=direct", "oflag=direct", "conv=fsync")
        super().__init__([write.format(file=file, how=how) for file, how in zip(self.files, how)])

    def __exit__(self, *details):
        super().__exit__(*details)
        for file in self.files:
            file.unlink(missing_ok=True)


class Stuck(Background):
    """Readers of files that are not here."""

    def __init__(self, rootfs):
        super().__init__([f"cat {path} >/dev/null" for path in sorted((rootfs / "srv/small").iterdir())[:STUCK]])
