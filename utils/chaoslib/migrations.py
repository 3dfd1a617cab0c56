# migrations.py -- moves slots about as planned, and watches each move to its end.
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import random
import re
import threading
import time

from chaoslib.cluster import TROUBLE, now, slots_to_ranges
from chaoslib.resp import Refused

ENDED = ("done", "failed", "cancelled")


def brief(text):
    """A reason without what differs from one to the next: ids, addresses, numbers."""
    text = re.sub(r"\b[0-9a-f]{40}\b( \([^)]*\))?", "ID", text)
    text = re.sub(r"\([\d.]+:\d+\)", "ADDRESS", text)
    return re.sub(r"\d+", "N", text)[:140]


class Move:
    def __init__(self, plan, source, target, slots):
        self.plan, self.source, self.target, self.slots = plan, source, target, slots
        self.id = None              # None: it was not answered, but may have begun all the same
        self.asked = now()
        self.began = None
        self.ended = None           # also of one that nobody watched to its end
        self.todo = []              # (when, words)
        self.wait_replicas = plan["wait_replicas"]


class Migrations(threading.Thread):
    """At most `together` at a time."""

    def __init__(self, cluster, plans, hot_slots, ending, log, together=3):
        super().__init__(daemon=True)
        self.cluster, self.plans, self.hot_slots = cluster, plans, hot_slots
        self.ending, self.log, self.together = ending, log, together
        self.running = []
        self.moves = []
        self.refusals = collections.Counter()
        self.trouble = collections.Counter()
        self.altered = collections.Counter()
        self.failure = None

    def run(self):
        try:
            next_at = now()
            plans = iter(self.plans)
            while not self.ending.is_set():
                if len(self.running) < self.together and now() >= next_at:
                    plan = next(plans, None)
                    if plan is None and not self.running:
                        return
                    if plan:
                        self.start_move(plan)
                        next_at = now() + plan["gap"]
                self.watch()
                time.sleep(0.1)
        except Exception as error:      # a mistake of ours must not look like a quiet run
            self.failure = error
            raise

    # ---- starting ----

    def start_move(self, plan):
        source, target, slots = self.resolve(plan)
        if not slots:
            return
        if plan["number"] % 20 == 19:
            target = self.cluster.nodes[plan["number"] % len(self.cluster.nodes)]     # whoever it is
        move = Move(plan, source, target, slots)
        words = ["SLOTSRANGE", *slots_to_ranges(slots), "NODE", target.id]
        if plan["rate"]:
            words += ["RATE", plan["rate"]]
        if plan["hold"]:
            words += ["HOLD"]
        if plan["wait_replicas"] is not None:
            words += ["WAITREPLICAS", plan["wait_replicas"]]
        at = target if plan["at_target"] else source
        try:
            move.id = at.call("CLUSTER", "MIGRATE-SLOTS", *words, timeout=6)[0]
        except Refused as error:
            self.refusals[brief(str(error))] += 1
            return
        except TROUBLE as error:
            self.trouble[brief(str(error))] += 1
            move.began = move.asked
            self.moves.append(move)
            return
        move.began = now()
        self.log("migration %d %s: %d slots (%s), %s to %s" % (plan["number"], move.id, len(slots), plan["kind"], source, target))
        if plan["hold"]:
            move.todo.append((now() + plan["hold"], ("ALTER-SLOT-MIGRATION", "RELEASE")))
        if plan["pause"]:
            move.todo.append((now() + 0.05, ("ALTER-SLOT-MIGRATION", "PAUSE")))
            move.todo.append((now() + plan["pause"], ("ALTER-SLOT-MIGRATION", "RESUME")))
        if plan["cancel"]:
            move.todo.append((now() + plan["cancel"], ("CANCEL-SLOT-MIGRATIONS",)))
        self.running.append(move)
        self.moves.append(move)

    def resolve(self, plan):
        """Masters of two shards, and slots of the one."""
        masters = [m for m in map(self.cluster.master_of, range(self.cluster.masters)) if m]
        if len(masters) < 2:
            return None, None, None
        try:
            owned = self.cluster.owners(masters[int(plan["from"] * len(masters)) - 1])
        except TROUBLE:
            return None, None, None
        sources = [m for m in masters if owned[m.shard]]
        if not sources:
            return None, None, None
        source = sources[int(plan["from"] * len(sources))]
        targets = [m for m in masters if m.shard != source.shard]
        if not targets:
            return None, None, None
        target = targets[int(plan["to"] * len(targets))]
        return source, target, self.choose_slots(plan, sorted(owned[source.shard]))

    def choose_slots(self, plan, owned):
        rnd = random.Random(plan["seed"])
        busy = {slot for move in self.running for slot in move.slots}
        free = [slot for slot in owned if slot not in busy] if rnd.random() < 0.9 else owned
        hot = [slot for slot in free if slot in self.hot_slots]
        if not free:
            return []
        if plan["kind"] == "one":
            return [rnd.choice(hot or free)]
        if plan["kind"] == "range":
            first = free.index(rnd.choice(hot or free))
            return free[first:first + rnd.randrange(2, 100)]
        if plan["kind"] == "scattered":
            return sorted(rnd.sample(free, min(len(free), rnd.randrange(2, 60))) + rnd.sample(hot, len(hot) // 3))
        if plan["kind"] == "hundreds":
            first = rnd.randrange(len(free))
            return free[first:first + rnd.randrange(100, 2500)]
        return free

    # ---- watching ----

    def watch(self):
        for move in list(self.running):
            while move.todo and move.todo[0][0] <= now():
                self.alter(move, move.todo.pop(0)[1])
            states = [self.state(node, move) for node in (move.source, move.target)]
            if all(state in ENDED + ("unknown", "gone") for state in states):
                move.ended = None if "gone" in states else now()
                self.log("migration %d ends: source %s, target %s" % (move.plan["number"], *states))
                self.running.remove(move)

    def state(self, node, move):
        """`unknown`: the node has forgotten it; None: it does not answer; `gone`: and is not waited for any longer."""
        if node.stopped or not node.alive():
            return "gone" if move.began < now() - 20 else None
        try:
            return node.jobs(move.id, timeout=1)[0]["state"]
        except Refused:
            return "unknown"
        except TROUBLE:
            return None

    def alter(self, move, words):
        node = move.target if move.plan["cancel_at_target"] else move.source
        reply = node.try_call("CLUSTER", words[0], "ID", move.id, *words[1:])
        self.altered["%s: %s" % (" ".join(words), brief(str(reply)))] += 1
        self.log("migration %d, %s at %s: %s" % (move.plan["number"], " ".join(words), node, reply))

    def release_all(self):
        """At the end: nothing is held any more, whoever has the job by now."""
        for node in self.cluster.nodes:
            try:
                jobs = node.jobs()
            except TROUBLE:
                continue
            for job in jobs:
                if job["state"] not in ENDED:
                    node.try_call("CLUSTER", "ALTER-SLOT-MIGRATION", "ID", job["id"], "RELEASE", "RESUME", "RATE", "0")
