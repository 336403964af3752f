#!/usr/bin/env python3
"""Builds the OCI layout of an image that is another one over a new base: the other's first layer is left out, its further
ones stay as they are, as a build with a warm cache leaves them."""

import argparse
import json
import os
import shutil
import sys

from oci_layout import Layer, Layout, REF_NAME


def blob_path(layout, digest):
    return os.path.join(layout, "blobs", *digest.split(":"))


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="tar of the new base")
    parser.add_argument("--image", required=True, metavar="LAYOUT:TAG", help="the image whose further layers are used")
    parser.add_argument("--out", required=True, help="directory of the layout to create, whose tag is `upgraded`")
    arguments = parser.parse_args()
    source, _, tag = arguments.image.rpartition(":")
    tagged = read_json(os.path.join(source, "index.json"))["manifests"]
    descriptor = next(entry for entry in tagged if entry["annotations"][REF_NAME] == tag)
    manifest = read_json(blob_path(source, descriptor["digest"]))
    diff_ids = read_json(blob_path(source, manifest["config"]["digest"]))["rootfs"]["diff_ids"]

    layout = Layout(arguments.out)
    layers = [layout.add_layer(arguments.base)]
    for layer, diff_id in list(zip(manifest["layers"], diff_ids))[1:]:
        shutil.copyfile(blob_path(source, layer["digest"]), blob_path(arguments.out, layer["digest"]))
        layers.append(Layer(layer, diff_id))
    layout.tag(layout.add_image(layers, descriptor["platform"]), "upgraded")
    layout.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
