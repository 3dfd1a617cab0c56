# checker.py -- is what the clients were told still true?
#
# Each finding is either a violation, or excused: the same loss as a cluster without
# migrations has from the same failure. Excused are writes
#   - that a master acknowledged after the last moment whose writes its successor is
#     known to have had, and before it knew that it was replaced (not of a graceful
#     CLUSTER FAILOVER, which loses nothing); known from samples of both offsets;
#   - to slots that a node owned when it came back from a crash without its data, nobody
#     having replaced it.
# Nothing else is: no key of a shard that was not replaced, no older write.
#
# SPDX-License-Identifier: AGPL-3.0-only

import bisect
import collections
import json
import re

from chaoslib.cluster import log_time
from chaoslib.resp import Refused, slot_of

STAYS_MASTER = 20       # seconds after which one that was replaced knows it, even if it does not become a replica;
                        # and that was stopped: after which it hears of it when it goes on
GRACEFUL = "All master replication stream processed"
PROMOTION_WORDS = re.compile(r"(Manual failover user request accepted|Forced failover user request accepted|"
                             r"Taking over the master|%s|Manual failover timed out|Failover election won)" % GRACEFUL)


class Operation:
    __slots__ = ("what", "key", "value", "outcome", "node", "began", "ended", "reply")

    def __init__(self, line):
        (self.what, self.key, self.value, self.outcome, self.node, self.began, self.ended, self.reply) = line

    def __str__(self):
        return "%s %s %s: %s by node %s, %.3f to %.3f, %r" % (self.what, self.key, self.value, self.outcome, self.node,
                                                             self.began, self.ended, self.reply)


def read_history(files):
    operations = []
    for name in files:
        with open(name) as f:
            operations += [Operation(json.loads(line)) for line in f]
    operations.sort(key=lambda o: o.began)
    return operations


# ---- what plain failures may have lost ----

class Excuses:
    def __init__(self, cluster, monitors, crashes, moves, wall_offset):
        self.crashes = []
        for crash in crashes:
            crash = dict(crash, since=reached(crash, cluster, monitors))
            kept = crash.get("all_else_kept")
            self.crashes.append(dict(crash, arrived=set() if kept else arrived_since(crash, cluster, moves)))
        self.windows = []       # (node, from, until, why)
        for shard in range(cluster.masters):
            nodes = cluster.shard_nodes(shard)
            for node in nodes:
                for promoted_at, offset in promotions(monitors[node.index].samples):
                    if is_graceful(node, promoted_at + wall_offset):
                        continue
                    confirmed = None
                    for old in nodes:
                        if old is not node:
                            window = self.window_of(monitors[old.index].samples, monitors[node.index].samples, promoted_at, offset)
                            if window:
                                self.windows.append((old.index,) + window + ("%s replaced it" % node,))
                                confirmed = window[0]
                    self.unprotected(moves, node.shard, confirmed or promoted_at, promoted_at)

    def window_of(self, samples, successors, promoted_at, offset):
        """In which the old master may have acknowledged what its successor, at `offset`, did not get. A master that
        is behind its replica was restarted with an old file: what it has then the other did not get from it."""
        confirmed, until = 0, None
        seen = [s[1] for s in successors]
        for asked, answered, _, role, its_offset in samples:
            if role == "master" and answered < promoted_at + 60 and until is None:
                before = bisect.bisect_right(seen, asked)
                if its_offset <= offset and asked < promoted_at and (not before or successors[before-1][4] <= its_offset):
                    confirmed = asked
            if role == "slave" and asked > promoted_at and until is None:
                until = answered
        was_master = [s for s in samples if s[3] == "master" and s[0] < promoted_at]
        if not was_master:
            return None
        answers = min([s[1] for s in samples if s[1] > promoted_at], default=promoted_at)
        return confirmed, until or answers + STAYS_MASTER

    def unprotected(self, moves, shard, confirmed, promoted_at):
        """Slots that this shard took without asking its replicas for it (WAITREPLICAS 0), just before."""
        for move in moves:
            if move.wait_replicas == 0 and move.target.shard == shard and move.began < promoted_at and (
                    move.ended is None or move.ended > confirmed - 1):
                self.crashes.append({"node": move.target.index, "until": promoted_at, "slots": set(move.slots),
                                     "since": 0, "arrived": set()})

    def of(self, o):
        """Why the loss of what was acknowledged is not a migration's, or None. It was done at some moment between its
        beginning and its end, which on a busy machine is long after the server's answer."""
        return self.of_time(o.node, o.began, o.ended, o.key)

    def of_time(self, node, began, ended, key):
        for old, begin, until, why in self.windows:
            if old == node and begin <= ended and began <= until:
                return why
        slot = slot_of(key)
        for crash in self.crashes:
            if slot in crash["slots"] and began <= crash["until"] and (ended >= crash["since"] or slot in crash["arrived"]):
                return "node %d lost its data" % crash["node"]
        return None

    def among(self, operations, before):
        """Those of the acknowledged ones that may have been lost, of all that had ended by then."""
        return [o for o in operations if o.ended <= before and self.of(o)]


def reached(crash, cluster, monitors):
    """Up to when writes were in the snapshot: a replica may have lagged when it took it."""
    since, node = crash["since"], cluster.nodes[crash["node"]]
    before = [s for s in monitors[node.index].samples if s[1] <= since]
    if not before or before[-1][3] == "master":
        return since
    offset = before[-1][4]
    return max([s[0] for other in cluster.shard_nodes(node.shard) if other is not node
                for s in monitors[other.index].samples if s[3] == "master" and s[4] <= offset and s[0] <= since], default=0)


def arrived_since(crash, cluster, moves):
    """Slots that the node was given after the snapshot it came back with had begun."""
    shard, arrived = cluster.nodes[crash["node"]].shard, set()
    for move in moves:
        if move.target.shard == shard and (move.ended is None or move.ended > crash["since"] - 1):
            arrived.update(move.slots)
    return arrived


def promotions(samples):
    """(when, offset it had) of each change from replica to master of one process."""
    found = []
    for before, after in zip(samples, samples[1:]):
        if before[3] == "slave" and after[3] == "master":
            found.append((after[1], before[4]))
    return found


def is_graceful(node, promoted_at_wall):
    """By its log: did it have everything of its master, which waited?"""
    last = ""
    with open(node.log, errors="replace") as f:
        for line in f:
            found, at = PROMOTION_WORDS.search(line), log_time(line)
            if not found or not at:
                continue
            if found.group(1) != "Failover election won":
                last = found.group(1)
            elif abs(at - promoted_at_wall) < 1.5:
                return last == GRACEFUL
            else:
                last = ""
    return False


# ---- what is there ----

class Contents:
    """All keys of the clients, read from their slots' owners."""

    def __init__(self, cluster, operations):
        self.values = {}
        self.refused = {}           # slot: the answer of an owner that does not serve it
        owner = cluster.owner_nodes(cluster.nodes[0])
        wanted = collections.defaultdict(list)
        for key, command in sorted(set(self.reads(operations))):
            if slot_of(key) in owner:
                wanted[owner[slot_of(key)]].append((key, command))
        for node, some in wanted.items():
            c = node.connect(60)
            for (key, _), reply in zip(some, c.pipeline([command for _, command in some])):
                if isinstance(reply, Refused):
                    self.refused.setdefault(slot_of(key), "%s of node %d: %s" % (key, node.index, reply))
                else:
                    self.values[key] = reply
            c.close()

    def reads(self, operations):
        for o in operations:
            if o.what in ("rpush", "llen"):
                yield o.key, ("LRANGE", o.key, 0, -1)
            elif o.what == "incr" or o.what in ("set", "del", "get"):
                yield o.key, ("GET", o.key)
                if o.what == "set":
                    yield "ttl:" + o.key, ("TTL", o.key)
            elif o.what == "sadd":
                yield o.key, ("SMEMBERS", o.key)
            elif o.what == "pair":
                for end in ":a", ":b":
                    yield o.key + end, ("LRANGE", o.key + end, 0, -1)
            elif o.what == "lua":
                yield o.key + ":n", ("GET", o.key + ":n")
                yield o.key + ":l", ("LRANGE", o.key + ":l", 0, -1)

    def get(self, key, otherwise):
        value = self.values.get(key)
        return otherwise if value is None else value


class Checker:
    def __init__(self, operations, contents, excuses):
        self.excuses, self.contents = excuses, contents
        self.violations = []        # (kind, text)
        self.excused = collections.Counter()
        self.by_key = collections.defaultdict(list)
        for o in operations:
            self.by_key[o.key].append(o)
        self.operations = operations

    def violation(self, kind, text):
        self.violations.append((kind, text))

    def lost(self, kind, o, text):
        why = self.excuses.of(o)
        if why:
            self.excused["%s: %s" % (kind, why)] += 1
        else:
            self.violation(kind, "%s; %s" % (text, o))

    def check(self):
        for slot, text in sorted(self.contents.refused.items()):
            self.violation("unserved", "slot %d: %s" % (slot, text))
        for key, operations in self.by_key.items():
            if slot_of(key) in self.contents.refused:
                continue
            kind = operations[0].what
            {"rpush": self.check_list, "llen": self.check_list, "incr": self.check_counter, "sadd": self.check_set,
             "pair": self.check_pair, "lua": self.check_script, "set": self.check_register, "del": self.check_register,
             "get": self.check_register}[kind](key, operations)
        return self

    # ---- lists and sets of unique values ----

    def check_members(self, key, found, operations, kind="lost"):
        """Each acknowledged value once, one in doubt at most once, a refused one never. The acknowledged ones found."""
        count = collections.Counter(found)
        known = {}
        for o in operations:
            known[o.value] = o
            there = count[o.value]
            if there > 1:
                self.violation("doubled", "%d times in %s: %s" % (there, key, o))
            if there and o.outcome == "refused":
                self.violation("refused but there", "in %s: %s" % (key, o))
            if not there and o.outcome == "ok":
                self.lost(kind, o, "not in %s" % key)
        for value in count:
            if value not in known:
                self.violation("never written", "%s in %s" % (value, key))
        return known

    def check_order(self, key, found, known):
        """The acknowledged values of one client in its order: each was sent after the one before was acknowledged."""
        last = {}
        for value in found:
            o = known.get(value)
            if o is None or o.outcome != "ok":
                continue
            client = value.split(":")[0]
            before = last.get(client)
            if before and before.began > o.began:
                self.violation("order", "in %s: %s stands after %s" % (key, o, before))
            last[client] = o

    def check_list(self, key, operations):
        found = self.contents.get(key, [])
        writes = [o for o in operations if o.what == "rpush"]
        known = self.check_members(key, found, writes)
        self.check_order(key, found, known)
        for read in operations:
            if read.what != "llen" or read.outcome != "ok":
                continue
            # One that was in doubt may come later; one acknowledged before must be there.
            before = [o for o in writes if o.outcome == "ok" and o.ended < read.began]
            missing = len(before) - read.reply
            if missing > 0:
                self.stale(read, before, missing, "LLEN %d of %d acknowledged" % (read.reply, len(before)))

    def stale(self, read, before, missing, text):
        """It lacks so many of the acknowledged writes before it: by itself, or because they were lost."""
        if self.excuses.of(read) or len(self.excuses.among(before, read.ended)) >= missing:
            self.excused["stale read"] += 1
        else:
            self.violation("stale read", "%s: %s" % (text, read))

    def check_set(self, key, operations):
        self.check_members(key, self.contents.get(key, []), operations)

    def check_pair(self, key, operations):
        a, b = self.contents.get(key + ":a", []), self.contents.get(key + ":b", [])
        if a != b:
            self.violation("transaction torn", "%s:a and :b differ: %s" % (key, sorted(set(a) ^ set(b))[:10] or "in order"))
        known = self.check_members(key + ":a", a, operations)
        self.check_order(key + ":a", a, known)
        for o in operations:
            if o.outcome == "ok" and not (isinstance(o.reply, list) and len(o.reply) == 2 and o.reply[0] == o.reply[1]):
                self.violation("transaction torn", "its replies differ: %s" % o)

    def check_script(self, key, operations):
        found = self.contents.get(key + ":l", [])
        number = int(self.contents.get(key + ":n", 0))
        values = [v.rpartition("|")[0] for v in found]
        positions = [int(v.rpartition("|")[2]) for v in found]
        if positions != list(range(len(found))) or number != len(found):
            self.violation("script torn", "%s:n is %d, the list has %d elements: %s" % (key, number, len(found), positions[:50]))
        known = self.check_members(key + ":l", values, operations)
        self.check_order(key + ":l", values, known)

    # ---- counters ----

    def check_counter(self, key, operations):
        final = int(self.contents.get(key, 0))
        acknowledged = [o for o in operations if o.outcome == "ok"]
        doubtful = sum(o.outcome == "unknown" for o in operations)
        for o in acknowledged:
            if o.reply > final:
                self.lost("lost", o, "%s is %d" % (key, final))
        missing = len(acknowledged) - final
        if missing > 0:
            excusable = [o for o in acknowledged if self.excuses.of(o)]
            if missing > len(excusable):
                self.violation("lost", "%s is %d, %d were acknowledged (%d of them excusable), the last: %s" % (
                    key, final, len(acknowledged), len(excusable), acknowledged[-1]))
            else:
                self.excused["lost INCRs"] += missing
        if final > len(acknowledged) + doubtful:
            self.violation("doubled", "%s is %d: %d were acknowledged, %d in doubt" % (
                key, final, len(acknowledged), doubtful))
        self.check_replies(key, acknowledged, doubtful)

    def check_replies(self, key, acknowledged, doubtful):
        """One that began after another had ended must have got more, but for what may have been lost."""
        by_end = sorted(acknowledged, key=lambda o: o.ended)
        ends, highest = [], []
        for o in by_end:
            ends.append(o.ended)
            highest.append(o if not highest or o.reply > highest[-1].reply else highest[-1])
        for o in acknowledged:
            at = bisect.bisect_left(ends, o.began) - 1
            if at >= 0 and highest[at].reply >= o.reply:
                excusable = len(self.excuses.among(acknowledged, o.ended))
                if excusable and excusable + doubtful > highest[at].reply - o.reply:
                    self.excused["counter went back"] += 1
                else:
                    self.violation("went back", "%s after %s" % (o, highest[at]))

    # ---- registers: one writer, no write after one in doubt ----

    def check_register(self, key, operations):
        writes = [o for o in operations if o.what != "get" and o.outcome != "refused"]
        self.check_state(key, writes, self.contents.get(key, None), None)
        if self.contents.get(key, None) is not None and self.contents.get("ttl:" + key, 0) < 0:
            self.violation("lost", "%s has no time to live any more" % key)
        for read in operations:
            if read.what == "get" and read.outcome == "ok":
                self.check_state(key, [o for o in writes if o.began < read.began], read.reply, read)

    def check_state(self, key, writes, value, read):
        """`value` must be what the last acknowledged write left, or a later one in doubt."""
        possible = 0
        for i, o in enumerate(writes):
            if o.outcome == "ok":
                possible = i
        if not writes:
            if value is not None:
                self.violation("never written", "%s is %s" % (key, value))
            return
        if writes[possible].outcome != "ok" and value is None:
            return
        if any(self.leaves(o, value) for o in writes[possible:]):
            return
        older = [i for i, o in enumerate(writes) if self.leaves(o, value)]
        after = [o for o in writes[(older[-1] + 1 if older else 0):] if o.outcome == "ok"]
        if read:
            self.stale(read, after, len(after), "%s is %s" % (key, value))
        elif all(self.excuses.of(o) for o in after):
            self.excused["older value"] += 1
        else:
            kind = "lost" if not older else "resurrected" if after and after[-1].what == "del" else "stale"
            self.violation(kind, "%s is %s, the last acknowledged write: %s" % (key, value, after[-1] if after else "-"))

    def leaves(self, o, value):
        return value is None if o.what == "del" else value == o.value

    # ---- who served a slot ----

    def check_owners(self, shard_of, moves):
        """How often the slot's server changed, at least, and how often it may have."""
        acks = collections.defaultdict(list)
        for o in self.operations:
            if o.outcome == "ok" and o.what not in ("get", "llen"):
                acks[slot_of(o.key)].append(o)
        for slot, some in acks.items():
            some.sort(key=lambda o: o.ended)
            allowed = collections.Counter((m.source.shard, m.target.shard) for m in moves if slot in m.slots and m.was_done)
            if len(self.chain(some, shard_of)) - 1 <= sum(allowed.values()):
                continue
            chain = self.chain([o for o in some if not self.excuses.of(o)], shard_of)
            if len(chain) - 1 <= sum(allowed.values()):
                self.excused["served by two shards"] += 1
                continue
            changes = collections.Counter((shard_of[a.node], shard_of[b.node]) for a, b in zip(chain, chain[1:]))
            self.violation("two owners", "slot %d: shards served it as %s, migrations allow %s; last: %s" % (
                slot, dict(changes), dict(allowed), chain[-1]))

    def chain(self, acknowledged, shard_of):
        """The first ones by another shard than those before, which began after these had ended."""
        chain = []
        for o in acknowledged:
            if not chain or (shard_of[o.node] != shard_of[chain[-1].node] and o.began > chain[-1].ended):
                chain.append(o)
        return chain
