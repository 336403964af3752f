#!/usr/bin/env python3
"""Pushes many small images to a registry, for measuring what a daemon that has seen them costs: 1,000 of one small plain layer
each, and 50 of the layers of another image with a small one of their own over them. Their tags are 0001, 0002 and so on."""

import argparse
import gzip
import hashlib
import http.client
import io
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

from build_originals import DEBIAN_ARCHITECTURES
from fixture_layers import MTIME
from oci_layout import CONFIG_TYPE, CREATED, LAYER_TYPE, MANIFEST_TYPE

SMALL, OVER = 1000, 50
FILES = 20
WORKERS = 4


def make_layer(name):
    """A gzip layer, and the digest of its tar."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(FILES):
            content = f"{name}: {number}\n".encode() * 10
            info = tarfile.TarInfo(f"etc/{name}/{number:02}.conf")
            info.size, info.mtime = len(content), MTIME
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(tar_bytes.getvalue(), mtime=0), digest(tar_bytes.getvalue())


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def described(data, media_type):
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


class Repository:
    """One connection to a repository of the registry."""

    def __init__(self, registry, name):
        self.connection, self.name = http.client.HTTPConnection(registry), name

    def ask(self, method, path, body=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status >= 400:
            sys.exit(f"{method} {path}: {answer.status} {content[:200]}")
        return answer, content

    def push_blob(self, data):
        answer, _ = self.ask("POST", f"/v2/{self.name}/blobs/uploads/")
        path = "/" + answer.headers["Location"].split("/", 3)[3]
        self.ask("PUT", f"{path}&digest={digest(data)}", data, Content_Type="application/octet-stream")

    def take_blob(self, name, other):
        self.ask("POST", f"/v2/{self.name}/blobs/uploads/?mount={name}&from={other}")

    def push_image(self, tag, layers, diff_ids):
        platform = {"architecture": DEBIAN_ARCHITECTURES[os.uname().machine], "os": "linux"}
        config = {"created": CREATED, **platform, "config": {"Labels": {"lab": f"{self.name}:{tag}"}},
                  "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        data = json.dumps(config).encode()
        self.push_blob(data)
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": described(data, CONFIG_TYPE), "layers": layers}
        self.ask("PUT", f"/v2/{self.name}/manifests/{tag}", json.dumps(manifest).encode(), Content_Type=MANIFEST_TYPE)

    def push_over(self, tag, layers=(), diff_ids=()):
        """An image with a layer of its own over others that are there already."""
        data, diff_id = make_layer(f"{self.name.rpartition('/')[2]}-{tag}")
        self.push_blob(data)
        self.push_image(tag, [*layers, described(data, LAYER_TYPE)], [*diff_ids, diff_id])


def push_all(registry, name, count, layers=(), diff_ids=()):
    def push(worker):
        repository = Repository(registry, name)
        for number in range(worker + 1, count + 1, WORKERS):
            repository.push_over(f"{number:04}", layers, diff_ids)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(push, range(WORKERS)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", required=True, metavar="HOST:PORT")
    parser.add_argument("--small", required=True, help="repository of the 1,000 images")
    parser.add_argument("--over", required=True, help="repository of the 50 images")
    parser.add_argument("--base", required=True, metavar="REPOSITORY:TAG", help="the image whose layers those have")
    arguments = parser.parse_args()
    push_all(arguments.registry, arguments.small, SMALL)

    name, _, tag = arguments.base.rpartition(":")
    base, over = Repository(arguments.registry, name), Repository(arguments.registry, arguments.over)
    manifest = json.loads(base.ask("GET", f"/v2/{name}/manifests/{tag}", Accept=MANIFEST_TYPE)[1])
    config = json.loads(base.ask("GET", f"/v2/{name}/blobs/{manifest['config']['digest']}")[1])
    for layer in manifest["layers"]:
        over.take_blob(layer["digest"], name)
    push_all(arguments.registry, arguments.over, OVER, manifest["layers"], config["rootfs"]["diff_ids"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
