# nemesis.py -- does to the cluster what the schedule says, and undoes it.
#
# Each event is a method; it begins something and may return what undoes it, which is
# called when the event's length is over, or at the end of the run. What may have lost
# writes by itself is put down in `crashes` for the checker (promotions it sees itself).
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import heapq
import json
import os
import signal
import subprocess
import time

from chaoslib.cluster import TROUBLE, now, ranges_to_slots
from chaoslib.resp import Unknown
from chaoslib.schedule import ANY_FORK, CRASH_POINTS, FAIL_POINTS, PAUSE_POINTS, SETTINGS


class Skipped(Exception):
    """Nobody is there to do it to at the moment."""


class Nemesis:
    def __init__(self, cluster, persistence, timeout, log, violation):
        self.cluster, self.proxy = cluster, cluster.proxy
        self.persistence, self.timeout, self.log, self.violation = persistence, timeout, log, violation
        self.crashes = []       # a master that came back without its data or with old data
        self.no_fork = set()    # nodes whose forks failed for a while
        self.cut_off = collections.Counter()    # nodes whose bus is held
        self.done = {}
        self.settings = {}      # (node, name): as it was before all events, which may overlap
        self.left = []          # what could not be undone, as its node did not answer
        self.agenda = []        # (when, number, what to call, its event)
        self.number = 0

    # ---- running the schedule ----

    def run(self, events, began, seconds, ended):
        for event in events:
            self.plan(began + event["at"], self.begin, event)
        adopted = began
        while now() < began + seconds and not ended():
            if self.agenda and self.agenda[0][0] <= now():
                _, _, call, event = heapq.heappop(self.agenda)
                call(event)
            else:
                for node in self.cluster.nodes:
                    node.alive()        # notes those that died
                if now() > adopted + 1:
                    self.cluster.adopt(self.log, self.violation)
                    adopted = now()
                time.sleep(0.05)

    def plan(self, when, call, event):
        self.number += 1
        heapq.heappush(self.agenda, (when, self.number, call, event))

    def begin(self, event):
        name = event["name"]
        try:
            undo = getattr(self, name.replace("-", "_"))(event)
        except Skipped as why:
            self.count(name + " (skipped)")
            self.log("nemesis %s: skipped, %s" % (name, why))
            return
        except TROUBLE as error:
            self.count(name + " (not possible)")
            self.log("nemesis %s: not possible: %s" % (name, error))
            return
        self.count(name)
        if undo:
            self.plan(now() + event["length"], lambda event: self.finish(name, undo, event), event)

    def finish(self, name, undo, event):
        """A node that does not answer is asked again soon: forks that fail for long end it. No `event`: when all is over."""
        self.log("nemesis %s: over" % name)
        try:
            undo()
        except TROUBLE as error:
            if event:
                self.plan(now() + 1, lambda event: self.finish(name, undo, event), event)
            else:
                self.left.append((name, undo))
            self.log("nemesis %s: not undone yet: %s" % (name, error))

    def count(self, name):
        self.done[name] = self.done.get(name, 0) + 1

    def finish_all(self):
        while self.agenda:
            _, _, call, event = heapq.heappop(self.agenda)
            if call != self.begin:
                call(None)

    def heal(self):
        """Undo what is under way, then make sure."""
        self.finish_all()
        everybody = [n.index for n in self.cluster.nodes]
        for i in everybody:
            for j in everybody:
                for kind in ("data", "bus") if i != j else ():
                    self.proxy.do(do="pass", **{"from": i, "to": j, "kind": kind})
                    self.proxy.do(do="slow", **{"from": i, "to": j, "kind": kind}, delay=0, rate=0)
        for node in self.cluster.nodes:
            node.go_on()
        for node in self.cluster.nodes:
            if not node.alive():
                self.restart(node)
        self.finish_all()
        for node in self.cluster.nodes:
            self.settle(node)
        left, self.left = self.left, []
        for name, undo in left:
            self.finish(name, undo, None)

    def settle(self, node):
        points = sorted({ANY_FORK, *PAUSE_POINTS, *FAIL_POINTS, *CRASH_POINTS} - set(node.fail_points))
        for _ in range(100):
            try:
                node.call("CLIENT", "UNPAUSE")
                node.fail_points_off(points)
                return
            except TROUBLE:
                time.sleep(0.2)

    # ---- whom ----

    def master(self, shard):
        node = self.cluster.master_of(shard)
        if node is None:
            raise Skipped("shard %d has no master that answers" % shard)
        return node

    def replica(self, shard):
        node = self.cluster.a_replica_of(shard)
        if node is None:
            raise Skipped("shard %d has no replica that answers" % shard)
        return node

    def node(self, event):
        if event["replica"] and self.cluster.replicas:
            return self.replica(event["shard"])
        return self.master(event["shard"])

    def other_shard(self, event):
        return [s for s in range(self.cluster.masters) if s != event["shard"]][event["other"]]

    def say(self, event, text):
        self.log("nemesis %s (%.1f s): %s" % (event["name"], event["length"], text))

    # ---- links ----

    def ways(self, some, others, kinds=("data", "bus"), both=True):
        found = []
        for i in some:
            for j in others:
                if i.index != j.index:
                    found += [(i.index, j.index, kind) for kind in kinds]
                    found += [(j.index, i.index, kind) for kind in kinds if both]
        return found

    def hold(self, ways):
        cut = [i for i, j, kind in ways if kind == "bus"] + [j for i, j, kind in ways if kind == "bus"]
        self.cut_off.update(cut)
        for i, j, kind in ways:
            self.proxy.do(do="hold", **{"from": i, "to": j, "kind": kind})

        def undo():
            self.cut_off.subtract(cut)
            self.cut_off += collections.Counter()
            for i, j, kind in ways:
                self.proxy.do(do="pass", **{"from": i, "to": j, "kind": kind})
        return undo

    def slow(self, ways, delay, rate):
        for i, j, kind in ways:
            self.proxy.do(do="slow", **{"from": i, "to": j, "kind": kind}, delay=delay, rate=rate)

        def undo():
            for i, j, kind in ways:
                self.proxy.do(do="slow", **{"from": i, "to": j, "kind": kind}, delay=0, rate=0)
        return undo

    def close(self, ways):
        for i, j, kind in ways:
            self.proxy.do(do="close", **{"from": i, "to": j, "kind": kind})

    def shard(self, number):
        return self.cluster.shard_nodes(number)

    def drop_migration(self, event):
        other = self.other_shard(event)
        self.say(event, "connections between shards %d and %d" % (event["shard"], other))
        self.close(self.ways(self.shard(event["shard"]), self.shard(other), ["data"]))

    def cut_migration(self, event):
        other = self.other_shard(event)
        both = event["a"] < 0.5
        self.say(event, "data between shards %d and %d%s" % (event["shard"], other, "" if both else ", one way"))
        return self.hold(self.ways(self.shard(event["shard"]), self.shard(other), ["data"], both))

    def slow_migration(self, event):
        other = self.other_shard(event)
        delay, rate = 0.03 * event["a"], 50000 + 1000000 * event["b"]
        self.say(event, "data between shards %d and %d: %.0f ms, %.0f bytes/s" % (event["shard"], other, delay * 1000, rate))
        return self.slow(self.ways(self.shard(event["shard"]), self.shard(other), ["data"]), delay, rate)

    def drop_replication(self, event):
        self.say(event, "within shard %d" % event["shard"])
        self.close(self.ways(self.shard(event["shard"]), self.shard(event["shard"]), ["data"]))

    def drop_bus(self, event):
        node = self.node(event)
        self.say(event, "of %s" % node)
        self.close(self.ways([node], self.cluster.nodes, ["bus"]))

    def slow_node(self, event):
        node = self.node(event)
        delay, rate = 0.05 * event["a"], 200000 + 2000000 * event["b"]
        self.say(event, "%s: %.0f ms, %.0f bytes/s" % (node, delay * 1000, rate))
        return self.slow(self.ways([node], self.cluster.nodes), delay, rate)

    def partition_short(self, event):
        node, both = self.node(event), event["a"] < 0.6
        self.say(event, "%s%s" % (node, "" if both else ", what it sends"))
        return self.hold(self.ways([node], self.cluster.nodes, both=both))

    def partition_replica(self, event):
        node, both = self.replica(event["shard"]), event["a"] < 0.6
        self.say(event, "%s%s" % (node, "" if both else ", what it sends"))
        return self.hold(self.ways([node], self.cluster.nodes, both=both))

    def partition(self, event):
        node = self.master(event["shard"])
        self.say(event, str(node))
        return self.hold(self.ways([node], self.cluster.nodes))

    def partition_one_way(self, event):
        node, sends = self.master(event["shard"]), event["a"] < 0.5
        self.say(event, "%s, what it %s" % (node, "sends" if sends else "is sent"))
        return self.hold(self.ways([node], self.cluster.nodes, both=False) if sends
                         else self.ways(self.cluster.nodes, [node], both=False))

    def partition_halves(self, event):
        some = [n for n in self.cluster.nodes if int(event["a"] * 1000003) >> n.index & 1]
        others = [n for n in self.cluster.nodes if n not in some]
        if not some or not others:
            raise Skipped("one half is empty")
        self.say(event, "nodes %s and %s" % ([n.index for n in some], [n.index for n in others]))
        return self.hold(self.ways(some, others))

    # ---- processes ----

    def stop_short(self, event):
        node = self.node(event)
        self.say(event, str(node))
        node.stop()
        return node.go_on

    def stop_long(self, event):
        return self.stop_short(event)

    def stop_very_long(self, event):
        return self.stop_short(event)

    def sleep(self, event):
        node = self.node(event)
        self.say(event, str(node))
        c = node.connect()
        c.send(("DEBUG", "SLEEP", "%.2f" % event["length"]))
        return c.close

    def mortal(self, shard, together=1):
        """A master that may die, with so many: its replica has all and will be elected, or it comes back with what
        it saved. (Without replicas and files, dying is what such a cluster does.)"""
        node = self.master(shard)
        if self.cluster.replicas and self.persistence == "none":
            replica = self.replica(shard)
            if replica.info("replication").get("master_link_status") != "up":
                raise Skipped("%s is the only one to have its data" % node)
            voters = [self.cluster.by_id(name) for name, view in node.nodes_view().items() if view["slots"]]
            able = sum(bool(n) and n.alive() and not n.stopped for n in voters)     # one that died is not FAIL at once
            if able - together < len(voters) // 2 + 1:
                raise Skipped("nobody could elect a successor")
        return node

    def kill(self, event, number=signal.SIGKILL):
        node = self.mortal(event["shard"])
        self.say(event, str(node))
        node.kill(number)
        return lambda: self.restart(node)

    def shutdown(self, event):
        return self.kill(event, signal.SIGTERM)

    def kill_two(self, event):
        """Two masters at once, such as a migration's source and target."""
        nodes = [self.mortal(shard, 2) for shard in (event["shard"], self.other_shard(event))]
        self.say(event, " and ".join(map(str, nodes)))
        for node in nodes:
            node.kill()

        def undo():
            for node in nodes:
                self.restart(node)
        return undo

    def stop_two(self, event):
        nodes = [self.master(shard) for shard in (event["shard"], self.other_shard(event))]
        self.say(event, " and ".join(map(str, nodes)))
        for node in nodes:
            node.stop()

        def undo():
            for node in nodes:
                node.go_on()
        return undo

    def disk_full(self, event):
        """A file system without room, files that can grow no more, or not beyond what nodes.conf takes. A server that
        cannot write its nodes.conf ends: that is upstream's way."""
        replica = event["replica"] and self.cluster.replicas
        node = self.replica(event["shard"]) if replica else self.mortal(event["shard"])
        way = int(event["a"] * 3) if node.has_own_disk else 1 + int(event["a"] * 2)
        size = int(16384 + 500000 * event["b"] ** 2) if way == 2 else 0
        self.say(event, "%s%s" % (node, "" if way == 0 else ", no file beyond %d bytes" % size))
        node.expected_dead = True
        filled = now()
        if way == 0:
            node.fill_disk()
        else:
            node.limit_files(size)
        node.try_call("BGSAVE")

        def undo():
            if way == 0:
                node.empty_disk()
            elif node.process.poll() is None:
                node.limit_files(-1)
            until = now() + 5       # it may be about to end all the same
            while node.process.poll() is None and not node.stopped and node.try_call("PING") != "PONG" and now() < until:
                time.sleep(0.05)
            if node.process.poll() is None:
                node.expected_dead = False
            else:
                self.log("nemesis disk-full: %s has ended" % node)
                self.count("disk-full that ended it")
                # With appendfsync everysec the first write that does not fit is answered all the same.
                slots = self.seen_slots(node)
                if slots and self.persistence == "aof":
                    self.crashes.append({"node": node.index, "until": now(), "slots": slots, "since": filled, "all_else_kept": True})
                self.restart(node)
        return undo

    def restart_replica(self, event):
        node = self.replica(event["shard"])
        self.say(event, str(node))
        node.kill()
        return lambda: self.restart(node)

    def crash_at(self, event):
        """Dies where a migration comes to this point; if none does in time, nothing happens."""
        point = CRASH_POINTS[int(event["a"] * len(CRASH_POINTS))]
        node = self.mortal(event["shard"])
        self.say(event, "%s at %s" % (node, point))
        node.expected_dead = True
        node.fail_point(point, "crash")

        def undo():
            if node.process.poll() is None:
                try:
                    node.fail_point(point, "off")
                except TROUBLE:
                    try:
                        node.process.wait(1)        # it comes there at this moment
                    except subprocess.TimeoutExpired:
                        pass                        # it stands still
                node.expected_dead = node.process.poll() is not None
            if node.process.poll() is not None:
                self.log("nemesis crash-at: %s died at %s" % (node, point))
                self.count("crash-at that crashed")
                self.restart(node)
        return undo

    def restart(self, node, until=None):
        """Start a dead one, and note what it lost. Where it would come back empty, its replica may take over first."""
        node.kill()     # one that does not end by SIGTERM
        if until is None:
            until = now() + (6 * self.timeout if self.persistence == "none" else 0)
        slots = self.seen_slots(node)
        if slots and now() < until and any(n.alive() for n in self.cluster.shard_nodes(node.shard)):
            time.sleep(0.02)
            self.plan(now() + 0.2, lambda _: self.restart(node, until), None)
            return
        if slots and self.persistence == "aof":     # that one has written what it answered
            since = node.unwritten_since()
            if since is not None:
                self.crashes.append({"node": node.index, "until": now(), "slots": slots, "since": since, "all_else_kept": True})
        elif slots:
            since = node.last_saved() if self.persistence == "rdb" else 0
            self.crashes.append({"node": node.index, "until": now(), "slots": slots, "since": since})
        self.log("%s is started again; %d slots were still its own" % (node, len(slots)))
        try:
            node.start()
        except RuntimeError as error:
            self.violation("died", str(error))
            node.expected_dead = True
            self.plan(now() + 1, lambda _: self.restart(node, until), None)

    def seen_slots(self, node):
        slots = set()
        for other in self.cluster.nodes:
            if other is node or other.stopped or not other.alive():
                continue
            try:
                view = other.nodes_view().get(node.id)
                slots.update(ranges_to_slots(view["slots"]) if view else ())
            except TROUBLE:
                pass
        return slots

    # ---- failovers ----

    def take_over(self, event, *how):
        node = self.replica(event["shard"])
        if how:     # it asks for nobody's leave: one that has copied nothing since its start would lose all, with any server
            info = node.info("replication")
            if info.get("master_link_status") != "up" and info.get("master_link_down_since_seconds") == "-1":
                raise Skipped("%s has not copied anything yet" % node)
            master = self.cluster.master_of(event["shard"])
            if master and node.nodes_view()[node.id]["master"] != master.id:    # the shard would have two masters then
                raise Skipped("%s has not heard yet who its master is" % node)
        self.say(event, str(node))
        self.log("CLUSTER FAILOVER %s at %s: %s" % (" ".join(how), node, node.call("CLUSTER", "FAILOVER", *how)))

    def failover(self, event):
        self.take_over(event)

    def failover_force(self, event):
        self.take_over(event, "FORCE")

    def failover_takeover(self, event):
        """Asks nobody. Not by one that is cut off: it would claim slots that have moved since, which loses their
        writes with any way of moving slots."""
        if any(event["shard"] == self.cluster.nodes[i].shard for i in self.cut_off):
            raise Skipped("shard %d is cut off" % event["shard"])
        self.take_over(event, "TAKEOVER")

    # ---- within a node ----

    def bgsave(self, event):
        node = self.node(event)
        self.say(event, "%s: %s" % (node, node.try_call("BGSAVE")))

    def rewrite(self, event):
        node = self.node(event)
        self.say(event, "%s: %s" % (node, node.try_call("BGREWRITEAOF")))

    def bgsave_fails(self, event):
        """The snapshot cannot be put in place; with a save point set, the node then refuses writes."""
        node = self.node(event)
        save, name = self.setting(node, "save"), self.setting(node, "dbfilename")
        os.makedirs(node.dir + "/in-the-way", exist_ok=True)
        node.call("CONFIG", "SET", "save", "3600 1", "dbfilename", "in-the-way")
        self.say(event, "%s: %s" % (node, node.try_call("BGSAVE")))

        def undo():
            node.call("CONFIG", "SET", "save", save, "dbfilename", name)
            node.try_call("BGSAVE")     # one that succeeds lets it write again
        return undo

    def point(self, event, points, action):
        name = points[int(event["a"] * len(points))]
        node = self.replica(event["shard"]) if "replica" in name and self.cluster.replicas else self.master(event["shard"])
        self.say(event, "%s %ss at %s" % (node, action, name))
        node.fail_point(name, action)

        def undo():
            if node.alive() and not node.stopped:
                node.fail_point(name, "off")
        return undo

    def point_pauses(self, event):
        return self.point(event, PAUSE_POINTS, "pause")

    def point_fails(self, event):
        return self.point(event, FAIL_POINTS, "fail")

    def fork_fails(self, event):
        """Of migrations and, one of these at once, for a save, a rewrite, a replica that begins anew."""
        node, replica, what = self.node(event), None, ""
        if event["a"] < 0.4 and self.cluster.replicas:
            node, replica = self.master(event["shard"]), self.replica(event["shard"])
        self.no_fork.add(node.index)
        node.fail_point(ANY_FORK, "fail")
        as_before = self.set(node, "cluster-slot-migration-snapshot", "fork" if event["b"] < 0.5 else "auto")
        if replica:
            what = "%s starts again" % replica
            replica.kill()
            self.restart(replica)
        elif event["a"] < 0.7:
            what = "BGSAVE: %s" % node.try_call("BGSAVE")
        else:
            what = "BGREWRITEAOF: %s" % node.try_call("BGREWRITEAOF")
        self.say(event, "%s, %s" % (node, what))

        def undo():
            if node.stopped:
                raise Unknown("it stands still")
            if node.alive():
                node.fail_point(ANY_FORK, "off")
            as_before()
            node.try_call("BGSAVE")     # one that succeeds lets it write again
        return undo

    def setting(self, node, name):
        if (node, name) not in self.settings:
            self.settings[node, name] = node.config(name)
        return self.settings[node, name]

    def set(self, node, name, value):
        before = self.setting(node, name)
        node.call("CONFIG", "SET", name, value)
        return lambda: node.call("CONFIG", "SET", name, before)

    def config(self, event):
        node = self.node(event)
        name, values = SETTINGS[int(event["a"] * len(SETTINGS))]
        value = values[int(event["b"] * len(values))]
        self.say(event, "%s: %s %s" % (node, name, value))
        return self.set(node, name, value)

    def memory(self, event):
        node = self.node(event)
        limit = int(node.info("memory")["used_memory"]) + int(event["a"] * 3000000) - 500000
        self.say(event, "%s: maxmemory %d" % (node, limit))
        return self.set(node, "maxmemory", limit)

    def client_pause(self, event):
        node = self.node(event)
        self.say(event, str(node))
        node.call("CLIENT", "PAUSE", int(event["length"] * 1000), "WRITE" if event["a"] < 0.7 else "ALL")


def write_schedule(path, events, plans):
    with open(path, "w") as f:
        for event in events:
            f.write(json.dumps(event) + "\n")
        for plan in plans:
            f.write(json.dumps(plan) + "\n")
