#!/usr/bin/env python3
"""Answers blob requests with URLs that expire, as registries on object storage do.

nginx asks it twice. For `/v2/REPOSITORY/blobs/DIGEST` it answers 307 to `BASE/blobs/sha256/HEX?expires=…&sig=…`, signed
with HMAC-SHA256 over path and time. For that URL it answers 403, or lets nginx send the blob (X-Accel-Redirect).

With the header `X-Lab-Opaque` the URL is `…?token=…` instead, which does not tell a client when it ends.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import time
from urllib.parse import parse_qs, urlsplit

from unix_http import Handler, Server

BLOB = re.compile(r"/v2/(?P<repository>[a-z0-9/._-]+)/blobs/sha256:(?P<hex>[0-9a-f]{64})")
SIGNED = re.compile(r"/blobs/sha256/(?P<hex>[0-9a-f]{64})")


class SignerHandler(Handler):
    def do_GET(self):
        url = urlsplit(self.path)
        if blob := BLOB.fullmatch(url.path):
            self.redirect(blob)
        elif blob := SIGNED.fullmatch(url.path):
            self.send_blob(url, blob["hex"])
        else:
            self.refuse(404, "UNSUPPORTED")

    do_HEAD = do_GET

    def refuse(self, status, code):
        self.answer(status, json.dumps({"errors": [{"code": code}]}).encode(), Content_Type="application/json")

    def signature(self, path, expires):
        return hmac.new(self.server.secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def redirect(self, blob):
        link = f"repositories/{blob['repository']}/_layers/sha256/{blob['hex']}/link"
        if ".." in link.split("/") or not os.path.isfile(os.path.join(self.server.storage, link)):
            self.refuse(404, "BLOB_UNKNOWN")
            return
        path = f"/blobs/sha256/{blob['hex']}"
        expires = str(int(time.time() + self.server.seconds))
        signature = self.signature(path, expires)
        query = f"expires={expires}&sig={signature}"
        if self.headers.get("X-Lab-Opaque"):
            query = "token=" + base64.urlsafe_b64encode(f"{expires}.{signature}".encode()).decode().rstrip("=")
        self.answer(307, Location=f"{self.server.base}{path}?{query}")

    def send_blob(self, url, blob):
        query = parse_qs(url.query)
        expires, signature = (query.get(name, [""])[0] for name in ("expires", "sig"))
        if token := query.get("token", [""])[0]:
            try:
                padded = token + "=" * (-len(token) % 4)
                expires, _, signature = base64.urlsafe_b64decode(padded).decode().partition(".")
            except ValueError:
                expires = ""
        right = hmac.compare_digest(signature.encode(), self.signature(url.path, expires).encode())
        # The second that is named is over when it begins, as with the registries' storages.
        if not right or int(expires) <= time.time():
            self.refuse(403, "DENIED")
            return
        self.answer(200, X_Accel_Redirect=f"/storage/blobs/sha256/{blob[:2]}/{blob}/data",
                    Content_Type="application/octet-stream")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--storage", required=True, help="docker/registry/v2 of the registry's storage")
    parser.add_argument("--base", required=True, help="scheme, host and port of the signed URLs")
    parser.add_argument("--seconds", type=float, required=True, help="how long a URL is good")
    arguments = parser.parse_args()
    server = Server(arguments.socket, SignerHandler)
    server.secret = secrets.token_bytes(32)
    server.storage, server.base, server.seconds = arguments.storage, arguments.base, arguments.seconds
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
