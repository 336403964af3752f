"""What an eStargz image's tables of contents say of where its files are stored: what scripts/bench compares fetched bytes with.
They are read from the registry, past the program that is measured."""

import io
import json
import re
import tarfile
import urllib.request

TOC_NAME = "stargz.index.json"
FOOTER_BYTES = 51
# In the footer: 16 hexadecimal digits of the TOC's offset, before this.
FOOTER_MAGIC = b"STARGZ"


def read_range(url, start, end):
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{end - 1}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


class Layer:
    """One layer: where its TOC begins, and where each chunk of its files is stored."""

    def __init__(self, url, blob_bytes):
        self.url, self.blob_bytes = url, blob_bytes
        footer = read_range(url, blob_bytes - FOOTER_BYTES, blob_bytes)
        self.toc_offset = int(footer[: footer.index(FOOTER_MAGIC)][-16:], 16)
        with tarfile.open(fileobj=io.BytesIO(read_range(url, self.toc_offset, blob_bytes - FOOTER_BYTES)), mode="r:gz") as tar:
            entries = json.load(tar.extractfile(TOC_NAME))["entries"]
        self.chunks = [entry | {"name": entry["name"].removeprefix("./")} for entry in entries
                       if entry["type"] in ("reg", "chunk") and entry.get("chunkDigest")]
        offsets = sorted({chunk.get("offset", 0) for chunk in self.chunks})
        self.ends = dict(zip(offsets, [*offsets[1:], self.toc_offset]))

    def of(self, path):
        """The chunks of a file."""
        return [chunk for chunk in self.chunks if chunk["name"] == path]

    def stored(self, chunks):
        """Bytes in the blob of what chunks are decoded from, each once."""
        offsets = {chunk.get("offset", 0) for chunk in chunks}
        return sum(self.ends[offset] - offset for offset in offsets)


class Tocs:
    """The TOCs of all layers of an image: `manifest`, and the addresses of its layers' blobs in the same order."""

    def __init__(self, manifest, urls):
        self.layers = [Layer(url, layer["size"]) for url, layer in zip(urls, manifest["layers"])]

    def toc_bytes(self):
        return sum(layer.blob_bytes - layer.toc_offset for layer in self.layers)

    def stored_at(self, path):
        """The blob that a file is in, and from where to where."""
        for layer in reversed(self.layers):
            if chunks := layer.of(path):
                offsets = [chunk.get("offset", 0) for chunk in chunks]
                return layer.url, min(offsets), layer.ends[max(offsets)]
        raise LookupError(path)

    def stored_bytes(self, path, places=None):
        """Bytes in its blob of a file: of all of it, or of the chunks in which `places` are."""
        for layer in reversed(self.layers):
            if chunks := layer.of(path):
                if places is not None:
                    within = lambda chunk, place: 0 <= place - chunk.get("chunkOffset", 0) < self.chunk_bytes(chunk, chunks)
                    chunks = [chunk for chunk in chunks if any(within(chunk, place) for place in places)]
                return layer.stored(chunks)
        raise LookupError(path)

    @staticmethod
    def chunk_bytes(chunk, chunks):
        # Of the last chunk none is given: it is the rest of the file.
        return chunk.get("chunkSize") or chunks[0]["size"] - chunk.get("chunkOffset", 0)

    def is_of_toc(self, request):
        """Whether a request asks for the end of a layer, where its TOC is."""
        last = int(request["range"].partition("-")[2] or -1)
        digest = re.search(r"[0-9a-f]{64}", request["uri"])[0]
        return any(digest in layer.url and last == layer.blob_bytes - 1 for layer in self.layers)

    def new_bytes(self, before):
        """What of this image is not in one before: the TOCs of new layers, and the chunks with new digests in them."""
        known = {chunk["chunkDigest"] for layer in before.layers for chunk in layer.chunks}
        urls = {layer.url for layer in before.layers}
        total = 0
        for layer in self.layers:
            if layer.url not in urls:
                new = [chunk for chunk in layer.chunks if chunk["chunkDigest"] not in known]
                total += layer.blob_bytes - layer.toc_offset + layer.stored(new)
        return total
