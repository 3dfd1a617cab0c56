# schedule.py -- what will happen, drawn from the seed before anything runs.
#
# SPDX-License-Identifier: AGPL-3.0-only

import random

# name: (how often, needs replicas, shortest and longest, in node timeouts)
GENTLE = {      # none of these loses an acknowledged write of a cluster without migrations
    "stop-short": (6, False, 0.05, 0.6),
    "slow-node": (3, False, 0.3, 2.0),
    "slow-migration": (4, False, 0.3, 2.0),
    "cut-migration": (3, False, 0.2, 1.5),
    "drop-migration": (6, False, 0, 0),
    "drop-replication": (3, True, 0, 0),
    "drop-bus": (3, False, 0, 0),
    "partition-short": (4, False, 0.1, 0.5),
    "partition-replica": (3, True, 0.3, 2.5),
    "restart-replica": (2, True, 0.1, 1.0),
    "failover": (5, True, 0, 0),
    "bgsave": (2, False, 0, 0),
    "bgsave-fails": (2, False, 0.3, 1.0),
    "rewrite": (1, False, 0, 0),
    "fork-fails": (4, False, 0.3, 2.0),
    "point-pauses": (8, False, 0.05, 1.0),
    "point-fails": (2, False, 0.2, 1.0),
    "config": (4, False, 0.3, 2.0),
    "memory": (3, False, 0.2, 0.8),
    "client-pause": (2, False, 0.05, 0.5),
    "sleep": (3, False, 0.05, 0.4),
}
HARD = {        # these may: what the checker excuses, and for which keys, it says
    "kill": (6, False, 0.1, 3.0),
    "crash-at": (5, False, 0.1, 3.0),
    "stop-long": (4, False, 0.5, 6.0),
    "stop-very-long": (1, False, 6.0, 15.0),
    "partition": (4, False, 1.3, 3.0),
    "partition-one-way": (4, False, 1.3, 3.0),
    "failover-force": (3, True, 0, 0),
    "failover-takeover": (2, True, 0, 0),
    "shutdown": (2, False, 0.1, 3.0),
    "kill-two": (3, False, 0.1, 3.0),
    "stop-two": (2, False, 0.3, 3.0),
    "partition-halves": (3, False, 0.5, 3.0),
    "disk-full": (3, False, 0.2, 1.0),
}

ANY_FORK = "any_fork"       # children of every kind
PAUSE_POINTS = ["source_before_fork", "source_before_cut", "source_before_commit", "source_before_trim",
                "target_before_section", "target_before_prepared", "target_before_takeover", "target_replica_prepared"]
FAIL_POINTS = ["source_before_attach", "source_before_fork", "source_in_child", "source_before_commit",
               "source_damages_section", "target_before_accept", "target_before_load", "target_before_section",
               "target_before_prepared", "target_before_takeover", "target_after_takeover", "source_after_commit"]
CRASH_POINTS = ["source_before_fork", "source_before_cut", "source_before_commit", "source_after_commit",
                "source_before_trim", "target_before_load", "target_before_apply", "target_before_prepared",
                "target_prepared", "target_before_takeover", "target_after_takeover"]
SETTINGS = [("cluster-slot-migration-handoff-max-lag-bytes", ["1", "1000", "100000000"]),
            ("cluster-slot-migration-write-pause-timeout", ["50", "300", "2000"]),
            ("cluster-slot-migration-buffer-limit", ["2mb", "16mb"]),
            ("cluster-slot-migration-snapshot", ["fork", "thread"]),
            ("hz", ["1", "100"]), ("repl-backlog-size", ["16kb", "64mb"]), ("maxclients", ["200"]),
            ("rdb-key-save-delay", ["20"]), ("lazyfree-lazy-user-del", ["no", "yes"]), ("dynamic-hz", ["no"]),
            ("repl-diskless-sync", ["no", "yes"]), ("rdbcompression", ["no"])]


def choose(which, replicas):
    """The events of a list such as "gentle,kill", "all,-memory"."""
    chosen = {}
    for word in which.split(","):
        word = word.strip()
        remove = word.startswith("-")
        some = {"all": {**GENTLE, **HARD}, "gentle": GENTLE, "hard": HARD, "none": {}}.get(word.lstrip("-"))
        if some is None:
            name = word.lstrip("-")
            some = {name: {**GENTLE, **HARD}[name]}
        for name, about in some.items():
            if remove:
                chosen.pop(name, None)
            elif replicas or not about[1]:
                chosen[name] = about
    return chosen


def nemesis(seed, seconds, masters, replicas, timeout, which):
    """Events in the order of their time. Hard ones follow each other, others overlap with anything."""
    rnd = random.Random("%s nemesis" % seed)
    chosen = choose(which, replicas)
    events = []
    lanes = [{n: a for n, a in chosen.items() if n in GENTLE}, {n: a for n, a in chosen.items() if n in GENTLE},
             {n: a for n, a in chosen.items() if n in HARD}]
    for number, lane in enumerate(lanes):
        if not lane:
            continue
        at = rnd.uniform(1, 3)
        while at < seconds:
            name = rnd.choices(list(lane), [about[0] for about in lane.values()])[0]
            shortest, longest = lane[name][2:]
            length = timeout * rnd.uniform(shortest, longest)
            event = {"at": round(at, 2), "name": name, "length": round(length, 2), "shard": rnd.randrange(masters),
                     "other": rnd.randrange(masters - 1), "replica": rnd.random() < 0.25, "a": rnd.random(), "b": rnd.random()}
            if at + length < seconds:
                events.append(event)
            # After a hard one the cluster finds together again first.
            at += length + (rnd.uniform(0.7, 1.5) * timeout if number == 2 else rnd.expovariate(1 / 2.0))
    return sorted(events, key=lambda event: event["at"])


def slots_kind(rnd):
    return rnd.choices(["one", "range", "scattered", "hundreds", "all"], [30, 25, 20, 20, 5])[0]


def migrations(seed, count):
    rnd = random.Random("%s migrations" % seed)
    plans = []
    for number in range(count):
        plans.append({
            "number": number, "from": rnd.random(), "to": rnd.random(), "kind": slots_kind(rnd), "seed": rnd.random(),
            "hold": rnd.uniform(0.3, 4) if rnd.random() < 0.15 else 0,
            "pause": rnd.uniform(0.2, 2) if rnd.random() < 0.08 else 0,
            "cancel": rnd.uniform(0, 2) if rnd.random() < 0.12 else 0,
            "cancel_at_target": rnd.random() < 0.5,
            "rate": rnd.choice([100000, 500000, 2000000, 5000000]) if rnd.random() < 0.35 else 0,
            "wait_replicas": 0 if rnd.random() < 0.08 else None,
            "at_target": rnd.random() < 0.1,
            "gap": rnd.expovariate(1 / 0.3)})
    return plans
