# clients.py -- the clients: they write and read, follow MOVED, and note of each
# operation when it began and ended, who answered and what.
#
# argv: JSON {"seed", "first", "clients", "rate", "slots": [...], "tags": [...],
# "nodes": [...], "history": FILE}. Runs until its standard input ends; the last line
# it prints is a JSON object of what it counted.
#
# A line of the history: [operation, key, value, outcome, node, began, ended, reply].
# Outcome ok: acknowledged. refused: it had no effect. unknown: it was sent and there
# was no answer; it may take effect at any later time.
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import ctypes
import json
import os
import random
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chaoslib.resp import Connection, NotSent, Refused, Unknown, slot_of     # noqa: E402

TIMEOUT = 5.0       # seconds without an answer, then the outcome is unknown
PATIENCE = 8.0      # seconds for which a refused operation is tried again
FAR = 10000000      # seconds: a time to live that is there to be carried along

READ_MODIFY_WRITE = """
local n = tonumber(redis.call('GET', KEYS[1]) or '0')
redis.call('SET', KEYS[1], n + 1)
redis.call('RPUSH', KEYS[2], ARGV[1] .. '|' .. n)
return n + 1
"""

OPERATIONS = [("rpush", 20), ("incr", 20), ("sadd", 10), ("pair", 14), ("lua", 10), ("set", 12), ("del", 4),
              ("get", 5), ("llen", 5)]


def commands_of(operation, key, value):
    if operation == "rpush":
        return [("RPUSH", key, value)]
    if operation == "incr":
        return [("INCR", key)]
    if operation == "sadd":
        return [("SADD", key, value)]
    if operation == "pair":
        return [("MULTI",), ("RPUSH", key + ":a", value), ("RPUSH", key + ":b", value), ("EXEC",)]
    if operation == "lua":
        return [("EVAL", READ_MODIFY_WRITE, 2, key + ":n", key + ":l", value)]
    if operation == "set":
        return [("SET", key, value, "EX", FAR)]
    if operation == "del":
        return [("DEL", key)]
    if operation == "get":
        return [("GET", key)]
    if operation == "llen":
        return [("LLEN", key)]
    raise ValueError(operation)


class Client(threading.Thread):
    def __init__(self, number, config, stop, history):
        super().__init__(daemon=True)
        self.number, self.stop, self.history = number, stop, history
        self.random = random.Random("%s client %d" % (config["seed"], number))
        self.slots, self.tags = config["slots"], config["tags"]
        self.pause = config["clients"] / config["rate"]
        self.nodes = config["nodes"]
        self.at_port = {node["public_port"]: node["index"] for node in self.nodes}
        self.connections = {}
        self.owner = {}
        self.sequence = 0
        self.generation = collections.Counter()     # of a register whose last write is in doubt
        self.counts = collections.Counter()

    def run(self):
        names = [name for name, _ in OPERATIONS]
        weights = [weight for _, weight in OPERATIONS]
        next_at = time.monotonic() + self.random.random() * self.pause
        while not self.stop.is_set():
            time.sleep(max(0, next_at - time.monotonic()))
            next_at = max(next_at, time.monotonic() - 1) + self.pause * self.random.uniform(0.5, 1.5)
            self.operate(self.random.choices(names, weights)[0], self.random.randrange(len(self.slots)))

    def key(self, operation, place):
        """Registers, and lists that are read, have one writer; of others every third key is everybody's."""
        tag, mine = self.tags[place], "c%d" % self.number
        if operation in ("set", "del", "get"):
            return "{%s}reg:%s:%d" % (tag, mine, self.generation[tag])
        if operation == "llen":
            return "{%s}rpush:%s" % (tag, mine)
        return "{%s}%s:%s" % (tag, operation, "all" if self.random.random() < 0.33 else mine)

    def operate(self, operation, place):
        key = self.key(operation, place)
        self.sequence += 1
        value = "c%d:%d" % (self.number, self.sequence)
        outcome, node, reply, began = self.carry_out(commands_of(operation, key, value), self.slots[place])
        ended = time.monotonic()
        self.counts[outcome] += 1
        self.history.append((operation, key, value, outcome, node, began, ended, reply))
        if outcome == "unknown" and operation in ("set", "del"):
            self.generation[self.tags[place]] += 1

    def connection(self, node):
        if node not in self.connections:
            self.connections[node] = Connection(self.nodes[node]["port"], TIMEOUT)
        return self.connections[node]

    def drop(self, node):
        if node in self.connections:
            self.connections.pop(node).close()

    def carry_out(self, commands, slot):
        """Until it is acknowledged, in doubt, or patience ends; began: the last try, those before had no effect."""
        began = time.monotonic()
        until = began + PATIENCE
        moved = 0
        why = node = None
        while time.monotonic() < until and not (why and self.stop.is_set()):
            node = self.owner.get(slot)
            if node is None:
                node = self.random.randrange(len(self.nodes))
            began = time.monotonic()
            try:
                return "ok", node, self.exchange(node, commands), began
            except Unknown as error:
                self.drop(node)
                self.owner.pop(slot, None)
                return "unknown", node, str(error), began
            except NotSent as error:
                why = str(error)
                self.owner.pop(slot, None)
                time.sleep(0.05)
            except Refused as error:
                why = str(error)
                moved += self.redirected(why, slot)
                if moved == 50:
                    self.counts["redirected 50 times"] += 1
        return "refused", node, why, began

    def redirected(self, why, slot):
        """Where to next, after an error; 1 when it was MOVED."""
        word = why.split(" ", 1)[0]
        self.counts[word] += 1
        if word == "MOVED":
            self.owner[slot] = self.at_port.get(int(why.rsplit(":", 1)[1]))
            return 1
        if word == "ASK":
            self.counts["ASK: " + why] += 1
        elif word not in ("CLUSTERDOWN", "TRYAGAIN", "LOADING", "OOM", "READONLY", "MASTERDOWN", "NOREPLICAS", "MISCONF"):
            self.counts["error: " + why[:100]] += 1
        self.owner.pop(slot, None)
        time.sleep(0.05)
        return 0

    def exchange(self, node, commands):
        """The last command's reply; of a transaction, an error that says where to go before one that does not."""
        c = self.connection(node)
        c.send(*commands)
        replies = [c.read() for _ in commands]
        last = replies[-1]
        if isinstance(last, Refused):
            for reply in replies:
                if isinstance(reply, Refused) and not str(reply).startswith("EXECABORT"):
                    raise reply
            raise last
        if isinstance(last, list):
            for reply in last:
                if isinstance(reply, Refused):
                    self.counts["error inside of EXEC: " + str(reply)[:80]] += 1
        return last


def main():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = json.loads(sys.argv[1])
    assert all(slot_of("{%s}" % tag) == slot for slot, tag in zip(config["slots"], config["tags"]))
    stop = threading.Event()
    history = []
    clients = [Client(config["first"] + i, config, stop, history) for i in range(config["clients"])]
    for client in clients:
        client.start()
    sys.stdin.read()
    stop.set()
    for client in clients:
        client.join(TIMEOUT + PATIENCE + 5)
    counts = collections.Counter()
    for client in clients:
        counts.update(client.counts)
    with open(config["history"], "w") as f:
        for line in history:
            f.write(json.dumps(line) + "\n")
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
