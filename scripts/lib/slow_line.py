#!/usr/bin/env python3
"""A slow line to servers on loopback, for one client: a network namespace in which the same ports lead to the same
servers, over one link with a round trip and a rate, and all requests are written down. Nothing else on the machine
notices.

    slow_line.py [--round-trip-ms MS] [--mbit-per-s RATE] PORT…

Prints the path of the namespace (for `nsenter --net=PATH COMMAND`). Then, for each line on standard input: `requests`
prints the requests so far as one line of JSON; `clear` forgets them; `refuse PORT` ends all connections to a port, which
from then on refuses more, as if its server had died; `hang PORT` lets nothing more through to it, as if it were lost.
All but the first answer an empty line. Ends with its input. Needs root.

How the link is made of two connections that know no delay: what is sent takes its turn on the link, one for each
direction, for as long as its bytes take at the rate, and arrives half a round trip later. A connection lets its first bytes
through a round trip after it was made, which is when a client on a real link could send them. There are no losses, and no
slow start: a link that is as good as it can be. Only plain HTTP/1.1 is read; what is not is carried all the same, and listed
as method `-`.
"""

import argparse
import asyncio
import ctypes
import fcntl
import json
import os
import re
import socket
import struct
import sys
import threading
import time

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
BACKLOG = 1024
# With a rate, small enough that connections take turns.
READ_BYTES, RATED_READ_BYTES = 1 << 18, 1 << 14
# What may be on its way in one direction of a connection, in pieces: as a receive window, more than the link needs.
WINDOW_PIECES = 256
# Timers are about as late as this; who is late by less than it has not left the link idle.
TIMER_S = 0.004
REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r\n")
RANGE = re.compile(rb"\r\nrange: *bytes=([^\r]*)\r\n", re.IGNORECASE)
AUTHORIZATION = re.compile(rb"\r\nauthorization: *([a-z]+) ", re.IGNORECASE)


def set_up_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def listen_elsewhere(ports):
    """A new network namespace as an open file, and sockets that listen in it.

    A thread enters the namespace and ends; the sockets stay there. This process stays where the servers are.
    """
    result = []

    def enter():
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
            set_up_loopback()
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            sockets = [socket.create_server(("127.0.0.1", port), backlog=BACKLOG) for port in ports]
            result.append((namespace, sockets))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        sys.exit(f"slow_line: {result[0]}")
    return result[0]


async def sleep_until(when):
    # A wait of nothing would still let all others run first.
    if (left := when - time.monotonic()) > 0:
        await asyncio.sleep(left)


class Direction:
    """One direction of the link, which all connections share."""

    def __init__(self, bytes_per_s):
        self.bytes_per_s = bytes_per_s
        self.free_at = 0.0

    def sent_at(self, size):
        """When the last of `size` bytes has left, if they are put behind all that is in the queue."""
        now = time.monotonic()
        if not self.bytes_per_s:
            return now
        idle_since = self.free_at if now - self.free_at < TIMER_S else now
        self.free_at = max(self.free_at, idle_since) + size / self.bytes_per_s
        return self.free_at


class Line:
    def __init__(self, round_trip_s, bytes_per_s):
        self.round_trip_s = round_trip_s
        self.read_bytes = RATED_READ_BYTES if bytes_per_s else READ_BYTES
        self.up, self.down = Direction(bytes_per_s), Direction(bytes_per_s)
        self.requests = []
        # By port.
        self.servers, self.connections, self.through = {}, {}, {}

    def begin(self, port, head):
        """Writes down what begins with `head`; None if it goes on with what came before."""
        if not (found := REQUEST.match(head)):
            return None
        searched = {"range": RANGE.search(head), "authorization": AUTHORIZATION.search(head)}
        texts = {name: match[1].decode() if match else "" for name, match in searched.items()}
        request = {"port": port, "begins": time.monotonic(), "ends": None, "method": found[1].decode(),
                   "uri": found[2].decode(), "status": 0, "received": 0, "sent": head.decode("latin-1"), **texts}
        self.requests.append(request)
        return request

    async def listen(self, listener, port):
        async def connected(reader, writer):
            self.connections[port].add(writer)
            try:
                await self.carry(port, reader, writer)
            except OSError:
                writer.close()
            finally:
                self.connections[port].discard(writer)

        self.connections[port] = set()
        self.through[port] = asyncio.Event()
        self.through[port].set()
        self.servers[port] = await asyncio.start_server(connected, sock=listener, limit=self.read_bytes, backlog=BACKLOG)

    def refuse(self, port):
        self.servers[port].close()
        for writer in self.connections[port]:
            writer.transport.abort()

    async def carry(self, port, reader, writer):
        made_at = time.monotonic() + self.round_trip_s
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port, limit=self.read_bytes)
        current = {"port": port, "begins": time.monotonic(), "ends": None, "method": "-", "uri": "", "status": 0,
                   "received": 0, "sent": "", "range": "", "authorization": ""}
        first = True

        def asked(data):
            nonlocal current, first
            begun = self.begin(port, data)
            if begun:
                current = begun
            elif first:
                self.requests.append(current)
            first = False

        def answered(data):
            if not current["received"] and data.startswith(b"HTTP/1."):
                current["status"] = int(data[9:12])
            current["received"] += len(data)
            return current

        ways = [
            *self.way(reader, server_writer, self.up, self.through[port], asked, made_at),
            *self.way(server_reader, writer, self.down, self.through[port], answered, 0),
        ]
        tasks = [asyncio.ensure_future(part) for part in ways]
        try:
            await asyncio.gather(*tasks)
        except OSError:
            # One side has gone; the other sees the connection end.
            pass
        finally:
            for task in tasks:
                task.cancel()
            server_writer.close()
            writer.close()

    def way(self, reader, writer, direction, through, seen, not_before):
        """One direction of a connection: what puts onto the link, and what takes from it. `seen` is told of every piece, and
        says which request ends with it."""
        on_the_way = asyncio.Queue(WINDOW_PIECES)

        async def send():
            while data := await reader.read(self.read_bytes):
                request = seen(data)
                await through.wait()
                await sleep_until(not_before)
                sent_at = direction.sent_at(len(data))
                await sleep_until(sent_at - TIMER_S)
                await on_the_way.put((sent_at + self.round_trip_s / 2, data, request))
            await on_the_way.put((0, b"", None))

        async def arrive():
            while True:
                when, data, request = await on_the_way.get()
                await sleep_until(when)
                if not data:
                    writer.write_eof()
                    return
                if request:
                    request["ends"] = time.monotonic()
                writer.write(data)
                await writer.drain()

        return send(), arrive()

    def command(self, line):
        name, _, port = line.partition(" ")
        if name == "requests":
            return json.dumps(self.requests)
        if name == "clear":
            self.requests.clear()
        elif name == "refuse":
            self.refuse(int(port))
        elif name == "hang":
            self.through[int(port)].clear()
        return ""


async def serve(line, namespace, listeners, ports):
    for listener, port in zip(listeners, ports):
        await line.listen(listener, port)
    print(f"/proc/{os.getpid()}/fd/{namespace}", flush=True)
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while text := await commands.readline():
        print(line.command(text.decode().strip()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trip-ms", type=float, default=0)
    parser.add_argument("--mbit-per-s", type=float, default=0, help="0: no limit")
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT")
    arguments = parser.parse_args()
    namespace, listeners = listen_elsewhere(arguments.ports)
    line = Line(arguments.round_trip_ms / 1000, arguments.mbit_per_s * 1e6 / 8)
    asyncio.run(serve(line, namespace, listeners, arguments.ports))


if __name__ == "__main__":
    sys.exit(main())
