"""Writes an OCI image layout (image-spec 1.0) from tar files, byte for byte reproducibly."""

import gzip
import hashlib
import json
import os

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
REF_NAME = "org.opencontainers.image.ref.name"

CREATED = "2023-11-14T22:13:20Z"
COPY_BYTES = 1 << 20
GZIP_LEVEL = 6


class Layer:
    """A compressed layer: its descriptor and the digest of its uncompressed tar."""

    def __init__(self, descriptor, diff_id):
        self.descriptor = descriptor
        self.diff_id = diff_id


class Layout:
    """An image layout under construction; `finish` writes its index."""

    def __init__(self, root):
        self.root = root
        self.tagged = []
        os.makedirs(self._blob_dir(), exist_ok=True)

    def _blob_dir(self):
        return os.path.join(self.root, "blobs", "sha256")

    def _add_blob(self, data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        with open(os.path.join(self._blob_dir(), digest), "wb") as file:
            file.write(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def _add_json(self, value, media_type):
        return self._add_blob(json.dumps(value, indent=2).encode(), media_type)

    def add_layer(self, tar_path):
        """Compresses a tar as one plain gzip member, the form every builder knows."""
        temporary = os.path.join(self.root, "layer.tmp")
        diff_id = hashlib.sha256()
        with open(tar_path, "rb") as tar, open(temporary, "wb") as blob:
            # mtime 0 and no file name: the same tar always gives the same blob.
            with gzip.GzipFile("", "wb", GZIP_LEVEL, blob, mtime=0) as packed:
                while block := tar.read(COPY_BYTES):
                    diff_id.update(block)
                    packed.write(block)
        digest = hashlib.sha256()
        with open(temporary, "rb") as blob:
            while block := blob.read(COPY_BYTES):
                digest.update(block)
        size = os.path.getsize(temporary)
        os.rename(temporary, os.path.join(self._blob_dir(), digest.hexdigest()))
        descriptor = {
            "mediaType": LAYER_TYPE,
            "digest": f"sha256:{digest.hexdigest()}",
            "size": size,
        }
        return Layer(descriptor, f"sha256:{diff_id.hexdigest()}")

    def add_image(self, layers, platform):
        """Adds a manifest with its configuration and returns its descriptor."""
        config = {
            "created": CREATED,
            **platform,
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["sh"], "Labels": {"lab": "1"}},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": CREATED, "created_by": "scripts/lab"} for _ in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self._add_json(config, CONFIG_TYPE),
            "layers": [layer.descriptor for layer in layers],
        }
        return {**self._add_json(manifest, MANIFEST_TYPE), "platform": platform}

    def add_index(self, images):
        """Adds an image index over the descriptors that `add_image` gave."""
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": images}
        return self._add_json(index, INDEX_TYPE)

    def tag(self, descriptor, name):
        self.tagged.append({**descriptor, "annotations": {REF_NAME: name}})

    def finish(self):
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": self.tagged}
        for name, value in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", index),
        ):
            with open(os.path.join(self.root, name), "w", encoding="utf-8") as file:
                json.dump(value, file, indent=2)
