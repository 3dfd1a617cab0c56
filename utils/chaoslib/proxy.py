# proxy.py -- what lies between the nodes: everything they send each other goes
# through here, so that links can be cut, held and slowed, each way by itself.
#
# Each node has a public port and a public bus port, which are ours; who connects is
# known by its source address (bind-source-addr, another one for each node). A held
# way keeps what is sent and passes it on later, as TCP does after an outage.
#
# argv: [{"index", "source", "port", "bus", "public_port", "public_bus"}, ...] as JSON.
# Standard input: commands, a JSON object a line, answered by a line each:
#   {"do": "hold" | "pass", "from": i, "to": j, "kind": "data" | "bus"}
#   {"do": "slow", "from", "to", "kind", "delay": seconds, "rate": bytes a second or 0}
#   {"do": "close", "from": i, "to": j, "kind"}       both ways, all connections
#   {"do": "count"}                                   connections of each kind
#
# SPDX-License-Identifier: AGPL-3.0-only

import asyncio
import ctypes
import json
import signal
import socket
import sys


class Way:
    """What node i sends to node j, over connections that either of them opened."""

    def __init__(self):
        self.open = asyncio.Event()
        self.open.set()
        self.delay = 0
        self.rate = 0


ways = {}
connections = {}


def way(i, j, kind):
    return ways.setdefault((i, j, kind), Way())


async def pump(loop, way, source, sink):
    while True:
        data = await loop.sock_recv(source, 65536)
        if way.delay or way.rate:
            await asyncio.sleep(way.delay + (len(data) / way.rate if way.rate else 0))
        await way.open.wait()
        if not data:
            return
        await loop.sock_sendall(sink, data)


async def carry(loop, client, i, node, kind):
    j = node["index"]
    server = socket.socket()
    server.setblocking(False)
    key = (min(i, j), max(i, j), kind)
    task = asyncio.current_task()
    connections.setdefault(key, set()).add(task)
    try:
        await way(i, j, kind).open.wait()
        await loop.sock_connect(server, ("127.0.0.1", node["port" if kind == "data" else "bus"]))
        for s in client, server:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps = [asyncio.ensure_future(pump(loop, way(i, j, kind), client, server)),
                 asyncio.ensure_future(pump(loop, way(j, i, kind), server, client))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for p in pumps:
                p.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        client.close()
        server.close()
        connections[key].discard(task)


async def listen(loop, node, kind, index_of):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", node["public_port" if kind == "data" else "public_bus"]))
    listener.listen(512)
    listener.setblocking(False)
    while True:
        client, address = await loop.sock_accept(listener)
        client.setblocking(False)
        i = index_of.get(address[0])
        if i is None:
            client.close()
        else:
            asyncio.ensure_future(carry(loop, client, i, node, kind))


def obey(command):
    what = command["do"]
    if what == "count":
        return {"%d-%d-%s" % key: len(tasks) for key, tasks in connections.items() if tasks}
    i, j, kind = command["from"], command["to"], command["kind"]
    if what == "hold":
        way(i, j, kind).open.clear()
    elif what == "pass":
        way(i, j, kind).open.set()
    elif what == "slow":
        way(i, j, kind).delay, way(i, j, kind).rate = command["delay"], command["rate"]
    elif what == "close":
        for task in list(connections.get((min(i, j), max(i, j), kind), ())):
            task.cancel()
    return "ok"


async def main(nodes):
    loop = asyncio.get_running_loop()
    index_of = {node["source"]: node["index"] for node in nodes}
    for node in nodes:
        for kind in "data", "bus":
            asyncio.ensure_future(listen(loop, node, kind, index_of))
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    while line := await reader.readline():
        print(json.dumps(obey(json.loads(line))), flush=True)


ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
signal.signal(signal.SIGINT, signal.SIG_IGN)    # our parent tells us when to end
asyncio.run(main(json.loads(sys.argv[1])))
