"""TVM's RPC tracker and servers on the loopback address, as a program: ``python tvm_farm.py KEY...``.

Each key gets two servers. It prints one line of JSON, ``{"port": of the tracker, "servers": {key: {port: process
group}}}``, and ends when its input does. All are TVM's own; one process imports it and the others are forked from it,
since importing takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

HOST = "127.0.0.1"


def forked(start) -> tuple[int, int]:
    """Run ``start``, which returns a port, in a process group that lives as long as this process; group and port."""
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.setsid()
        os.write(writer, str(start()).encode().ljust(8))
        while os.getppid() == parent:
            time.sleep(0.1)
        os.killpg(0, signal.SIGKILL)
    port = int(os.read(reader, 8))
    os.close(reader)
    os.close(writer)
    return child, port


def main() -> None:
    from tvm.rpc import server, tracker

    def tracks() -> int:
        return tracker.PopenTrackerServerState(HOST, 39190, 39990, silent=True).port

    address = (HOST, forked(tracks)[1])

    def serves(key: str) -> int:
        return server.PopenRPCServerState(HOST, 40190, 40990, tracker_addr=address, key=key, silent=True).port

    servers = {key: {} for key in sys.argv[1:]}
    for key in [*servers, *servers]:
        group, port = forked(lambda key=key: serves(key))
        servers[key][port] = group
    print(json.dumps({"port": address[1], "servers": servers}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
