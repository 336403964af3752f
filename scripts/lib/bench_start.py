"""What scripts/bench measures of the daemon itself: how soon it is ready with many images in its cache, how soon one of them is
listed, and how much memory it takes."""

import os
import time

from bench_tools import MODES, TAG_TTL, Peak, seconds, timed

READY_MS, LISTED_MS, MEMORY_MB = 300, 10, 60
# Of the lab's images, tags 0001 and so on.
SEEN, SEEN_QUICK = 1000, 100
WALKED, WALKED_QUICK = 50, 15
# By then the daemon has what it keeps whatever it is shown.
SETTLED_AFTER = 10
# The daemon gives memory back once it has had nothing to do for a few seconds.
IDLE_S = 6


def tags_to(last):
    return [f"{number:04}" for number in range(1, last + 1)]


def start(bench):
    """A daemon that has seen many images."""
    tags = tags_to(SEEN_QUICK if bench.quick else SEEN)
    line = bench.new_line()
    mount = bench.new_mount("start", ["--plain-http"], line)
    # Visited without the kernel's superblocks, of which each would be made for nothing.
    mount.mount("-o", f"{MODES['FUSE']},{TAG_TTL}")
    repository = bench.image(mount, f"{bench.lab['LAB_THOUSAND']}:{tags[0]}").parent
    name = bench.lab["LAB_THOUSAND"].rpartition("/")[2]
    visited = timed(lambda: [os.listdir(repository / f"{name}:{tag}" / "rootfs") for tag in tags])
    bench.say(f"{len(tags)} images visited: {visited:.1f} s")
    mount.umount()
    line.settled()
    for mode, option in MODES.items():
        ready, listed = [], []
        for number in range(2 * bench.runs):
            ready.append(1000 * timed(lambda: mount.mount("-o", f"{option},{TAG_TTL}")))
            listed.append(1000 * timed(lambda: os.listdir(repository / f"{name}:{tags[number]}" / "rootfs")))
            mount.umount()
        bench.row(f"start with {len(tags)} images and tags, {mode}: ready", min(ready), goal=READY_MS, unit="ms")
        bench.row("  the same: ls of a known image's rootfs", min(listed), goal=LISTED_MS, unit="ms")
        bench.row("  the same: requests", len(line.settled()), goal=0)
    mount.discard()


def memory(bench):
    """An image of 200,000 files walked."""
    for mode, option in MODES.items():
        mount = bench.new_mount(f"many-{mode}")
        mount.mount("-o", f"{option},{TAG_TTL}")
        rootfs = bench.image(mount, bench.lab["LAB_MANY"]) / "rootfs"
        with Peak(mount.status()["daemon"]["pid"]) as peak:
            elapsed = seconds("find . -ls", rootfs)
        after = mount.rss_anon_mb()
        bench.say(f"cold walk of 200,000 files, {mode}: {elapsed:.2f} s")
        bench.row(f"200,000 files mounted and walked, {mode}: RssAnon", after, goal=MEMORY_MB, unit="MB")
        bench.row("  the same: the most while its index was read", peak.most_mb, goal=MEMORY_MB, unit="MB")
        mount.discard()


def walk(bench):
    """Images of the same large layers, each with one of its own."""
    tags = tags_to(WALKED_QUICK if bench.quick else WALKED)
    for mode, option in MODES.items():
        mount = bench.new_mount(f"walk-{mode}")
        mount.mount("-o", f"{option},{TAG_TTL}")
        held = []
        with Peak(mount.status()["daemon"]["pid"]) as peak:
            for number, tag in enumerate(tags, 1):
                seconds("find . -ls", bench.image(mount, f"{bench.lab['LAB_FIFTY']}:{tag}") / "rootfs")
                if number in (SETTLED_AFTER, len(tags)):
                    time.sleep(IDLE_S)
                    held.append(mount.rss_anon_mb())
        bench.row(f"{len(tags)} images walked, {mode}: RssAnon", held[-1], goal=MEMORY_MB, unit="MB")
        bench.row(f"  the same: / after {SETTLED_AFTER}", held[-1], held[0], goal=1.1, unit="MB")
        bench.row("  the same: the most meanwhile", peak.most_mb, goal=MEMORY_MB, unit="MB")
        mount.discard()
