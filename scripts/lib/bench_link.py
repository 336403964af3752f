"""What scripts/bench measures over a link of 50 ms and 100 Mbit/s: a little of an image that is not in the cache, and a large
file of it. Times are beside what the same requests take when nothing else is done, or what the link carries at its rate."""

import os
import random
import re
import time

from bench_tools import MODES, TAG_TTL, in_sequence, ledger, seconds

ROUND_TRIP_MS, MBIT_PER_S = 50, 100
BYTES_PER_S = MBIT_PER_S * 1e6 / 8
LARGE_FILE, LARGE_RANGE_BYTES = "srv/large/data", 50_000_000
# Of 10 KB each, in different layers: the first read, one elsewhere.
FIRST, LATER = "etc/small/file-200.txt", "srv/small/file-100.txt"
RANDOM_READS, RANDOM_BYTES, SEED = 24, 4096, 1
KIB = 1024
# What each kind of request needs before it can be sent, as the number of its stage.
REFUSED, TOKEN, MANIFEST, TAIL, REDIRECTED_TAIL, MEMBER = range(6)


def stages(requests):
    """The requests of a first read, those that could be sent at once together: whatever the order they were sent in."""
    staged, seen = {}, set()
    for request in requests:
        blob = re.search(r"[0-9a-f]{64}", request["uri"].partition("?")[0])
        if request["server"] == "auth":
            stage = TOKEN
        elif "/manifests/" in request["uri"]:
            stage = REFUSED if request["status"] == 401 else MANIFEST
        elif (request["server"], blob and blob[0]) in seen:
            stage = MEMBER
        else:
            stage = REDIRECTED_TAIL if request["server"] == "blobs" else TAIL
            seen.add((request["server"], blob and blob[0]))
        staged.setdefault(stage, []).append({key: request[key] for key in ("port", "sent", "status")})
    return [staged[stage] for stage in sorted(staged)]


class FirstRead:
    """From nothing to one small file, and one elsewhere after it."""

    def __init__(self, bench, name, options, mount_options, registry=None):
        self.bench = bench
        self.line = bench.new_line(ROUND_TRIP_MS, MBIT_PER_S)
        self.mount = bench.new_mount(name, ["--plain-http", *options], self.line)
        self.options = f"{mount_options},{TAG_TTL}"
        self.mount.mount("-o", self.options)
        self.rootfs = bench.image(self.mount, bench.lab["LAB_LARGE"], registry) / "rootfs"
        self.first, self.first_s = self.read(FIRST)
        self.replayed_s = self.line.replay(stages(self.first))
        self.later, self.later_s = self.read(LATER)
        bench.say("\n".join(ledger(self.first + self.later)))

    def read(self, path):
        start = time.monotonic()
        (self.rootfs / path).read_bytes()
        elapsed = time.monotonic() - start
        return self.line.settled(), elapsed

    def rows(self, where, requests_goal, in_sequence_goal):
        row = self.bench.row
        row(f"cold, 3 layers, {where}: requests to 10 KB", len(self.first), goal=requests_goal)
        row("  the same: round trips in sequence", in_sequence(self.first), goal=in_sequence_goal)
        row("  the same: time / the same requests with nothing between", self.first_s, self.replayed_s, goal=1.2, unit="s")
        row("  10 KB elsewhere: requests", len(self.later), goal=1)
        row("  the same: round trips in sequence", in_sequence(self.later), goal=1)
        row("  the same: time / a round trip", self.later_s, ROUND_TRIP_MS / 1000, unit="s")

    def bytes_row(self, tocs):
        """What a small file costs beside its chunk."""
        fetched = sum(request["received"] for request in self.later)
        beside = fetched - tocs.stored_bytes(LATER)
        self.bench.row("  the same: KiB received beside its chunk", beside / KIB, goal=256, unit="KiB")


def first(bench):
    """A small file from nothing, one elsewhere, and a known image after a restart."""
    credential = f"{bench.lab['LAB_USER']}:{bench.lab['LAB_PASSWORD']}"
    for mode, option in MODES.items():
        near = FirstRead(bench, f"near-{mode}", [], option)
        near.rows(f"plain registry, {mode}", 5, 3)
        near.bytes_row(bench.tocs(bench.lab["LAB_LARGE"]))
        known(bench, near)
        # For its user alone: what is asked to know whether other users may see an image is counted apart.
        far = FirstRead(bench, f"far-{mode}", ["--credential", credential], f"{option},noallow_other",
                        bench.lab["LAB_TOKEN_REDIRECT"])
        far.rows(f"token and redirect, {mode}", None, 6)
        bench.row("  of these to the registry", sum(request["server"] != "blobs" for request in far.later), goal=0)
        far.mount.umount()
        if not bench.quick:
            others = FirstRead(bench, f"others-{mode}", ["--credential", credential], f"{option},allow_other",
                               bench.lab["LAB_TOKEN_REDIRECT"])
            bench.row("  the same for all users (allow_other): requests to 10 KB", len(others.first))
            bench.row("  the same: time / the same requests with nothing between", others.first_s, others.replayed_s, unit="s")
            others.mount.umount()


def known(bench, read):
    """An image that was read before, after a restart of the daemon."""
    mount, line = read.mount, read.line
    mount.umount()
    mount.mount("-o", read.options)
    start = time.monotonic()
    os.listdir(read.rootfs)
    listed = time.monotonic() - start
    (read.rootfs / FIRST).read_bytes()
    bench.row("  a known image after a restart: requests inside tag_ttl", len(line.settled()), goal=0)
    bench.row("  the same: first ls", listed * 1000, goal=10, unit="ms")
    mount.umount()
    mount.mount("-o", read.options.replace(TAG_TTL, "tag_ttl=1"))
    time.sleep(1.2)
    os.listdir(read.rootfs)
    (read.rootfs / FIRST).read_bytes()
    # The answer may come after the wait for it, but not its request.
    bench.row("  the same, tag_ttl over: requests", len(line.settled()), goal=1)
    mount.umount()


def listing(bench):
    """All of a tree listed, and nothing of its files."""
    for mode, option in MODES.items():
        line = bench.new_line()
        mount = bench.new_mount(f"listing-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        seconds("ls -lR", bench.rootfs(mount))
        requests = line.settled()
        tocs = bench.tocs(bench.reference)
        content = [request for request in requests if request["range"] and not tocs.is_of_toc(request)]
        bench.row(f"cold ls -lR, {mode}: requests for more than TOCs", len(content), goal=0)
        bench.row("  the same: requests", len(requests))
        received = sum(request["received"] for request in requests)
        bench.row("  the same: bytes received / TOCs as they are stored", received / 1e6, tocs.toc_bytes() / 1e6, unit="MB")
        bench.say("\n".join(ledger(requests)))
        mount.umount()


def large(bench):
    """A file of 200 MB, of which nothing is here: all, a range, and pages at random."""
    for mode, option in MODES.items():
        large_in(bench, mode, option)


def large_in(bench, mode, option):
    line = bench.new_line(ROUND_TRIP_MS, MBIT_PER_S)
    reference = bench.lab["LAB_LARGE"]
    mount = bench.new_mount(f"large-{mode}", ["--plain-http"], line)

    def opened():
        """The file, in an image whose tables of contents are here."""
        mount.empty()
        mount.mount("-o", f"{option},{TAG_TTL}")
        path = bench.image(mount, reference) / "rootfs" / LARGE_FILE
        size = path.stat().st_size
        line.settled()
        return path, size

    path, size = opened()
    start = time.monotonic()
    read_range(path, size // 2 - LARGE_RANGE_BYTES // 2, LARGE_RANGE_BYTES)
    elapsed = time.monotonic() - start
    received = sum(request["received"] for request in line.settled())
    bench.row(f"50 MB in the middle of a cold file of 200 MB, {mode}: received / them", received / 1e6,
              LARGE_RANGE_BYTES / 1e6, goal=1.1, unit="MB")
    bench.row("  the same: time / the link's rate", elapsed, LARGE_RANGE_BYTES / BYTES_PER_S, unit="s")
    mount.umount()

    path, size = opened()
    tocs = bench.tocs(reference)
    numbers = random.Random(SEED)
    places = [numbers.randrange(size // RANDOM_BYTES) * RANDOM_BYTES for _ in range(RANDOM_READS)]
    for place in places:
        read_range(path, place, RANDOM_BYTES)
    requests = line.settled()
    wanted = tocs.stored_bytes(LARGE_FILE, places)
    received = sum(request["received"] for request in requests)
    bench.row(f"{RANDOM_READS} reads of 4 KB at random in it, {mode}: received / their chunks", received / 1e6, wanted / 1e6,
              goal=1.01, unit="MB")
    mount.umount()

    path, size = opened()
    start = time.monotonic()
    read_range(path, 0, size)
    elapsed = time.monotonic() - start
    # 0.9 of the rate is 1 / 0.9 of the time.
    bench.row(f"200 MB in sequence, {mode} / the link's rate", elapsed, size / BYTES_PER_S, goal=1.11, unit="s")
    bench.row("  the same: requests", len(line.settled()))
    mount.discard()


def read_range(path, start, length):
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while length > 0:
            data = file.read(min(length, 1 << 17))
            if not data:
                raise EOFError(path)
            length -= len(data)
