"""What scripts/bench measures of images that are all in the cache, in both modes beside the same trees on ext4: how long
commands take that read them again, whether anything of that reached the daemon, and the same once the page cache was
dropped."""

import os
import time

from bench_tools import MODES, TAG_TTL, best_in_turns, drop_caches, seconds

ALL = "tar -cf - ."
# What is run in a root filesystem, and the goal in each mode, as a multiple of what ext4 takes.
COMMANDS = {
    "find -ls": ("find . -ls", {"kernel": 1.1, "FUSE": 1.1}),
    "tar": (ALL, {"kernel": 1.1, "FUSE": 1.1}),
    "grep -r in usr": ("grep -r registryfs-bench usr || true", {"kernel": 1.1, "FUSE": 1.1}),
    # Asks for attributes that no kernel caches for FUSE.
    "ls -lR": ("ls -lR", {"kernel": 1.1, "FUSE": 6}),
    "chroot, python3 -c 'import numpy'": ("chroot . /usr/bin/python3 -B -c 'import numpy'", {"kernel": 1.1, "FUSE": 1.1}),
}
# Two images compared, as the tools' users do, by paths through the tree. Both tools end with 1 where there are differences.
# git refuses devices, so it gets a part.
COMPARISONS = {
    "diff -r of two images": "diff -r --no-dereference {a} {b} || test $? = 1",
    "git diff --no-index of their usr": "git diff --no-index {a}/usr {b}/usr || test $? = 1",
}
DROPPED_GOALS = {"kernel": 0.6, "FUSE": 1.0}
# These runs are short, and what the kernel drops now and then meets one of them rather than all.
ROUNDS = 3
# The daemon gives memory back once it has had nothing to do for a few seconds.
IDLE_S = 6


class Counted:
    """Calls of `timed`, each with what reached the daemon meanwhile, by name."""

    def __init__(self, mount, timed):
        self.mount, self.timed, self.reached = mount, timed, []

    def __call__(self):
        before = self.mount.answered()
        elapsed = self.timed()
        after = self.mount.answered()
        self.reached.append({name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)})
        return elapsed


class Warm:
    """Both modes, each with all of two images in its cache."""

    def __init__(self, bench):
        self.bench, self.held = bench, []
        self.mounts = {mode: self.filled(mode) for mode in MODES}
        for directory in (bench.ext4, bench.unpacked / bench.other_tag):
            seconds(ALL, directory)

    def filled(self, mode):
        mount = self.bench.new_mount(f"warm-{mode}")
        mount.mount("-o", f"{MODES[mode]},{TAG_TTL}")
        self.read_all(mount)
        # Once more: complete layers are shown to the kernel as local files from the next mount on.
        mount.umount()
        mount.mount("-o", f"{MODES[mode]},{TAG_TTL}")
        self.read_all(mount)
        return mount

    def read_all(self, mount):
        for tag in (self.bench.tag, self.bench.other_tag):
            seconds(ALL, self.bench.rootfs(mount, tag=tag))

    def measure(self):
        for name, (command, goals) in COMMANDS.items():
            self.compare(name, goals, self.inside(command))
        for name, command in COMPARISONS.items():
            self.compare(name, {mode: 1.1 for mode in MODES}, self.beside(command))
        time.sleep(IDLE_S)
        for mode, mount in self.mounts.items():
            self.bench.row(f"RssAnon after all that, {mode}", mount.rss_anon_mb(), goal=60, unit="MB")

    def inside(self, command):
        """Runs a command in a root filesystem that is held open, so that each run enters it without a lookup by name."""
        def run(mount):
            self.held.append(os.open(self.bench.rootfs(mount) if mount else self.bench.ext4, os.O_PATH | os.O_DIRECTORY))
            here = f"/proc/{os.getpid()}/fd/{self.held[-1]}"
            return lambda: seconds(command, here)

        return run

    def beside(self, command):
        bench = self.bench

        def run(mount):
            if mount is None:
                return lambda: seconds(command.format(a=bench.tag, b=bench.other_tag), bench.unpacked)
            a, b = (bench.rootfs(mount, tag=tag) for tag in (bench.tag, bench.other_tag))
            directory = a.parent.parent
            paths = {"a": a.relative_to(directory), "b": b.relative_to(directory)}
            return lambda: seconds(command.format(**paths), directory)

        return run

    def compare(self, name, goals, run):
        """One command in both modes and on ext4. `run` makes of a mount, or of None for ext4, what runs it."""
        sides = {mode: Counted(mount, run(mount)) for mode, mount in self.mounts.items()}
        ext4 = run(None)
        for side in (*sides.values(), ext4):
            side()
        for side in sides.values():
            side.reached.clear()
        *ours, theirs = best_in_turns(ROUNDS, *sides.values(), ext4)
        for (mode, side), best in zip(sides.items(), ours):
            self.bench.row(f"warm {name}, {mode} / ext4", best, theirs, goal=goals[mode], unit="s")
            # The least, like the times: a kernel that needs memory drops pages, which are then asked for again.
            if goals[mode] == 1.1:
                least = min(side.reached, key=lambda requests: sum(requests.values()))
                self.bench.say(f"{name}, {mode}, what reached the daemon in each run: {side.reached}")
                self.bench.row("  the same: requests that reached the daemon", sum(least.values()), goal=0)
        while self.held:
            os.close(self.held.pop())

    def dropped(self):
        """All read once more with an empty page cache."""
        def after_drop(directory):
            drop_caches()
            return seconds(ALL, directory)

        directories = [*(self.bench.rootfs(mount) for mount in self.mounts.values()), self.bench.ext4]
        sides = [lambda directory=directory: after_drop(directory) for directory in directories]
        *ours, theirs = best_in_turns(self.bench.runs, *sides)
        for mode, best in zip(self.mounts, ours):
            self.bench.row(f"tar after drop_caches, {mode}, all in our cache / ext4", best, theirs,
                           goal=DROPPED_GOALS[mode], unit="s")


def warm(bench):
    """Commands on what is in the page cache; all of an image that is in our cache, after drop_caches."""
    both = Warm(bench)
    both.measure()
    both.dropped()
