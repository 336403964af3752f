"""What scripts/bench measures of bringing data that nobody has read yet, and of not bringing what is here already: prefetching an
image, and going from one tag to the next."""

import os
import shlex

from bench_tools import MODES, TAG_TTL, best_in_turns, seconds, timed


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
    mount.empty()


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
