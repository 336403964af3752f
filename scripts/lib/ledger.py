#!/usr/bin/env python3
"""Reads the lab's ledger: every request that nginx answered, and what the access logs of the plain and the TLS
registry say, which know neither ranges nor times below a second.

    ledger.py LOG_DIR mark                             a mark: what comes from now on
    ledger.py LOG_DIR requests [--since MARK] [--json] [SERVER…]

Requests are listed as they began. `ms` counts from the first.
"""

import argparse
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

DIRECT = ("plain", "tls")
COMBINED = re.compile(r'\S+ - \S* ?\[([^\]]+)\] "([A-Z]+) (\S+) [^"]*" ([0-9]+) ([0-9]+)')
KINDS = (
    ("token", r"/token/.*"),
    ("ping", r"/v2/?"),
    ("catalog", r"/v2/_catalog"),
    ("tags", r"/v2/.+/tags/list"),
    ("manifest", r"/v2/.+/manifests/[^/]+"),
    ("referrers", r"/v2/.+/referrers/[^/]+"),
    ("blob", r"/v2/.+/blobs/[^/]+|/blobs/.+|/docker/registry/v2/blobs/.+"),
)


def kind(path):
    return next((name for name, pattern in KINDS if re.fullmatch(pattern, path)), "other")


def logs(directory):
    named = {"ledger": directory / "ledger.jsonl"}
    return named | {name: directory / f"registry-{name}.log" for name in DIRECT}


def size(path):
    return path.stat().st_size if path.exists() else 0


def lines_since(path, offset):
    """The whole lines behind an offset. One that is beyond the end of the file is from before it was emptied."""
    if not path.exists():
        return []
    with path.open("rb") as log:
        log.seek(offset if offset <= size(path) else 0)
        return log.read().decode("utf-8", "replace").split("\n")[:-1]


def of_nginx(line):
    request = json.loads(line)
    request["begins"] = request["ends"] - request.pop("seconds")
    return request


def of_registry(server, line):
    if not (found := COMBINED.match(line)):
        return None
    time, method, uri, status, size = found.groups()
    ends = datetime.strptime(time, "%d/%b/%Y:%H:%M:%S %z").timestamp()
    return {"server": server, "begins": ends, "ends": ends, "method": method, "uri": uri,
            "status": int(status), "range": "", "bytes": int(size), "authorization": ""}


def requests(directory, mark, servers):
    found = []
    for name, path in logs(directory).items():
        for line in lines_since(path, mark.get(name, 0)):
            request = of_nginx(line) if name == "ledger" else of_registry(name, line)
            if request and request["server"] and (not servers or request["server"] in servers):
                url = urlsplit(request["uri"])
                # A signed query string is a secret, also here. What a mirror is asked for is none.
                shown = [part for part in url.query.split("&") if part.startswith(("ns=", "scope="))]
                request["path"] = unquote(url.path + "?" * bool(shown) + "&".join(shown))
                request["kind"] = kind(url.path)
                del request["uri"]
                found.append(request)
    return sorted(found, key=lambda request: request["begins"])


def table(found):
    head = ("ms", "server", "method", "kind", "status", "auth", "range", "bytes", "path")
    rows = [head]
    for request in found:
        begins = round((request["begins"] - found[0]["begins"]) * 1000)
        rows.append((str(begins), request["server"], request["method"], request["kind"], str(request["status"]),
                     request["authorization"] or "-", request["range"].removeprefix("bytes=") or "-",
                     str(request["bytes"]), request["path"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])))


def parse_mark(text):
    mark = {}
    for part in text.split(","):
        name, _, offset = part.partition("=")
        if not name or not offset.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is no mark")
        mark[name] = int(offset)
    return mark


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("mark")
    listing = commands.add_parser("requests")
    listing.add_argument("--since", type=parse_mark, default={}, metavar="MARK")
    listing.add_argument("--json", action="store_true")
    listing.add_argument("servers", nargs="*", metavar="SERVER")
    arguments = parser.parse_args()
    if arguments.command == "mark":
        print(",".join(f"{name}={size(path)}" for name, path in logs(arguments.logs).items()))
        return 0
    found = requests(arguments.logs, arguments.since, arguments.servers)
    if arguments.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
