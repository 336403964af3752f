#!/usr/bin/env python3
"""Sends HTTP/1.1 requests that were written down, as fast as what they need from each other allows: what a client that does
nothing else would take for them.

Reads from standard input a list of stages in JSON; a stage is a list of {"port", "sent"}: a server on loopback and the bytes of
a request. All requests of a stage are sent at once, each on a connection that is idle or on a new one, and the next stage begins
when all answers are there. Prints {"seconds", "bytes", "statuses"} for the whole. Starts without a connection.
"""

import http.client
import json
import socket
import sys
import threading
import time


class Server:
    """The connections to one port, idle ones to be used again."""

    def __init__(self, port):
        self.port, self.idle = port, []

    def exchange(self, connection, sent):
        """Status and size of the answer."""
        connection = connection or socket.create_connection(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(sent.encode("latin-1"))
        # Of which the answer to HEAD has no body, whatever length it gives.
        answer = http.client.HTTPResponse(connection, method=sent.partition(" ")[0])
        answer.begin()
        size = 0
        while data := answer.read(1 << 18):
            size += len(data)
        if not answer.will_close:
            self.idle.append(connection)
        return answer.status, size


def main():
    stages = json.load(sys.stdin)
    servers = {request["port"]: Server(request["port"]) for stage in stages for request in stage}
    results = []

    def exchange(server, connection, sent):
        results.append(server.exchange(connection, sent))

    start = time.monotonic()
    for stage in stages:
        threads = []
        for request in stage:
            server = servers[request["port"]]
            connection = server.idle.pop() if server.idle else None
            threads.append(threading.Thread(target=exchange, args=(server, connection, request["sent"])))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elapsed = time.monotonic() - start
    statuses, sizes = zip(*results)
    print(json.dumps({"seconds": elapsed, "bytes": sum(sizes), "statuses": sorted(statuses)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
