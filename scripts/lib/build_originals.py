#!/usr/bin/env python3
"""Builds the OCI layout of the lab's original images: plain gzip layers, as builders write them.

Tags of the layout:
  debian-v1 debian-v2   a Debian root, a layer of wheels over it, and the fixture layers' cases
  app-1 app-2           the same cases on a small base, for quick tests
  multi                 an index of three platforms
"""

import argparse
import os
import sys
import tarfile
import tempfile

import fixture_layers
from fixture_layers import LayerTar
from oci_layout import Layout

WHEELS_TARGET = "usr/local/lib/python3.11/dist-packages"
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PLATFORMS = (
    {"architecture": "amd64", "os": "linux"},
    {"architecture": "arm64", "os": "linux", "variant": "v8"},
    {"architecture": "arm", "os": "linux", "variant": "v7"},
)


def write_wheels(tar, wheels_dir):
    """Adds an installed set of wheels, owned by root, in an order that does not change."""

    def normalised(info):
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = fixture_layers.MTIME
        return info

    for depth in range(1, WHEELS_TARGET.count("/") + 1):
        tar.directory("/".join(WHEELS_TARGET.split("/")[: depth + 1]))
    for name in sorted(os.listdir(wheels_dir)):
        # tarfile sorts the directories that it descends into.
        tar.tar.add(os.path.join(wheels_dir, name), f"{WHEELS_TARGET}/{name}", filter=normalised)


def write_small_base(tar, platform):
    """A root filesystem of a few files that names its platform."""
    tar.directory("./", 0o755, mtime=1_600_000_000)
    for name in ("bin", "etc", "usr", "usr/share"):
        tar.directory(name)
    # What Debian's root has, too, so that the fixture layers find the same to change.
    tar.directory("usr/share/doc")
    for name in ("usr/share/doc/git", "usr/share/doc/perl"):
        tar.directory(name)
        tar.file(f"{name}/README", "documentation\n")
    tar.directory("usr/share/git-core")
    tar.directory("usr/share/git-core/templates")
    tar.file("usr/share/git-core/templates/description", "Unnamed repository.\n")
    parts = (platform.get(key) for key in ("os", "architecture", "variant"))
    label = "/".join(part for part in parts if part)
    tar.file("etc/platform", f"{label}\n")
    tar.file("etc/os-release", "ID=lab\nPRETTY_NAME=\"Lab\"\n")
    tar.file("bin/hello", "#!/bin/sh\necho hello\n", 0o755)
    tar.file("usr/share/random", fixture_layers.noise(300_000, label))


class Builder:
    """Makes layers in a scratch directory and adds them to the layout."""

    def __init__(self, layout, scratch):
        self.layout = layout
        self.scratch = scratch

    def layer(self, write, *arguments):
        path = os.path.join(self.scratch, "layer.tar")
        with LayerTar(path) as tar:
            write(tar, *arguments)
        return self.layout.add_layer(path)

    def build(self, base_tar, wheels_dir):
        host = {"architecture": DEBIAN_ARCHITECTURES[os.uname().machine], "os": "linux"}
        base = self.layout.add_layer(base_tar)

        def wheels_over_lower(tar):
            fixture_layers.write_lower(tar)
            write_wheels(tar, wheels_dir)

        wheels = self.layer(wheels_over_lower)
        small_base = self.layer(write_small_base, host)
        lower = self.layer(fixture_layers.write_lower)
        for version in (1, 2):
            upper = self.layer(fixture_layers.write_upper, version)
            debian = self.layout.add_image([base, wheels, upper], host)
            self.layout.tag(debian, f"debian-v{version}")
            app = self.layout.add_image([small_base, lower, upper], host)
            self.layout.tag(app, f"app-{version}")

        platforms = []
        for platform in PLATFORMS:
            layer = self.layer(write_small_base, platform)
            platforms.append(self.layout.add_image([layer, lower], platform))
        self.layout.tag(self.layout.add_index(platforms), "multi")
        self.layout.finish()


def main():
    parser = argparse.ArgumentParser(description="Builds the lab's original images.")
    parser.add_argument("--base", required=True, help="tar of the Debian root filesystem")
    parser.add_argument("--wheels", required=True, help="directory of installed wheels")
    parser.add_argument("--out", required=True, help="directory of the layout to create")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(arguments.out)) as scratch:
        Builder(Layout(arguments.out), scratch).build(arguments.base, arguments.wheels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
