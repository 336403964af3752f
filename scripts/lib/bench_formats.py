"""What scripts/bench --formats measures: one image in every format, and what reading it asks for."""

import hashlib
import json
import sys

from bench_tools import TAG_TTL, drop_caches, print_table, seconds, timed

# Small, and in the first layer.
SMALL = "etc/debian_version"
LISTING = f"ls -lR . && cat {SMALL}"
HEAD = ("format", "compressed", "index", "cold: requests", "MB", "in s", "after a restart: requests", "MB",
        "file evicted: requests", "KB")


def asked(requests):
    """Requests, and bytes of their answers, heads included."""
    return len(requests), sum(request["received"] for request in requests)


class Formats:
    """Measurements of `lab/formats`. `bench` makes its mounts and lines."""

    def __init__(self, bench, tags):
        self.bench, self.tags = bench, tags
        self.registry, self.repository = bench.registry, bench.lab["LAB_FORMATS"]
        self.unpacked = hashlib.sha256((bench.ext4 / SMALL).read_bytes()).digest()
        self.rows = []

    def reference(self, tag):
        return f"{self.registry}/{self.repository}:{tag}"

    def rootfs(self, mount, tag):
        return mount.mountpoint / self.registry / f"{self.repository}:{tag}" / "rootfs"

    def listing(self, mount, line, tag):
        """What listing everything and reading a small file asks for, and how long it takes."""
        # With the walk to the directory, which brings the index.
        elapsed = timed(lambda: seconds(LISTING, self.rootfs(mount, tag)))
        return (*asked(line.settled()), elapsed)

    def format(self, tag):
        """One row of the table of requests."""
        line = self.bench.new_line()
        mount = self.bench.new_mount(f"format-{tag}", ["--plain-http"], line)
        mount.mount("-o", TAG_TTL)
        cold, cold_bytes, elapsed = self.listing(mount, line, tag)
        info = json.loads(mount.command("info", self.reference(tag), "--format", "json"))["layers"]
        mount.umount()
        mount.mount("-o", TAG_TTL)
        line.take()
        again, again_bytes, _ = self.listing(mount, line, tag)
        mount.command("cache", "evict", self.reference(tag), "/" + SMALL)
        drop_caches()
        read = (self.rootfs(mount, tag) / SMALL).read_bytes()
        evicted, evicted_bytes = asked(line.settled())
        if hashlib.sha256(read).digest() != self.unpacked:
            sys.exit(f"scripts/bench: {tag}: {SMALL} is not what was unpacked")
        mount.umount()
        compressed, index = (sum(layer[key] for layer in info) for key in ("blob_bytes", "index_bytes"))
        row = (tag, f"{compressed / 1e6:.1f} MB", f"{index / 1e6:.1f} MB", str(cold), f"{cold_bytes / 1e6:.2f}",
               f"{elapsed:.1f}", str(again), f"{again_bytes / 1e6:.2f}", str(evicted), f"{evicted_bytes / 1e3:.1f}")
        self.rows.append(row)
        self.bench.say("  ".join(row))

    def measure(self):
        for tag in self.tags:
            self.format(tag)

    def print(self):
        print_table(HEAD, self.rows)
        print()
