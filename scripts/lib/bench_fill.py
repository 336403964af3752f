"""What scripts/bench measures of bringing data that nobody has read yet, and of not bringing what is here already: prefetching an
image, what readers feel of its rest being brought behind them, and going from one tag to the next."""

import os
import shlex
import statistics
import time

from bench_link import MBIT_PER_S, ROUND_TRIP_MS
from bench_tools import MODES, TAG_TTL, best_in_turns, seconds, timed

# Reads in the foreground, one after the other with pauses, of files that the rest does not reach meanwhile: of the upper layers.
READS, PAUSE_S, READ_BYTES = 20, 0.1, (10_000, 50_000)


def prefetch(bench):
    """All of an image brought by command, beside its layers fetched and decompressed by as many processes as there are cores."""
    mount = bench.new_mount("prefetch")
    blobs = " ".join(map(shlex.quote, bench.blobs(bench.reference)))
    pull = f"printf '%s\\n' {blobs} | xargs -P {os.cpu_count()} -I BLOB sh -c 'curl -fsS BLOB | gunzip >/dev/null'"

    def ours():
        mount.empty()
        return timed(lambda: mount.command("prefetch", f"{bench.registry}/{bench.reference}"))

    best, theirs = best_in_turns(bench.runs, ours, lambda: seconds(pull, bench.scratch))
    bench.row("prefetch of an image / curl | gunzip of its layers at once", best, theirs, goal=1.0, unit="s")


def background(bench):
    """Small cold files read over the slow link while the rest of the image is brought, and while it is not."""
    layer = bench.tocs(bench.reference).layers[1]
    found = [chunk["name"] for chunk in layer.chunks if READ_BYTES[0] <= chunk.get("size", 0) <= READ_BYTES[1]]
    paths = found[:: len(found) // READS][:READS]
    for mode, option in MODES.items():
        alone, beside = (read_beside(bench, f"{setting}-{mode}", f"{option},background={setting}", paths)
                         for setting in ("off", "full"))
        bench.row(f"a small cold file over the link, the rest being brought, {mode} / background=off, median",
                  statistics.median(beside), statistics.median(alone), goal=1.2, unit="s")
        bench.row("  the same: the slowest", max(beside), max(alone), unit="s")


def read_beside(bench, name, options, paths):
    """How long each of some reads takes, on a mount with these options."""
    line = bench.new_line(ROUND_TRIP_MS, MBIT_PER_S)
    mount = bench.new_mount(name, ["--plain-http"], line)
    mount.mount("-o", f"{options},{TAG_TTL}")
    rootfs = bench.rootfs(mount)
    os.listdir(rootfs)
    time.sleep(1)
    taken = []
    for path in paths:
        taken.append(timed((rootfs / path).read_bytes))
        time.sleep(PAUSE_S)
    received = sum(request["received"] for request in line.take())
    bench.say(f"{name}: {received / 1e6:.1f} MB received meanwhile")
    mount.discard()
    return taken


def upgrade(bench):
    """All of an image read, then all of it as it is with one package more."""
    before, after = bench.tocs(bench.reference), bench.tocs(bench.lab["LAB_UPGRADED"])
    for mode, option in MODES.items():
        line = bench.new_line()
        mount = bench.new_mount(f"upgrade-{mode}", ["--plain-http"], line)
        mount.mount("-o", f"{option},{TAG_TTL}")
        seconds("tar -cf - .", bench.rootfs(mount))
        line.settled()
        elapsed = seconds("tar -cf - rootfs", bench.image(mount, bench.lab["LAB_UPGRADED"]))
        requests = line.settled()
        received = sum(request["received"] for request in requests)
        bench.row(f"one package more, {mode}: bytes received / the difference", received / 1e6, after.new_bytes(before) / 1e6,
                  goal=1.1, unit="MB")
        bench.row("  the same: requests", len(requests))
        bench.say(f"tar of the image with one package more, {mode}: {elapsed:.2f} s")
        mount.discard()
