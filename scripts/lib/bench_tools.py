"""What scripts/bench measures with: mounts of its own, a slow line, timing in turns, the table. What is measured is in the
other bench_ files."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The modes in which a root filesystem is served, and how a mount asks for each.
MODES = {"kernel": "kernel=require", "FUSE": "kernel=off"}
# Longer than a measurement takes: whether a tag has moved is not to be among what is measured.
TAG_TTL = "tag_ttl=3600"
# How long after the last read something may still be asked for.
QUIET_S = 0.3
# Servers that are measured through a slow line, and their settings in the lab's environment.
LINE_SERVERS = {"plain": "LAB_PLAIN", "token-redirect": "LAB_TOKEN_REDIRECT", "auth": "LAB_AUTH", "blobs": "LAB_BLOBS"}


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


def output(*command):
    return run(*command, stdout=subprocess.PIPE, text=True).stdout


def lab_environment(*images):
    """The lab's settings; it is started, and its images are built, those that `images` names too, if they are not there."""
    run(ROOT / "scripts/lab", "up")
    for command in images:
        run(ROOT / "scripts/lab", command)
    lines = output("bash", "-c", f'eval "$({ROOT}/scripts/lab env)"; env')
    return {k: v for k, _, v in (line.partition("=") for line in lines.splitlines()) if k.startswith("LAB_")}


def seconds(command, directory):
    """How long a shell command takes in a directory, its output thrown away through a pipe as tar wants it.

    The directory is entered by descriptor, so that the walk to it is not part of what is measured.
    """
    inside = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        start = time.monotonic()
        command = f"set -o pipefail; {{ {command} ; }} | cat >/dev/null"
        run("bash", "-c", command, pass_fds=(inside,), preexec_fn=lambda: os.fchdir(inside))
        return time.monotonic() - start
    finally:
        os.close(inside)


def timed(action):
    """How long a call takes, in seconds."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def drop_caches():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def best_in_turns(times, *sides):
    """The best of `times` runs of each, one after the other, so that what else the machine does meets all."""
    rounds = [[side() for side in sides] for _ in range(times)]
    return tuple(min(side) for side in zip(*rounds))


class Line:
    """A slow line to the lab for one mount: see slow_line.py."""

    def __init__(self, lab, round_trip_ms=0, mbit_per_s=0):
        self.names = {int(lab[variable].rpartition(":")[2]): name for name, variable in LINE_SERVERS.items()}
        command = ["/usr/bin/python3", ROOT / "scripts/lib/slow_line.py", f"--round-trip-ms={round_trip_ms}",
                   f"--mbit-per-s={mbit_per_s}", *map(str, self.names)]
        # In a session of its own, so that Ctrl-C reaches it only when its input ends.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True)
        self.namespace = self.process.stdout.readline().strip()
        if not self.namespace:
            raise RuntimeError("the slow line did not start")

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def take(self):
        """The requests since the last call, each with the name of its server."""
        requests = [request for request in json.loads(self.ask("requests")) if request["method"] != "-"]
        self.ask("clear")
        for request in requests:
            request["server"] = self.names[request["port"]]
        return requests

    def settled(self):
        """The requests since the last call, once no more come and nothing more is received."""
        seen = None
        while (now := self.ask("requests")) != seen:
            seen = now
            time.sleep(QUIET_S)
        return self.take()

    def hang(self, server):
        """From now on nothing gets through to a server, and nothing says so."""
        self.ask(f"hang {next(port for port, name in self.names.items() if name == server)}")

    def replay(self, stages):
        """What sending requests again takes over the line, those of one stage at once: see replay.py."""
        command = ["nsenter", f"--net={self.namespace}", "/usr/bin/python3", ROOT / "scripts/lib/replay.py"]
        result = json.loads(run(*command, input=json.dumps(stages), stdout=subprocess.PIPE, text=True).stdout)
        self.take()
        expected = sorted(request["status"] for stage in stages for request in stage)
        if result["statuses"] != expected:
            raise RuntimeError(f"sent again, the answers were {result['statuses']}, not {expected}")
        return result["seconds"]


def in_sequence(requests):
    """How many requests waited for each other: the most that can be put in a row without an overlap."""
    free_at, count = float("-inf"), 0
    for request in sorted(requests, key=lambda request: request["ends"] or float("inf")):
        if request["begins"] >= free_at:
            free_at, count = request["ends"] or float("inf"), count + 1
    return count


def ledger(requests):
    """Requests in words, as they began."""
    first = requests[0]["begins"] if requests else 0
    return [f"{(request['begins'] - first) * 1000:7.0f} ms  {request['server']:15} {request['status']}  "
            f"{request['authorization'] or '-':7} {request['range'] or '-':22} {request['uri'].partition('?')[0]}"
            for request in requests]


def asked_twice(requests):
    """Bytes of one blob that were asked for, and how many of them more than once."""
    ranges = sorted(tuple(map(int, request["range"].split("-"))) for request in requests if request["range"])
    asked = twice = covered_to = 0
    for start, last in ranges:
        asked += last + 1 - start
        twice += max(0, min(covered_to, last + 1) - start)
        covered_to = max(covered_to, last + 1)
    return asked, twice


class Mount:
    """A mountpoint with a cache of its own, behind a line if one is given."""

    def __init__(self, binary, scratch, name, options=(), line=None):
        self.mountpoint = scratch / f"{name}-mnt"
        self.mountpoint.mkdir()
        self.cache = scratch / f"{name}-cache"
        enter = ["nsenter", f"--net={line.namespace}"] if line else []
        self.program = [*enter, binary, "--cache-dir", self.cache, *options]
        self.mounted = False

    def command(self, *arguments):
        return output(*self.program, *arguments)

    def mount(self, *options):
        self.command("mount", *options, str(self.mountpoint))
        self.mounted = True

    def umount(self):
        self.command("umount", str(self.mountpoint))
        self.mounted = False

    def discard(self):
        if self.mounted and subprocess.run([*self.program, "umount", self.mountpoint], check=False).returncode != 0:
            subprocess.run(["umount", "-l", self.mountpoint], check=False)
        self.mounted = False
        self.empty()
        if self.mountpoint.exists():
            self.mountpoint.rmdir()

    def empty(self):
        shutil.rmtree(self.cache, ignore_errors=True)

    def status(self):
        return json.loads(self.command("status", "--format", "json"))

    def rss_anon_mb(self):
        with open(f"/proc/{self.status()['daemon']['pid']}/status", encoding="ascii") as status:
            return rss_anon_mb(status)

    @staticmethod
    def counted(status):
        """Requests of the mount that the daemon has answered, by name.

        Left out: statfs, which `find` and `grep` ask for once and no kernel caches; lseek, whose first refusal ends all;
        and forget, by which the kernel makes room.
        """
        counted = {name: count for name, count in status["mounts"][0]["requests"].items()
                   if name not in ("statfs", "lseek", "forget")}
        # Those of the kernel's EROFS for data.
        counted["device read"] = status.get("kernel", {}).get("device_requests", {}).get("read", 0)
        return counted

    def answered(self):
        """Requests that the daemon has answered, by name."""
        return self.counted(self.status())

    def reached(self):
        """Requests that the daemon has answered, and bytes that it has fetched."""
        status = self.status()
        return sum(self.counted(status).values()), sum(host["bytes"] for host in status["hosts"])


def rss_anon_mb(status):
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


class Peak:
    """The most anonymous memory that a daemon was seen to hold while a block ran."""

    def __init__(self, pid):
        self.pid, self.most_mb, self.over = pid, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.over.wait(0.005):
            with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
                self.most_mb = max(self.most_mb, rss_anon_mb(status))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


class Table:
    def __init__(self, say):
        self.rows, self.notes = [], []
        self.say = say

    def note(self, text):
        """A line below the table."""
        self.notes.append(text)

    def row(self, name, ours, theirs=None, goal=None, unit=""):
        """A row: a ratio to `theirs` if there is one, else our figure, judged by `goal` if the design has one."""
        ratio = ours / theirs if theirs else None
        judged = ours if ratio is None else ratio
        met = "" if goal is None else "yes" if judged <= goal else "NO"
        shown = lambda value: f"{value:.3f} {unit}" if unit == "s" else f"{value:.1f} {unit}" if unit else f"{value}"
        row = (name, shown(ours), shown(theirs) if theirs else "", f"{ratio:.2f}" if ratio else "",
               "" if goal is None else str(goal), met)
        self.rows.append(row)
        self.say("  ".join(row))

    def print(self):
        print_table(("what", "registryfs", "compared with", "ratio", "goal", "met"), self.rows)
        print(*("", *self.notes), sep="\n")


def print_table(head, rows):
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, tuple("-" * width for width in widths), *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def machine(lab, scratch, binary):
    """What the figures depend on, in a few lines."""
    cpu = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo", encoding="ascii", errors="replace")
                if line.startswith("model name")), "unknown processor")
    memory_kib = int(next(line for line in open("/proc/meminfo", encoding="ascii")).split()[1])
    filesystem = lambda path: output("findmnt", "-no", "FSTYPE", "-T", path).strip()
    load = os.getloadavg()[0]
    busy = ", so others were at work and times mean little" if load > os.cpu_count() else ""
    return [
        f"{output(binary, '--version').strip()}; Linux {os.uname().release}; {os.cpu_count()} x {cpu}; "
        f"{memory_kib / (1 << 20):.0f} GiB",
        f"cache on {filesystem(scratch)}, compared with the same tree on {filesystem(lab['LAB_UNPACKED'])}; "
        f"load before: {load:.1f}{busy}",
    ]


def new_scratch():
    return Path(tempfile.mkdtemp(prefix="registryfs-bench."))
