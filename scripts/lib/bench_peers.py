"""What scripts/bench measures of peers that are installed, on the same image and beside the same things as our own rows."""

import base64
import os
import shutil
import subprocess
import time

from bench_tools import best_in_turns, seconds

# Of each layer, below the directory of an image.
CONTENT = "diff"
MOUNTED_WITHIN_S = 10
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"


def peers(bench):
    """stargz-store, where it is on the PATH."""
    if not shutil.which("stargz-store"):
        bench.table.note("stargz-store is not on the PATH, so no peer was measured.")
        return
    store = StargzStore(bench)
    commands = "; ".join(f"curl -fsS {blob} | gunzip" for blob in bench.blobs(bench.reference))

    def cold():
        store.stop()
        store.start()
        return seconds(store.tar(), "/")

    try:
        best, theirs = best_in_turns(bench.runs, cold, lambda: seconds(commands, bench.scratch))
        bench.row("stargz-store: cold tar of each layer / curl | gunzip of each layer", best, theirs, unit="s")
        best, theirs = best_in_turns(bench.runs, lambda: seconds(store.tar(), "/"), lambda: seconds("tar -cf - .", bench.ext4))
        bench.row("stargz-store: warm tar of each layer / tar of the root filesystem on ext4", best, theirs, unit="s")
        find = " ; ".join(f"find {layer} -ls" for layer in store.layers())
        best, theirs = best_in_turns(bench.runs, lambda: seconds(find, "/"), lambda: seconds("find . -ls", bench.ext4))
        bench.row("stargz-store: warm find -ls of each layer / of the root filesystem on ext4", best, theirs, unit="s")
    finally:
        store.stop()


class StargzStore:
    """One mount of it, with a root of its own."""

    def __init__(self, bench):
        self.bench, self.process = bench, None
        self.root, self.mountpoint = bench.scratch / "stargz-store", bench.scratch / "stargz-store-mnt"
        self.config = bench.scratch / "stargz-store.toml"
        # It would otherwise bring in the background what is measured, and wait for it.
        self.config.write_text("noprefetch = true\nno_background_fetch = true\n"
                               f'[[resolver.host."{bench.registry}".mirrors]]\nhost = "{bench.registry}"\ninsecure = true\n')

    def start(self):
        self.mountpoint.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            ["stargz-store", "--log-level=error", f"--config={self.config}", f"--root={self.root}", self.mountpoint],
            stdin=subprocess.DEVNULL)
        given_up_at = time.monotonic() + MOUNTED_WITHIN_S
        while not os.path.ismount(self.mountpoint):
            if time.monotonic() > given_up_at or self.process.poll() is not None:
                raise RuntimeError("stargz-store did not start")
            time.sleep(0.05)

    def stop(self):
        if self.process:
            subprocess.run(["umount", "-l", self.mountpoint], check=False)
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)
        self.process = None

    def layers(self):
        """Where the content of each layer is: a name for each image, and below it for each layer, by the digest of its TOC."""
        image = base64.b64encode(f"{self.bench.registry}/{self.bench.reference}".encode()).decode()
        digests = [layer["annotations"][TOC_DIGEST] for layer in self.bench.manifest(self.bench.reference)["layers"]]
        return [self.mountpoint / image / digest / CONTENT for digest in digests]

    def tar(self):
        return " && ".join(f"tar -cf - {layer}" for layer in self.layers())
