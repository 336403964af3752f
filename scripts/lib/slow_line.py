#!/usr/bin/env python3
"""A slow line to servers on loopback, for one client: a network namespace in which the same ports lead to the same
servers, every request takes its time, and all are written down. Nothing else on the machine notices.

    slow_line.py --delay-ms MS PORT…

Prints the path of the namespace (for `nsenter --net=PATH COMMAND`). Then, for each line on standard input: `requests`
prints the requests so far as one line of JSON; `clear` forgets them; `refuse PORT` ends all connections to a port, which
from then on refuses more, as if its server had died. The last two answer an empty line. Ends with its input. Needs root.

A request is delayed on its way to the server, an answer is not: so requests that wait for each other's answers are
MS apart, and those that do not are together. Connections are made without delay. Only plain HTTP/1.1 is read; what is not
is delayed all the same, and listed as method `-`.
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
READ_BYTES = 1 << 18
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
            result.append((namespace, [socket.create_server(("127.0.0.1", port)) for port in ports]))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        sys.exit(f"slow_line: {result[0]}")
    return result[0]


class Line:
    def __init__(self, delay_s):
        self.delay_s = delay_s
        self.requests = []
        # By port.
        self.servers, self.connections = {}, {}

    def begin(self, port, head):
        """Writes down what begins with `head`; None if it goes on with what came before."""
        if not (found := REQUEST.match(head)):
            return None
        searched = {"range": RANGE.search(head), "authorization": AUTHORIZATION.search(head)}
        texts = {name: match[1].decode() if match else "" for name, match in searched.items()}
        request = {"port": port, "begins": time.monotonic(), "ends": None, "method": found[1].decode(),
                   "uri": found[2].decode(), "status": 0, "received": 0, **texts}
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
        self.servers[port] = await asyncio.start_server(connected, sock=listener, limit=READ_BYTES)

    def refuse(self, port):
        self.servers[port].close()
        for writer in self.connections[port]:
            writer.transport.abort()

    async def carry(self, port, reader, writer):
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
        current = {"port": port, "begins": time.monotonic(), "ends": None, "method": "-", "uri": "", "status": 0,
                   "received": 0, "range": "", "authorization": ""}

        async def there():
            nonlocal current
            first = True
            while data := await reader.read(READ_BYTES):
                begun = self.begin(port, data)
                if begun:
                    current = begun
                elif first:
                    self.requests.append(current)
                first = False
                await asyncio.sleep(self.delay_s)
                server_writer.write(data)
                await server_writer.drain()
            server_writer.write_eof()

        async def back():
            while data := await server_reader.read(READ_BYTES):
                if not current["received"] and data.startswith(b"HTTP/1."):
                    current["status"] = int(data[9:12])
                current["received"] += len(data)
                current["ends"] = time.monotonic()
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        try:
            await asyncio.gather(there(), back())
        except OSError:
            # One side has gone; the other sees the connection end.
            pass
        finally:
            server_writer.close()
            writer.close()

    def command(self, line):
        if line == "requests":
            return json.dumps(self.requests)
        if line == "clear":
            self.requests.clear()
        elif line.startswith("refuse "):
            self.refuse(int(line.removeprefix("refuse ")))
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
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT")
    arguments = parser.parse_args()
    namespace, listeners = listen_elsewhere(arguments.ports)
    line = Line(arguments.delay_ms / 1000)
    asyncio.run(serve(line, namespace, listeners, arguments.ports))


if __name__ == "__main__":
    sys.exit(main())
