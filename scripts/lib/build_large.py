#!/usr/bin/env python3
"""Builds the OCI layout of an image with one large file that does not compress, and small files in other layers, for
measuring reads of a part of it and of single small files over a slow link."""

import argparse
import os
import sys
import tempfile

from build_originals import DEBIAN_ARCHITECTURES
from fixture_layers import LayerTar, noise
from oci_layout import Layout

LARGE_BYTES = 200_000_000
# A file of each layer, read as the first one or as one elsewhere. Text as of packages, so that it compresses as theirs does.
SMALL_BYTES = 10_000
# As many neighbours as make a layer's table of contents and its blob those of a layer of packages, not of one file.
NEIGHBOURS = 400


def text(name, size):
    """Lines that differ, so that they compress about three times."""
    lines, length, number = [], 0, 0
    while length < size:
        lines.append(f"{number}: {name} {noise(8, f'{name} {number}').hex()}\n")
        length += len(lines[-1])
        number += 1
    return "".join(lines)[:size]


def write_neighbours(tar, parent):
    tar.directory(parent)
    for number in range(NEIGHBOURS):
        name = f"{parent}/file-{number:03}.txt"
        tar.file(name, text(name, SMALL_BYTES))


def write_first(tar):
    tar.directory("./")
    for name in ("etc", "srv"):
        tar.directory(name)
    tar.file("etc/os-release", "ID=lab\nPRETTY_NAME=\"Lab, large\"\n")
    write_neighbours(tar, "etc/small")


def write_second(tar):
    tar.directory("srv/large")
    tar.file("srv/large/data", noise(LARGE_BYTES, "large"))


def write_third(tar):
    write_neighbours(tar, "srv/small")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="directory of the layout to create")
    arguments = parser.parse_args()
    layout = Layout(arguments.out)
    layers = []
    with tempfile.TemporaryDirectory(dir=os.path.dirname(arguments.out)) as scratch:
        path = os.path.join(scratch, "layer.tar")
        for write in (write_first, write_second, write_third):
            with LayerTar(path) as tar:
                write(tar)
            layers.append(layout.add_layer(path))
    platform = {"architecture": DEBIAN_ARCHITECTURES[os.uname().machine], "os": "linux"}
    layout.tag(layout.add_image(layers, platform), "large")
    layout.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
