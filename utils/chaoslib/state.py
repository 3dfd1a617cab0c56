# state.py -- what the nodes must be like when all is healed and quiet.
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import random
import re

from chaoslib.cluster import TROUBLE, now, ranges_to_slots, wait_for
from chaoslib.migrations import ENDED, brief

GAVE_UP = re.compile(r"FATAL: AOF can't be turned on\. Exiting now")
CRASHED = re.compile(r"REDIS BUG REPORT START|ASSERTION FAILED|Guru Meditation|crashed by signal|Out Of Memory allocating|"
                     r"AddressSanitizer|ThreadSanitizer")
SPARE_MEMORY = 1 << 20      # of an empty node, more than before: a few names of functions and hash tables' sizes


# ---- a data set that nobody changes ----

def fixed_value(slot):
    return "fixed:%d:%s" % (slot, random.Random(slot).randbytes(300).hex())


def fixed_key(tags, slot):
    return "{%s}fixed" % tags[slot]


def fill(cluster, tags):
    for node in cluster.nodes[:cluster.masters]:
        slots = cluster.owners(node)[node.shard]
        c = node.connect(60)
        c.pipeline([("SET", fixed_key(tags, slot), fixed_value(slot)) for slot in slots])
        c.close()
    return now()


def check_fixed(cluster, tags, filled, excuses, violation, excused):
    slots_of = collections.defaultdict(list)
    for slot, node in cluster.owner_nodes(cluster.nodes[0]).items():
        slots_of[node].append(slot)
    for node, slots in slots_of.items():
        c = node.connect(60)
        replies = c.pipeline([("GET", fixed_key(tags, slot)) for slot in slots])
        c.close()
        lost = []
        for slot, reply in zip(slots, replies):
            if reply == fixed_value(slot):
                continue
            why = excuses.of_time(None, filled, filled, fixed_key(tags, slot))
            if why and reply is None:
                excused["fixed data: " + why] += 1
            else:
                lost.append(slot)
        if lost:
            violation("lost", "the fixed keys of %d slots at %s: %s" % (len(lost), node, lost[:20]))


# ---- the cluster ----

def unended(cluster):
    """Jobs that run, of each node that answers."""
    found = []
    for node in cluster.nodes:
        try:
            found += [(node, job) for job in node.jobs(timeout=10) if job["state"] not in ENDED]
        except TROUBLE as error:
            found.append((node, {"id": "?", "state": str(error)}))
    return found


def describe(job):
    return ", ".join("%s %s" % (name, job[name]) for name in ("id", "role", "state", "reason", "attempt", "last-error") if name in job)


def wait_jobs_end(cluster, crashes, violation, excused, seconds=60):
    """What does not end is forced to, as an operator would do it. That is expected only of one whose other end
    has lost its data in a crash; the keys of its slots are in doubt then. Others may wait for such a one."""
    try:
        wait_for(seconds, "jobs end", lambda: not unended(cluster))
        return
    except TimeoutError:
        pass
    stuck = unended(cluster)
    forced = []
    waited_for = {job["id"] for _, job in stuck if "CANCEL-SLOT-MIGRATIONS" in job.get("reason", "")}
    for node, job in stuck:
        other = cluster.by_id(job.get("target" if job.get("role") == "source" else "source"))
        lost = [c for c in crashes if other and cluster.nodes[c["node"]].shard == other.shard]
        if lost and "CANCEL-SLOT-MIGRATIONS" in job["reason"]:
            excused["a migration that waits for an operator: " + brief(job["reason"])] += 1
            forced.append({"node": other.index, "slots": set(ranges_to_slots(job["slots"].split())), "since": 0})
        elif not any(other_id in job.get("reason", "") for other_id in waited_for - {job["id"]}):
            violation("job does not end", "%s: %s" % (node, describe(job)))
    for node, job in stuck:
        for force in ((), ("FORCE",)):
            node.try_call("CLUSTER", "CANCEL-SLOT-MIGRATIONS", "ID", job["id"], *force)
    crashes.extend(dict(crash, until=now()) for crash in forced)


def wait_healed(cluster, violation, log, seconds=90):
    def agree():
        cluster.adopt(log, violation)
        return cluster.agrees()

    try:
        wait_for(seconds, "the nodes agree", agree)
        wait_for(seconds, "replicas synchronized", cluster.replicas_are_linked)
        return True
    except TimeoutError as error:
        views = ["%s: %s\n%s" % (n, n.try_call("CLUSTER", "INFO").split("\r\n")[:6], n.try_call("CLUSTER", "NODES"))
                 for n in cluster.nodes]
        violation("does not heal", "%s\n%s" % (error, "\n".join(views)))
        return False


def check_slots(cluster, violation, seconds=20):
    """Each has an owner; nobody has keys of another's."""
    for node in cluster.nodes:
        owned = cluster.owners(node)
        covered = sum(len(slots) for slots in owned.values())
        if covered != 16384:
            violation("slots without owner", "%s sees %d slots with an owner" % (node, covered))
        for node_id, view in node.nodes_view().items():
            if view["open"]:
                violation("slot left open", "%s: %s" % (node, view["open"][:10]))
        try:
            wait_for(seconds, "no orphans", lambda: not orphans(node, owned[node.shard]))
        except TimeoutError:
            found = orphans(node, owned[node.shard])
            violation("orphan keys", "%s has keys in %d slots of others: %s" % (node, len(found), found[:10]))


def orphans(node, mine):
    c = node.connect(60)
    others = sorted(set(range(16384)) - set(mine))
    counts = c.pipeline([("CLUSTER", "COUNTKEYSINSLOT", slot) for slot in others])
    c.close()
    return [(slot, count) for slot, count in zip(others, counts) if count]


def check_replicas(cluster, violation, seconds=20):
    for shard in range(cluster.masters):
        master = cluster.master_of(shard)
        for node in cluster.shard_nodes(shard):
            if node is master:
                continue
            digests = []

            def equal():
                digests[:] = [n.call("DEBUG", "DIGEST", timeout=60) for n in (master, node)]
                return digests[0] == digests[1]
            try:
                wait_for(seconds, "equal", equal)
            except TimeoutError:
                violation("replica differs", "%s of %s: %s, %s keys" % (
                    node, master, digests, [n.call("DBSIZE") for n in (node, master)]))


def most(counters):
    """Of each kind, as many as the one that has most."""
    found = collections.Counter()
    for counter in counters:
        found |= counter
    return found


def check_given_back(cluster, before, violation, seconds=15):
    """Descriptors, memory, children and threads of migrations."""
    for node in cluster.nodes:
        try:
            wait_for(seconds, "given back", lambda: not kept(node, before, len(cluster.nodes)))
        except TimeoutError:
            violation("not given back", "%s: %s" % (node, kept(node, before, len(cluster.nodes))))


def kept(node, before, nodes):
    wrong = []
    memory = node.info("memory")
    for name, value in memory.items():
        if name.startswith("mem_cluster_slot_migration") and value != "0":
            wrong.append("%s %s" % (name, value))
    info = node.cluster_info()
    for name in "cluster_slot_migrations_exporting", "cluster_slot_migrations_importing":
        if info[name] != "0":
            wrong.append("%s %s" % (name, info[name]))
    wrong += descriptors_kept(node, before, nodes)
    if node.children():
        wrong.append("children %s" % node.children())
    for name in "slot_loader", "slot_saver":
        if name in node.threads():
            wrong.append("threads %s" % node.threads())
    return wrong


def descriptors_kept(node, before, nodes):
    """Those of each kind that the node can account for: its clients and replicas, its master, the bus; else as before."""
    c = node.connect(10)
    clients, replication, found = node.info("clients", c), node.info("replication", c), node.descriptors()
    c.close()
    replica = replication["role"] == "slave"
    linked = replica and replication["master_link_status"] == "up"
    allowed = {"from clients": int(clients["connected_clients"]) + int(replication["connected_slaves"]) - linked,
               "to another": int(replica), "to another's bus": nodes - 1, "bus, from others": nodes - 1}
    return ["%d descriptors: %s (%d can be accounted for)" % (count, kind, allowed.get(kind, before[kind]))
            for kind, count in sorted(found.items()) if count > allowed.get(kind, before[kind])]


def own_memory(node):
    """What a node without keys uses, but for what depends on who is connected at the moment."""
    memory = node.info("memory")
    return int(memory["used_memory"]) - sum(int(memory[name]) for name in (
        "mem_clients_normal", "mem_clients_slaves", "mem_replication_backlog", "mem_cluster_links", "mem_aof_buffer"))


def check_memory(cluster, before, violation, log, seconds=20):
    """Empties all nodes, also of what they note for the operator: then they use what they did before the first key."""
    for shard in range(cluster.masters):
        cluster.master_of(shard).call("FLUSHALL", "SYNC", timeout=60)
    for node in cluster.nodes:
        for words in (("CONFIG", "RESETSTAT"), ("SCRIPT", "FLUSH", "SYNC"), ("SLOWLOG", "RESET"), ("LATENCY", "RESET"),
                      ("CONFIG", "SET", "cluster-slot-migration-log-max-len", 0)):
            node.call(*words, timeout=60)

    def left(node):
        return own_memory(node) - before + (1 << 40 if node.call("DBSIZE") else 0)
    for node in cluster.nodes:
        try:
            wait_for(seconds, "memory given back", lambda: left(node) <= SPARE_MEMORY)
        except TimeoutError:
            violation("memory not given back", "%s without keys uses %d bytes more than before: %s" % (
                node, left(node), {k: v for k, v in node.info("memory").items() if v.isdigit() and v != "0"}))
        log("%s without keys: %d bytes more than before" % (node, left(node)))


def check_deaths(cluster, no_fork, violation, excused):
    """no_fork: the nodes that could not fork for a while. After a full synchronization a server asks for a rewrite of
    its AOF ten times, a second apart, answers nobody meanwhile, and ends: upstream's, and nobody can undo it then."""
    for node in cluster.nodes:
        node.alive()
        with open(node.log, errors="replace") as f:
            lines = f.readlines()
        gave_up = sum(1 for line in lines if GAVE_UP.search(line)) if node.index in no_fork else 0
        for when, status in node.died:
            if status == 1 and gave_up:
                gave_up -= 1
                excused["died: a node whose forks failed gave its AOF up"] += 1
            else:
                violation("died", "%s at %.3f with status %s" % (node, when, status))
        for i, line in enumerate(lines):
            if CRASHED.search(line):
                violation("crashed", "%s:\n%s" % (node, "".join(lines[max(0, i - 10):i + 40])))
                break


def was_replaced(samples, since):
    """Did it turn from a master into a replica? A graceful failover does that, too."""
    return any(a[3] == "master" and b[3] == "slave" and b[1] >= since for a, b in zip(samples, samples[1:]))


def end_of(cluster, node, role, move, samples):
    """What became of it at this end. At a node that was replaced it has failed: it goes on at the successor."""
    def ask(node):
        try:
            job = node.jobs(move.id)[0]
            return job["state"] if job["role"] == role else None
        except (IndexError, *TROUBLE):
            return None
    own = ask(node)
    if own in (None, "done") or not was_replaced(samples, move.asked):
        return own or "unknown"
    others = [ask(other) for other in cluster.shard_nodes(node.shard) if other is not node]
    return "done" if "done" in others else next(filter(None, others), "unknown")


def check_ends_agree(cluster, moves, monitors, disturbed, violation):
    """A move that one end calls done and the other failed or cancelled, nobody having lost anything or been
    restarted. Of a node that was replaced its successor's word counts."""
    for move in moves:
        if move.id is None:
            move.was_done = True        # for all that is known
            continue
        states = {role: end_of(cluster, node, role, move, monitors[node.index].samples)
                  for role, node in (("source", move.source), ("target", move.target))}
        move.states = states
        move.was_done = "done" in states.values() or set(states.values()) == {"unknown"}
        if "done" in states.values() and set(states.values()) & {"failed", "cancelled"}:
            if not {move.source.index, move.target.index} & disturbed:
                violation("ends disagree", "migration %d %s: %s" % (move.plan["number"], move.id, states))
