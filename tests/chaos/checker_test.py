# checker_test.py -- does the checker of utils/chaos see what it is there for? Histories
# made by hand, each with one thing wrong, and each with what excuses it or does not.
#
#   python3 tests/chaos/checker_test.py [NAME...]
#
# A line for each test, as upstream's runner prints them; status 0: all passed.
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import datetime
import os
import re
import sys
import tempfile
import types
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + "/utils")
from chaoslib import checker, cluster, schedule, state      # noqa: E402
from chaoslib.migrations import Move                        # noqa: E402
from chaoslib.resp import slot_of                           # noqa: E402

KEY = "{a}"
SLOT = slot_of(KEY)
REPLACED_AT = 100.0     # in the tests of failovers: node 3 replaces node 0


# ---- a cluster that only answers questions ----

class Node:
    """As chaoslib.cluster.Node, of three shards. `replies`: what call() answers."""

    def __init__(self, index, directory):
        self.index, self.shard, self.id = index, index % 3, "id%d" % index
        self.log = "%s/node-%d.log" % (directory, index)
        self.died, self.replies, self.running, self.views = [], {}, [], {}
        self.counts = collections.Counter()     # keys of slots
        self.sections = {"memory": {}, "clients": {"connected_clients": "1"},
                         "replication": {"role": "master", "connected_slaves": "0"}}
        self.info_fields = {"cluster_slot_migrations_exporting": "0", "cluster_slot_migrations_importing": "0"}
        self.kinds = collections.Counter({"listening": 2, "from clients": 1, "bus, from others": 5, "to another's bus": 5})
        self.thread_names, self.child_ids = ["redis-server"], []
        open(self.log, "w").close()

    def __str__(self):
        return "node %d" % self.index

    def alive(self):
        return True

    def call(self, *args, timeout=None):
        return self.replies[args[0] if args[0] == "DBSIZE" else " ".join(args[:2])]

    def try_call(self, *args, timeout=None):
        return self.replies.get(" ".join(map(str, args[:2])), "OK")

    def connect(self, timeout=None):
        return types.SimpleNamespace(close=lambda: None, pipeline=lambda commands: [self.answer(c) for c in commands])

    def answer(self, command):
        return self.counts[command[2]] if command[:2] == ("CLUSTER", "COUNTKEYSINSLOT") else self.replies.get(command)

    def info(self, section, connection=None):
        return self.sections[section]

    def cluster_info(self):
        return self.info_fields

    def nodes_view(self):
        return self.views

    def jobs(self, job_id=None, timeout=None):
        return [job for job in self.running if job_id in (None, job["id"])]

    def descriptors(self):
        return self.kinds

    def children(self):
        return self.child_ids

    def threads(self):
        return self.thread_names


class Cluster:
    masters = 3

    def __init__(self, directory, replicas=1):
        self.replicas = replicas
        self.nodes = [Node(i, directory) for i in range(3 * (1 + replicas))]
        for node in self.nodes:
            node.views = {n.id: {"slots": ["%d-%d" % s] if s else [], "open": []} for n, s in
                          zip(self.nodes, [(0, 5460), (5461, 10922), (10923, 16383)] + [None] * 3 * replicas)}

    def shard_nodes(self, shard):
        return [n for n in self.nodes if n.shard == shard]

    def master_of(self, shard):
        return self.nodes[shard]

    def by_id(self, node_id):
        return next((n for n in self.nodes if n.id == node_id), None)

    owners = cluster.Cluster.owners
    owner_nodes = cluster.Cluster.owner_nodes


class There(checker.Contents):
    """What the owners have in the end."""

    def __init__(self, values, refused):
        self.values, self.refused = values, refused


def monitor(*samples):
    """(when, role, offset)"""
    return types.SimpleNamespace(samples=[(when, when + 0.01, 1, role, offset) for when, role, offset in samples])


class Test(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.cluster = Cluster(self.directory.name)
        self.history, self.values, self.crashes, self.moves = [], {}, [], []
        self.monitors = [monitor() for _ in self.cluster.nodes]
        self.refused = {}
        self.found, self.excused = [], collections.Counter()

    def op(self, what, key, value=None, reply=None, outcome="ok", node=0, at=None, lasts=0.5):
        """Each after the ones before, if not said otherwise."""
        at = 10.0 + len(self.history) if at is None else at
        self.history.append(checker.Operation((what, KEY + key, value, outcome, node, at, at + lasts, reply)))
        return self.history[-1]

    def there(self, **values):
        self.values.update((KEY + name.replace("_", ":"), value) for name, value in values.items())

    def move(self, source, target, slots=(SLOT,), began=0.0, ended=1.0, wait_replicas=None, done=True):
        plan = {"number": len(self.moves), "wait_replicas": wait_replicas}
        move = Move(plan, self.cluster.nodes[source], self.cluster.nodes[target], slots)
        move.id, move.began, move.ended, move.was_done = "job%d" % len(self.moves), began, ended, done
        self.moves.append(move)
        return move

    def excuses(self):
        return checker.Excuses(self.cluster, self.monitors, self.crashes, self.moves, 0)

    def check(self, owners=False):
        c = checker.Checker(sorted(self.history, key=lambda o: o.began), There(self.values, self.refused), self.excuses()).check()
        if owners:
            c.check_owners({n.index: n.shard for n in self.cluster.nodes}, self.moves)
        self.found, self.excused = c.violations, c.excused
        return c

    def violation(self, kind, text):
        self.found.append((kind, text))

    def kinds(self):
        return sorted({kind for kind, _ in self.found})

    def assertFinds(self, *kinds, owners=False):
        self.check(owners)
        self.assertEqual(sorted(kinds), self.kinds(), self.found)
        self.assertFalse(self.excused)

    def assertExcused(self, *kinds, owners=False):
        """Nothing wrong, and this excused (each the beginning of its name)."""
        self.check(owners)
        self.assertEqual([], self.found)
        excused = sorted(self.excused)
        self.assertEqual(len(kinds), len(excused), excused)
        self.assertTrue(all(e.startswith(k) for e, k in zip(excused, sorted(kinds))), excused)

    def replaced(self, graceful=False, knows_at=REPLACED_AT + 3):
        """Node 3 replaces node 0; what node 0 answered until 95 it had got."""
        self.monitors[0] = monitor((50, "master", 500), (95, "master", 950), (97, "master", 970), (99, "master", 990),
                                   (knows_at, "slave", 990))
        self.monitors[3] = monitor((50, "slave", 500), (99, "slave", 950), (REPLACED_AT, "master", 950))
        self.promoted(3, REPLACED_AT, graceful)

    def promoted(self, node, at, graceful):
        words = ["Manual failover user request accepted."] + [checker.GRACEFUL + ", manual failover can start."] * graceful
        with open(self.cluster.nodes[node].log, "w") as f:
            for line in words + ["Failover election won: I'm the new master."]:
                f.write("7:S %s * %s\n" % (datetime.datetime.fromtimestamp(at).strftime("%d %b %Y %H:%M:%S.000"), line))

    def crashed(self, since=0.0, slots=(SLOT,), **more):
        self.crashes.append(dict({"node": 0, "until": 100.0, "slots": set(slots), "since": since}, **more))


class Values(Test):
    """Of each kind of key: what is right, and each way to be wrong."""

    def test_right(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.op("llen", "rpush:c0", reply=1)
        self.op("rpush", "rpush:c0", "c0:2", None, "unknown")
        self.op("rpush", "rpush:c0", "c0:3", None, "refused")
        self.there(rpush_c0=["c0:1"])
        self.op("sadd", "sadd:c0", "c0:4", 1)
        self.there(sadd_c0=["c0:4"])
        self.op("incr", "incr:c0", "c0:5", 1)
        self.op("incr", "incr:c0", "c0:6", None, "unknown")
        self.op("incr", "incr:c0", "c0:7", 3)
        self.there(incr_c0="3")
        self.op("pair", "pair:c0", "c0:8", [1, 1])
        self.there(pair_c0_a=["c0:8"], pair_c0_b=["c0:8"])
        self.op("lua", "lua:c0", "c0:9", 1)
        self.there(lua_c0_n="1", lua_c0_l=["c0:9|0"])
        self.op("set", "reg:c0", "c0:10")
        self.op("get", "reg:c0", reply="c0:10")
        self.op("set", "reg:c0", "c0:11", None, "unknown")
        self.op("get", "reg:c0", reply="c0:11")
        self.there(reg_c0="c0:10")
        self.values["ttl:" + KEY + "reg:c0"] = 100
        self.op("set", "reg:c1", "c1:1")
        self.op("del", "reg:c1", "c1:2", 1)
        self.op("get", "reg:c1")
        self.assertFinds()

    def test_replaced_file_is_no_other_kind(self):
        self.assertEqual("file nodes.conf", cluster.kind_of_file("/d/nodes.conf"))
        self.assertEqual("file nodes.conf", cluster.kind_of_file("/d/nodes.conf (deleted)"))

    def test_lost_from_a_list(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.op("rpush", "rpush:c0", "c0:2", 2)
        self.there(rpush_c0=["c0:1"])
        self.assertFinds("lost")

    def test_unserved_slot(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.refused[SLOT] = "%srpush:c0 of node 0: CLUSTERDOWN Hash slot not served" % KEY
        self.assertFinds("unserved")

    def test_lost_from_a_set(self):
        self.op("sadd", "sadd:c0", "c0:1", 1)
        self.assertFinds("lost")

    def test_lost_increment(self):
        self.op("incr", "incr:c0", "c0:1", 1)
        self.op("incr", "incr:c0", "c0:2", 2)
        self.there(incr_c0="1")
        self.assertFinds("lost")

    def test_lost_increment_hidden_by_one_in_doubt(self):
        self.op("incr", "incr:c0", "c0:1", 1)
        self.op("incr", "incr:c0", "c0:2", None, "unknown")
        self.op("incr", "incr:c0", "c0:3", 1)
        self.there(incr_c0="2")
        self.assertFinds("went back")

    def test_lost_register(self):
        self.op("set", "reg:c0", "c0:1")
        self.assertFinds("lost")

    def test_lost_time_to_live(self):
        self.op("set", "reg:c0", "c0:1")
        self.there(reg_c0="c0:1")
        self.values["ttl:" + KEY + "reg:c0"] = -1
        self.assertFinds("lost")

    def test_lost_script(self):
        self.op("lua", "lua:c0", "c0:1", 1)
        self.op("lua", "lua:c0", "c0:2", 2)
        self.there(lua_c0_n="1", lua_c0_l=["c0:1|0"])
        self.assertFinds("lost")

    def test_doubled_in_a_list(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.there(rpush_c0=["c0:1", "c0:1"])
        self.assertFinds("doubled")

    def test_doubled_in_doubt(self):
        self.op("rpush", "rpush:c0", "c0:1", None, "unknown")
        self.there(rpush_c0=["c0:1", "c0:1"])
        self.assertFinds("doubled")

    def test_doubled_increment(self):
        self.op("incr", "incr:c0", "c0:1", 1)
        self.op("incr", "incr:c0", "c0:2", None, "unknown")
        self.there(incr_c0="3")
        self.assertFinds("doubled")

    def test_refused_but_there(self):
        self.op("rpush", "rpush:c0", "c0:1", None, "refused")
        self.there(rpush_c0=["c0:1"])
        self.assertFinds("refused but there")

    def test_never_written(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.there(rpush_c0=["c0:1", "c9:1"])
        self.assertFinds("never written")

    def test_register_never_written(self):
        self.op("get", "reg:c0", reply=None)
        self.there(reg_c0="c9:2")
        self.assertFinds("never written")

    def test_resurrected(self):
        self.op("set", "reg:c0", "c0:1")
        self.op("del", "reg:c0", "c0:2", 1)
        self.there(reg_c0="c0:1")
        self.assertFinds("resurrected")

    def test_stale_in_the_end(self):
        self.op("set", "reg:c0", "c0:1")
        self.op("set", "reg:c0", "c0:2")
        self.there(reg_c0="c0:1")
        self.assertFinds("stale")

    def test_stale_read_of_a_register(self):
        self.op("set", "reg:c0", "c0:1")
        self.op("set", "reg:c0", "c0:2")
        self.op("get", "reg:c0", reply="c0:1")
        self.there(reg_c0="c0:2")
        self.assertFinds("stale read")

    def test_read_of_what_was_deleted(self):
        self.op("set", "reg:c0", "c0:1")
        self.op("del", "reg:c0", "c0:2", 1)
        self.op("get", "reg:c0", reply="c0:1")
        self.assertFinds("stale read")

    def test_stale_length(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.op("llen", "rpush:c0", reply=0)
        self.there(rpush_c0=["c0:1"])
        self.assertFinds("stale read")

    def test_out_of_order(self):
        self.op("rpush", "rpush:c0", "c0:1", 1)
        self.op("rpush", "rpush:c0", "c0:2", 2)
        self.there(rpush_c0=["c0:2", "c0:1"])
        self.assertFinds("order")

    def test_torn_transaction(self):
        self.op("pair", "pair:c0", "c0:1", None, "unknown")
        self.there(pair_c0_b=["c0:1"])
        self.assertFinds("transaction torn")

    def test_torn_replies(self):
        self.op("pair", "pair:c0", "c0:1", [1, 1])
        self.op("pair", "pair:c0", "c0:2", [2, 1])
        self.there(pair_c0_a=["c0:1", "c0:2"], pair_c0_b=["c0:1", "c0:2"])
        self.assertFinds("transaction torn")

    def test_torn_script(self):
        self.op("lua", "lua:c0", "c0:1", None, "unknown")
        self.there(lua_c0_n="1")
        self.assertFinds("script torn")

    def test_script_read_old_value(self):
        self.op("lua", "lua:c0", "c0:1", 1)
        self.op("lua", "lua:c0", "c0:2", 1)
        self.there(lua_c0_n="2", lua_c0_l=["c0:1|0", "c0:2|0"])
        self.assertFinds("script torn")


class Owners(Test):
    """Each by another shard: how often the server changed."""

    def served_by(self, *nodes):
        for i, node in enumerate(nodes):
            self.op("rpush", "rpush:c0", "c0:%d" % i, i + 1, node=node, at=90.0 + i)
        self.there(rpush_c0=["c0:%d" % i for i in range(len(nodes))])

    def test_moved(self):
        self.served_by(0, 0, 1, 1)
        self.move(0, 1)
        self.assertFinds(owners=True)

    def test_there_and_back(self):
        self.served_by(0, 1, 0)
        self.move(0, 1)
        self.move(1, 0)
        self.assertFinds(owners=True)

    def test_two_owners(self):
        self.served_by(0, 1, 0)
        self.move(0, 1)
        self.assertFinds("two owners", owners=True)

    def test_move_that_failed(self):
        self.served_by(0, 1)
        self.move(0, 1, done=False)
        self.assertFinds("two owners", owners=True)

    def test_move_of_another_slot(self):
        self.served_by(0, 1)
        self.move(0, 1, slots=(SLOT + 1,))
        self.assertFinds("two owners", owners=True)

    def test_at_the_same_time(self):
        """Which of two that overlap was first is not known."""
        self.op("rpush", "rpush:c0", "c0:1", 1, node=0, at=90.0, lasts=2.0)
        self.op("rpush", "rpush:c0", "c0:2", 2, node=1, at=91.0)
        self.op("rpush", "rpush:c0", "c0:3", 3, node=1, at=93.0)
        self.there(rpush_c0=["c0:1", "c0:2", "c0:3"])
        self.move(0, 1)
        self.assertFinds(owners=True)

    def test_successor_is_the_same_shard(self):
        self.served_by(0, 3)
        self.assertFinds(owners=True)

    def test_replaced_one_goes_on(self):
        """Node 0 does not know yet that it was replaced, and that its successor gave the slot away."""
        self.replaced()
        self.served_by(0, 0, 0, 0, 0, 0, 0, 0, 0)           # 98 is the last
        self.op("rpush", "rpush:c0", "c0:9", 10, node=1, at=101.0)
        self.op("rpush", "rpush:c0", "c0:10", 10, node=0, at=102.0)
        self.there(rpush_c0=["c0:%d" % i for i in range(10)])
        self.move(3, 1)
        self.check(owners=True)
        self.assertEqual([], self.found)
        self.assertTrue(self.excused["served by two shards"])

    def test_replaced_one_excuses_nobody_else(self):
        """What shards 1 and 2 do to each other has nothing to do with it."""
        self.replaced()
        self.served_by(1, 2, 1, 0)
        self.op("rpush", "rpush:c0", "c0:4", 5, node=0, at=101.0)
        self.there(rpush_c0=["c0:%d" % i for i in range(5)])
        self.move(1, 0)
        self.assertFinds("two owners", owners=True)


class Failovers(Test):
    """Node 3 replaced node 0, which answered until it knew: from 95 to 103 that may be lost, of node 0 only."""

    def lost(self, at, node=0, lasts=0.1):
        self.op("rpush", "rpush:c0", "c0:1", 1, node=node, at=at, lasts=lasts)

    def test_excused(self):
        self.replaced()
        self.lost(98.0)
        self.assertExcused("lost: node 3 replaced it")

    def test_excused_after_it(self):
        self.replaced()
        self.lost(102.0)
        self.assertExcused("lost: node 3 replaced it")

    def test_restarted_with_an_old_file_before_it_was_replaced(self):
        self.replaced()
        self.monitors[0] = monitor((50, "master", 500), (95, "master", 950), (99.5, "master", 400), (103, "slave", 950))
        self.lost(98.0)
        self.assertExcused("lost: node 3 replaced it")

    def test_answer_read_late(self):
        self.replaced()
        self.lost(102.9, lasts=0.5)
        self.assertExcused("lost: node 3 replaced it")

    def test_before(self):
        self.replaced()
        self.lost(94.0)
        self.assertFinds("lost")

    def test_when_it_knew(self):
        self.replaced()
        self.lost(103.5)
        self.assertFinds("lost")

    def test_of_another_node(self):
        self.replaced()
        self.lost(98.0, node=1)
        self.assertFinds("lost")

    def test_of_the_successor(self):
        self.replaced()
        self.lost(101.0, node=3)
        self.assertFinds("lost")

    def test_graceful(self):
        self.replaced(graceful=True)
        self.lost(98.0)
        self.assertFinds("lost")

    def test_one_that_was_stopped_for_long(self):
        """It stays a master without slots; it hears of it when it goes on at 128."""
        self.replaced()
        self.monitors[0].samples[-1] = (99.5, 128.0, 1, "master", 990)
        self.lost(129.0)
        self.assertExcused("lost: node 3 replaced it")
        self.history[:] = []
        self.lost(150.0)
        self.assertFinds("lost")

    def test_doubled_is_never_excused(self):
        self.replaced()
        self.op("rpush", "rpush:c0", "c0:1", 1, at=98.0)
        self.there(rpush_c0=["c0:1", "c0:1"])
        self.assertFinds("doubled")

    def test_torn_is_never_excused(self):
        self.replaced()
        self.op("pair", "pair:c0", "c0:1", [1, 1], at=98.0)
        self.there(pair_c0_a=["c0:1"])
        self.check()
        self.assertIn("transaction torn", self.kinds())

    def test_increments_as_many_as_excusable(self):
        self.replaced()
        self.op("incr", "incr:c0", "c0:1", 1, at=90.0)
        self.op("incr", "incr:c0", "c0:2", 2, at=98.0)
        self.there(incr_c0="1")
        self.assertExcused("lost INCRs", "lost:")

    def test_increments_more_than_excusable(self):
        self.replaced()
        self.op("incr", "incr:c0", "c0:1", 1, at=89.0)
        self.op("incr", "incr:c0", "c0:2", 2, at=90.0)
        self.op("incr", "incr:c0", "c0:3", 3, at=98.0)
        self.there(incr_c0="1")
        self.check()
        self.assertIn("lost", self.kinds())

    def test_counter_went_back(self):
        self.replaced()
        self.op("incr", "incr:c0", "c0:1", 1, at=90.0)
        self.op("incr", "incr:c0", "c0:2", 2, at=98.0)
        self.op("incr", "incr:c0", "c0:3", 2, node=3, at=101.0)
        self.there(incr_c0="2")
        self.assertExcused("counter went back", "lost INCRs")

    def test_counter_went_back_too_far(self):
        self.replaced()
        self.op("incr", "incr:c0", "c0:1", 1, at=89.0)
        self.op("incr", "incr:c0", "c0:2", 2, at=90.0)
        self.op("incr", "incr:c0", "c0:3", 3, at=98.0)
        self.op("incr", "incr:c0", "c0:4", 2, node=3, at=101.0)
        self.there(incr_c0="2")
        self.check()
        self.assertIn("went back", self.kinds())

    def test_stale_register(self):
        self.replaced()
        self.op("set", "reg:c0", "c0:1", at=90.0)
        self.op("set", "reg:c0", "c0:2", at=98.0)
        self.op("get", "reg:c0", reply="c0:1", node=3, at=101.0)
        self.there(reg_c0="c0:1")
        self.assertExcused("older value", "stale read")

    def test_stale_register_before(self):
        self.replaced()
        self.op("set", "reg:c0", "c0:1", at=90.0)
        self.op("del", "reg:c0", "c0:2", 1, at=92.0)
        self.op("set", "reg:c0", "c0:3", at=98.0)
        self.op("get", "reg:c0", reply="c0:1", node=3, at=101.0)
        self.there(reg_c0="c0:1")
        self.check()
        self.assertEqual(["stale", "stale read"], self.kinds())

    def test_read_from_the_replaced_one(self):
        self.replaced()
        self.op("set", "reg:c0", "c0:1", at=90.0)
        self.op("set", "reg:c0", "c0:2", node=3, at=100.2)
        self.op("get", "reg:c0", reply="c0:1", node=0, at=101.0)
        self.there(reg_c0="c0:2")
        self.assertExcused("stale read")

    def test_length_shorter_than_excusable(self):
        self.replaced()
        self.op("rpush", "rpush:c0", "c0:1", 1, at=90.0)
        self.op("rpush", "rpush:c0", "c0:2", 2, at=98.0)
        self.op("llen", "rpush:c0", reply=0, node=3, at=101.0)
        self.there(rpush_c0=["c0:1"])
        self.check()
        self.assertEqual(["stale read"], self.kinds())

    def test_target_that_did_not_ask_its_replicas(self):
        """WAITREPLICAS 0: what it had taken just before it was replaced is not known to its successor."""
        self.replaced()
        self.move(1, 0, began=93.0, ended=96.0, wait_replicas=0)
        self.lost(92.0, node=1)
        self.assertExcused("lost: node 0 lost its data")

    def test_target_that_asked_its_replicas(self):
        self.replaced()
        self.move(1, 0, began=93.0, ended=96.0)
        self.lost(92.0, node=1)
        self.assertFinds("lost")

    def test_target_that_did_not_ask_long_before(self):
        self.replaced()
        self.move(1, 0, began=80.0, ended=85.0, wait_replicas=0)
        self.lost(79.0, node=1)
        self.assertFinds("lost")


class Crashes(Test):
    """Node 0 came back at 100 with what it had saved."""

    def lost(self, at, node=0):
        self.op("rpush", "rpush:c0", "c0:1", 1, node=node, at=at, lasts=0.1)

    def test_excused(self):
        self.crashed(since=50.0)
        self.lost(60.0)
        self.assertExcused("lost: node 0 lost its data")

    def test_saved(self):
        self.crashed(since=50.0)
        self.lost(40.0)
        self.assertFinds("lost")

    def test_after_it(self):
        self.crashed(since=50.0)
        self.lost(101.0)
        self.assertFinds("lost")

    def test_another_slot(self):
        self.crashed(since=50.0, slots=(SLOT + 1,))
        self.lost(60.0)
        self.assertFinds("lost")

    def test_arrived_after_the_save(self):
        self.crashed(since=50.0)
        self.move(1, 0, began=55.0, ended=60.0)
        self.lost(40.0, node=1)
        self.assertExcused("lost: node 0 lost its data")

    def test_arrived_before_the_save(self):
        self.crashed(since=50.0)
        self.move(1, 0, began=35.0, ended=45.0)
        self.lost(34.0, node=1)
        self.assertFinds("lost")

    def test_appended(self):
        """An append-only file that had no room for the last writes has all else, also what arrived."""
        self.crashed(since=50.0, all_else_kept=True)
        self.move(1, 0, began=55.0, ended=60.0)
        self.lost(40.0, node=1)
        self.assertFinds("lost")

    def test_saved_as_a_replica(self):
        """What it saved at 50 its master had at 30."""
        self.crashed(since=50.0)
        self.monitors[0] = monitor((40, "slave", 300), (49, "slave", 300), (60, "master", 700))
        self.monitors[3] = monitor((30, "master", 300), (35, "master", 400), (55, "slave", 700))
        self.promoted(0, 60, graceful=True)
        self.lost(33.0, node=3)
        self.assertExcused("lost: node 0 lost its data")
        self.history[:] = []
        self.lost(29.0, node=3)
        self.assertFinds("lost")

    def test_doubled(self):
        self.crashed()
        self.op("rpush", "rpush:c0", "c0:1", 1, at=60.0)
        self.there(rpush_c0=["c0:1", "c0:1"])
        self.assertFinds("doubled")

    def test_not_all_after_it(self):
        """It is the last write that counts: what came after the crash must be there."""
        self.crashed(since=50.0)
        self.op("set", "reg:c0", "c0:1", at=40.0)
        self.op("set", "reg:c0", "c0:2", at=101.0)
        self.there(reg_c0="c0:1")
        self.assertFinds("stale")


class Nodes(Test):
    """What the nodes are like when all is quiet."""

    def test_slots(self):
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual([], self.found)

    def test_orphan_keys(self):
        self.cluster.nodes[1].counts[7] = 3
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual(["orphan keys"], self.kinds())
        self.assertIn("(7, 3)", self.found[0][1])

    def test_orphan_keys_of_a_replica(self):
        self.cluster.nodes[4].counts[7] = 3
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual(["orphan keys"], self.kinds())

    def test_own_keys(self):
        self.cluster.nodes[0].counts[7] = self.cluster.nodes[3].counts[7] = 3
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual([], self.found)

    def test_slot_without_owner(self):
        self.cluster.nodes[0].views["id0"]["slots"] = ["0-5459"]
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual(["slots without owner"], self.kinds())

    def test_slot_left_open(self):
        self.cluster.nodes[0].views["id0"]["open"] = ["[7->-id1]"]
        state.check_slots(self.cluster, self.violation, 0)
        self.assertEqual(["slot left open"], self.kinds())

    def digests(self, *of_nodes):
        for node, digest in zip(self.cluster.nodes, of_nodes):
            node.replies.update({"DEBUG DIGEST": digest, "DBSIZE": 1})
        state.check_replicas(self.cluster, self.violation, 0)

    def test_replicas(self):
        self.digests("a", "b", "c", "a", "b", "c")
        self.assertEqual([], self.found)

    def test_replica_differs(self):
        self.digests("a", "b", "c", "a", "x", "c")
        self.assertEqual(["replica differs"], self.kinds())
        self.assertIn("node 4", self.found[0][1])

    def fixed(self, missing=(), wrong=()):
        tags = {slot: str(slot) for slot in range(16384)}
        for node, slots in ((n, state.ranges_to_slots(v["slots"])) for n, v in
                            ((self.cluster.by_id(i), v) for i, v in self.cluster.nodes[0].views.items())):
            for slot in slots:
                node.replies["GET", state.fixed_key(tags, slot)] = None if slot in missing else (
                    "x" if slot in wrong else state.fixed_value(slot))
        self.tags = tags
        state.check_fixed(self.cluster, tags, 10.0, self.excuses(), self.violation, self.excused)

    def test_fixed_data(self):
        self.fixed()
        self.assertEqual([], self.found)

    def test_fixed_data_lost(self):
        self.fixed(missing=(7,), wrong=(6000,))
        self.assertEqual(2, len(self.found))
        self.assertEqual(["lost"], self.kinds())

    def test_fixed_data_changed_is_not_excused(self):
        self.crashed(slots=(slot_of(state.fixed_key({7: "7", 8: "8"}, s)) for s in (7, 8)))
        self.fixed(missing=(7,), wrong=(8,))
        self.assertEqual(1, len(self.found))
        self.assertEqual(1, sum(self.excused.values()))

    def deaths(self, no_fork=()):
        state.check_deaths(self.cluster, set(no_fork), self.violation, self.excused)

    def gave_up(self, no_fork):
        self.cluster.nodes[2].died.append((50.0, 1))
        with open(self.cluster.nodes[2].log, "w") as f:
            f.write("7:S 01 Jan 2026 00:00:00.000 # FATAL: AOF can't be turned on. Exiting now.\n")
        self.deaths(no_fork)

    def test_gave_its_aof_up(self):
        self.gave_up(no_fork={2})
        self.assertEqual([], self.found)
        self.assertEqual(1, sum(self.excused.values()))

    def test_gave_its_aof_up_without_cause(self):
        self.gave_up(no_fork={1})
        self.assertEqual(["died"], self.kinds())

    def test_died_though_it_once_gave_its_aof_up(self):
        self.cluster.nodes[2].died.append((40.0, 1))
        self.gave_up(no_fork={2})
        self.assertEqual(["died"], self.kinds())

    def test_died(self):
        self.cluster.nodes[2].died.append((50.0, -11))
        self.deaths()
        self.assertEqual(["died"], self.kinds())

    def test_crashed(self):
        with open(self.cluster.nodes[2].log, "w") as f:
            f.write("7:M 01 Jan 2026 00:00:00.000 # === ASSERTION FAILED ===\n")
        self.deaths()
        self.assertEqual(["crashed"], self.kinds())


class Jobs(Test):
    def ends(self, source, target, disturbed=()):
        self.move(0, 1)
        for node, role, job_state in ((0, "source", source), (1, "target", target)):
            self.cluster.nodes[node].running = [{"id": "job0", "role": role, "state": job_state}]
        state.check_ends_agree(self.cluster, self.moves, self.monitors, set(disturbed), self.violation)

    def test_ends_agree(self):
        self.ends("done", "done")
        self.assertEqual([], self.found)
        self.assertTrue(self.moves[0].was_done)

    def test_both_failed(self):
        self.ends("failed", "cancelled")
        self.assertEqual([], self.found)
        self.assertFalse(self.moves[0].was_done)

    def test_ends_disagree(self):
        self.ends("failed", "done")
        self.assertEqual(["ends disagree"], self.kinds())

    def test_ends_of_one_that_lost_its_data(self):
        self.ends("failed", "done", disturbed=(0,))
        self.assertEqual([], self.found)

    def test_ends_of_others(self):
        self.ends("failed", "done", disturbed=(2, 3))
        self.assertEqual(["ends disagree"], self.kinds())

    def unended(self, reason):
        self.cluster.nodes[0].running = [{"id": "job0", "role": "source", "state": "committed", "reason": reason,
                                          "slots": "7", "target": "id1"}]
        state.wait_jobs_end(self.cluster, self.crashes, self.violation, self.excused, 0)

    def test_does_not_end(self):
        self.unended("waits")
        self.assertEqual(["job does not end"], self.kinds())

    def test_waits_for_an_operator(self):
        self.crashed(node=1)
        self.unended("the target has lost it: CLUSTER CANCEL-SLOT-MIGRATIONS")
        self.assertEqual([], self.found)
        self.assertEqual(1, sum(self.excused.values()))

    def test_waits_for_an_operator_without_a_crash(self):
        self.unended("the target has lost it: CLUSTER CANCEL-SLOT-MIGRATIONS")
        self.assertEqual(["job does not end"], self.kinds())


class GivenBack(Test):
    def kept(self):
        before = collections.Counter({"listening": 2, "pipe": 4, "anon_inode:[eventpoll]": 1, "file nodes.conf": 1})
        return state.kept(self.cluster.nodes[0], before, len(self.cluster.nodes))

    def test_nothing_kept(self):
        self.assertEqual([], self.kept())

    def test_memory_of_migrations(self):
        self.cluster.nodes[0].sections["memory"] = {"mem_cluster_slot_migration_queues": "1", "used_memory": "5"}
        self.assertEqual(1, len(self.kept()))

    def test_migration(self):
        self.cluster.nodes[0].info_fields["cluster_slot_migrations_importing"] = "1"
        self.assertEqual(1, len(self.kept()))

    def test_threads(self):
        for name in "slot_loader", "slot_saver":
            self.cluster.nodes[0].thread_names = ["redis-server", name]
            self.assertEqual(1, len(self.kept()))

    def test_child(self):
        self.cluster.nodes[0].child_ids = ["7"]
        self.assertEqual(1, len(self.kept()))

    def test_descriptors(self):
        for kind in ("from clients", "to another", "to another's bus", "bus, from others", "socket that is not connected",
                     "pipe", "file appendonly.aof.N.incr.aof"):
            node = self.cluster.nodes[0] = Node(0, self.directory.name)
            node.kinds[kind] += 5
            self.assertEqual(1, len(self.kept()), kind)

    def test_link_to_the_master(self):
        node = self.cluster.nodes[0]
        node.sections["replication"] = {"role": "slave", "connected_slaves": "0", "master_link_status": "up"}
        node.sections["clients"]["connected_clients"] = "2"
        node.kinds["to another"] += 1
        self.assertEqual([], self.kept())
        node.kinds["to another"] += 1
        self.assertEqual(1, len(self.kept()))
        node.kinds["from clients"] += 1     # INFO counts the master among the clients
        self.assertEqual(2, len(self.kept()))

    def test_memory_of_an_empty_node(self):
        for node in self.cluster.nodes:
            node.replies = collections.defaultdict(lambda: "OK", DBSIZE=0)
            node.sections["memory"] = {"mem_clients_normal": "1000", "mem_clients_slaves": "1000", "mem_replication_backlog": "1000",
                                       "mem_cluster_links": "1000", "mem_aof_buffer": "1000", "used_memory": "5005000"}
        before = state.own_memory(self.cluster.nodes[0])
        self.cluster.nodes[1].sections["memory"]["mem_replication_backlog"] = "5001000"
        self.cluster.nodes[1].sections["memory"]["used_memory"] = "10005000"
        state.check_memory(self.cluster, before, self.violation, lambda text: None, 0)
        self.assertEqual([], self.found)
        self.cluster.nodes[4].sections["memory"]["used_memory"] = str(5005000 + state.SPARE_MEMORY + 1)
        state.check_memory(self.cluster, before, self.violation, lambda text: None, 0)
        self.assertEqual(["memory not given back"], self.kinds())


class Schedules(unittest.TestCase):
    def test_a_seed_repeats_it(self):
        for make in (lambda seed: schedule.nemesis(seed, 60, 3, 1, 2.0, "all"), lambda seed: schedule.migrations(seed, 50)):
            self.assertEqual(make(7), make(7))
            self.assertNotEqual(make(7), make(8))

    def test_stops(self):
        lengths = [e["length"] for seed in range(300) for e in schedule.nemesis(seed, 60, 3, 1, 2.0, "hard")
                   if e["name"].startswith("stop-") and e["name"] != "stop-two"]
        self.assertTrue(min(lengths) < 2 and max(lengths) > 25, (min(lengths), max(lengths)))


# ---- as upstream's runner prints it ----

class Result(unittest.TestResult):
    def name(self, test):
        words = test.id().split(".")[-2:]
        return "chaos checker, %s: %s" % (re.sub(r"(?<!^)(?=[A-Z])", " ", words[0]).lower(), words[-1][5:].replace("_", " "))

    def addSuccess(self, test):
        print("[ok]: %s" % self.name(test))

    def addFailure(self, test, error):
        super().addFailure(test, error)
        print("[err]: %s\n%s" % (self.name(test), self.failures[-1][1]))

    def addError(self, test, error):
        super().addError(test, error)
        print("[err]: %s\n%s" % (self.name(test), self.errors[-1][1]))


def main():
    loader = unittest.TestLoader()
    loader.testNamePatterns = ["*%s*" % name for name in sys.argv[1:]] or None
    result = Result()
    loader.loadTestsFromModule(sys.modules[__name__]).run(result)
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == "__main__":
    sys.exit(main())
