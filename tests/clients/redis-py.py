# redis-py.py -- python3-redis, see work.js. Four threads share one client, and
# each has one of its own for pipelines: redis-py asks the slot table again for
# each command of a pipeline, so a MOVED that another thread of the same client
# gets meanwhile splits one key's commands between two nodes, and what the old
# owner refuses is repeated after the rest (4.3.4, _send_cluster_commands). No
# server can hold an order across two connections.
#
# SPDX-License-Identifier: AGPL-3.0-only

import sys
import threading
import time

import redis
from redis.cluster import ClusterNode, RedisCluster

TURN, AT_ONCE, PAUSE, HEARD, THREADS = 20, 5, 0.002, 10.0, 4
SCRIPT = "local n = redis.call('incr', KEYS[1]) redis.call('rpush', KEYS[2], n) return n"
VERSION = tuple(int(n) for n in redis.__version__.split(".")[:2])

stopped = threading.Event()
lock = threading.Lock()


def say(*words):
    with lock:
        print(*[str(w).replace("\n", " ") for w in words], flush=True)


def expect(got, wanted):
    if got != wanted:
        raise AssertionError("answered %r instead of %r" % (got, wanted))


def values(client, tag, n):
    expect(client.set("{%s}value" % tag, n + 1), True)
    expect(client.get("{%s}value" % tag), b"%d" % (n + 1))
    return n + 1


def pipelines(client, tag, n):
    items = list(range(n + 1, n + 1 + AT_ONCE))
    pipeline = client.pipeline()
    for item in items:
        pipeline.rpush("{%s}list" % tag, item)
    expect(pipeline.execute(), items)
    return n + AT_ONCE


def transactions(client, tag, n):
    pipeline = client.pipeline(transaction=True)
    pipeline.incr("{%s}a" % tag)
    pipeline.incr("{%s}b" % tag)
    expect(pipeline.execute(), [n + 1, n + 1])
    return n + 1


def scripts(client, tag, n):
    expect(client.eval(SCRIPT, 2, "{%s}counter" % tag, "{%s}log" % tag), n + 1)
    return n + 1


class Channels:
    """The channels of some tags: one connection that listens, and what is sent to them."""

    def __init__(self, client, sharded):
        self.client, self.kind, self.tags, self.heard = client, "shards" if sharded else "channels", [], {}
        self.listener = client.pubsub()
        self.listen = self.listener.ssubscribe if sharded else self.listener.subscribe
        self.send = client.spublish if sharded else client.publish
        self.next_message = self.listener.get_sharded_message if sharded else self.listener.get_message

    def add(self, tag):
        self.tags.append(tag)
        self.listen("{%s}%s" % (tag, self.kind))

    def drain(self, seconds=0.0):
        message = self.next_message(ignore_subscribe_messages=True, timeout=seconds)
        while message:
            tag = message["channel"].decode()[1:].split("}")[0]
            self.heard[tag] = max(self.heard.get(tag, 0), int(message["data"]))
            message = self.next_message(ignore_subscribe_messages=True, timeout=0.0)

    def run(self):
        n = 0
        try:
            while not stopped.is_set():
                n += 1
                for tag in self.tags:
                    self.send("{%s}%s" % (tag, self.kind), n)
                self.drain()
                if n % TURN == 0:
                    for tag in self.tags:
                        say("turn")
                time.sleep(PAUSE)
            last, until = n + 1, time.time() + HEARD
            while min(self.heard.get(tag, 0) for tag in self.tags) < last and time.time() < until:
                n += 1
                for tag in self.tags:
                    self.send("{%s}%s" % (tag, self.kind), n)
                self.drain(0.01)
            for tag in self.tags:
                if self.heard.get(tag, 0) < last:
                    say("silent", self.kind, tag)
                else:
                    say("acknowledged", self.kind, tag, n)
        except Exception as error:
            say("error", self.kind, "-", type(error).__name__, error)


def worker(shared, own, work):
    """Each of (function, tag) in turn."""
    counts = dict.fromkeys(work, 0)
    broken = set()
    turns = 0
    while not stopped.is_set():
        turns += 1
        for step, tag in work:
            if (step, tag) in broken:
                continue
            try:
                counts[step, tag] = step(own if step is pipelines else shared, tag, counts[step, tag])
            except Exception as error:
                say("error", step.__name__, tag, type(error).__name__, error)
                broken.add((step, tag))     # what the server has now is not known
            if turns % TURN == 0:
                say("turn")
        time.sleep(PAUSE)
    for (step, tag), n in counts.items():
        if (step, tag) not in broken:
            say("acknowledged", step.__name__, tag, n)


def main():
    say("library", "redis-py", redis.__version__)
    nodes = [ClusterNode(*address.split(":")) for address in sys.argv[1].split(",")]

    def connect():
        return RedisCluster(startup_nodes=[ClusterNode(n.host, int(n.port)) for n in nodes])

    client = connect()
    work = [w.split(":") for w in sys.argv[2:]]
    kinds = {"values": values, "pipelines": pipelines, "scripts": scripts}
    if VERSION >= (6, 0):
        kinds["transactions"] = transactions
    else:
        say("without", "transactions on a cluster")
    channels = [Channels(client, False)]
    if VERSION >= (5, 0):
        channels.append(Channels(client, True))
    else:
        say("without", "sharded channels")
    for kind, tag in work:
        if kind == "messages":
            for c in channels:
                c.add(tag)
    steps = [(kinds[kind], tag) for kind, tag in work if kind in kinds]
    threads = [threading.Thread(target=worker, args=(client, connect(), steps[i::THREADS])) for i in range(THREADS)]
    threads += [threading.Thread(target=c.run) for c in channels]
    say("ready")
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stopped.set()
    for thread in threads:
        thread.join()
    say("done")


main()
