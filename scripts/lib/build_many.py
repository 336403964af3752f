#!/usr/bin/env python3
"""Builds the OCI layout of an image of 200,000 small files, for measuring what a walk of it costs in memory."""

import argparse
import os
import sys
import tempfile

from build_originals import DEBIAN_ARCHITECTURES
from fixture_layers import LayerTar
from oci_layout import Layout

# As deep and as wide as trees of packages are.
PACKAGES, DIRECTORIES, FILES = 100, 20, 100


def write(tar):
    tar.directory("srv")
    for package in range(PACKAGES):
        tar.directory(f"srv/package-{package:03}")
        for directory in range(DIRECTORIES):
            parent = f"srv/package-{package:03}/module_{directory:02}"
            tar.directory(parent)
            for number in range(FILES):
                name = f"{parent}/source_file_{number:02}.py"
                tar.file(name, f"# {name}\n" * (1 + number % 8))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="directory of the layout to create")
    arguments = parser.parse_args()
    layout = Layout(arguments.out)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(arguments.out)) as scratch:
        path = os.path.join(scratch, "layer.tar")
        with LayerTar(path) as tar:
            write(tar)
        layer = layout.add_layer(path)
    platform = {"architecture": DEBIAN_ARCHITECTURES[os.uname().machine], "os": "linux"}
    layout.tag(layout.add_image([layer], platform), "many")
    layout.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
