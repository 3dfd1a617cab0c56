# cluster.py -- the servers, the proxy between them, and what they say of themselves.
#
# SPDX-License-Identifier: AGPL-3.0-only

import collections
import ctypes
import datetime
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

from chaoslib.resp import Connection, NotSent, Refused, Unknown

HERE = os.path.dirname(os.path.abspath(__file__))
LIBC = ctypes.CDLL(None)
TROUBLE = (NotSent, Refused, Unknown)


def end_with_us():
    """In a child: die when the thread that started it does, however that is."""
    LIBC.prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)        # Ctrl-C is ours to handle


def be_a_node():
    end_with_us()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # a file that may not grow is an error like a full disk


def now():
    return time.monotonic()


def wait_for(seconds, what, condition):
    until = now() + seconds
    while True:
        found = condition()
        if found:
            return found
        if now() > until:
            raise TimeoutError("%s: not within %s s" % (what, seconds))
        time.sleep(0.05)


class Ports:
    """Free ports, above those that the kernel gives to outgoing connections. The first of a block is held
    open for as long as the run lasts: no other run takes the block."""

    FIRST, BLOCK, LAST = 61000, 100, 65400

    def __init__(self):
        for start in range(self.FIRST, self.LAST, self.BLOCK):
            self.guard = socket.socket()
            try:
                self.guard.bind(("127.0.0.1", start))
                self.next = start
                return
            except OSError:
                self.guard.close()
        raise RuntimeError("no free ports from %d to %d" % (self.FIRST, self.LAST))

    def take(self):
        while True:
            self.next += 1
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind(("127.0.0.1", self.next))
                    return self.next
                except OSError:
                    pass


def log_time(line):
    """Of a line of a server's log, None if it has none."""
    stamp = re.match(r"\d+:\w (\d+ \w+ \d+ [\d:.]+)", line)
    return stamp and datetime.datetime.strptime(stamp.group(1), "%d %b %Y %H:%M:%S.%f").timestamp()


def pairs(flat):
    return dict(zip(flat[::2], flat[1::2]))


def socket_ends():
    """Of each TCP socket its local and remote port."""
    ends = {}
    with open("/proc/net/tcp") as f:
        for words in map(str.split, f.readlines()[1:]):
            local, remote = (int(words[i].split(":")[1], 16) for i in (1, 2))
            ends["socket:[%s]" % words[9]] = local, remote
    return ends


def kind_of_file(to):
    """Whatever its name is by now: nodes.conf, which is kept open as a lock, is replaced by each change."""
    to = re.sub(r" \(deleted\)$", "", to)
    if to.startswith("/") and not to.startswith("/dev/"):
        return "file " + re.sub(r"\d+", "N", os.path.basename(to))
    return re.sub(r":\[\d+\]", "", to)


class Node:
    def __init__(self, index, shard, binary, directory, settings, ports, may_mount):
        self.index, self.shard, self.binary, self.dir = index, shard, binary, directory
        self.settings = settings
        self.port, self.bus, self.public_port, self.public_bus = (ports.take() for _ in range(4))
        self.source = "127.0.0.%d" % (11 + index)
        self.public_buses = set()   # of all nodes
        self.process = None
        self.stopped = False        # by SIGSTOP
        self.died = []              # exits that nobody here asked for
        self.expected_dead = False
        self.id = None
        self.fail_points = {}
        self.log = directory + ".log"
        self.log_writer = None      # what it says goes to a pipe: no full disk of its own keeps it from saying so
        os.makedirs(directory)
        self.has_own_disk = may_mount and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory], stderr=subprocess.DEVNULL).returncode == 0

    def __str__(self):
        return "node %d (%d)" % (self.index, self.port)

    def addresses(self):
        return {name: getattr(self, name) for name in ("index", "shard", "source", "port", "bus", "public_port", "public_bus")}

    def command_line(self):
        options = {
            "port": self.port, "cluster-port": self.bus, "bind": "127.0.0.1", "bind-source-addr": self.source,
            "cluster-announce-ip": "127.0.0.1", "cluster-announce-port": self.public_port,
            "cluster-announce-bus-port": self.public_bus, "dir": self.dir, "cluster-enabled": "yes",
            "cluster-allow-replica-migration": "no", "cluster-require-full-coverage": "no",
            "enable-debug-command": "yes", "enable-protected-configs": "yes", "protected-mode": "no",
            "repl-diskless-sync-delay": 0, "repl-timeout": 10, "replica-ignore-disk-write-errors": "yes",
            "shutdown-timeout": 1, "logfile": "",
            "always-show-logo": "no", "crash-memcheck-enabled": "no", "cluster-slot-migration-log-max-len": 10000}
        options.update(self.settings)
        line = [self.binary]
        for name, value in options.items():
            line += ["--" + name, str(value)]
        return line

    def start(self):
        if self.log_writer is None:
            with open(self.log, "a") as f:
                self.log_writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=f, preexec_fn=end_with_us)
        self.process = subprocess.Popen(self.command_line(), stdin=subprocess.DEVNULL, preexec_fn=be_a_node,
                                        stdout=self.log_writer.stdin, stderr=subprocess.STDOUT)
        self.expected_dead = False      # only now: other threads ask whether it is alive
        wait_for(60, "%s answers" % self, self.answers)
        for name, action in self.fail_points.items():
            self.fail_point(name, action)

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError("%s does not start: see %s" % (self, self.log))
        try:
            return self.info("server")["process_id"] == str(self.process.pid)
        except TROUBLE:
            return False

    def alive(self):
        """Also notes when it has ended by itself."""
        if self.process is None:
            return False
        status = self.process.poll()
        if status is None:
            return True
        if not self.expected_dead:
            self.died.append((time.time(), status))
            self.expected_dead = True
        return False

    def send_signal(self, number):
        if self.alive():
            self.process.send_signal(number)

    def kill(self, number=signal.SIGKILL):
        self.alive()
        self.expected_dead = True
        self.send_signal(number)
        if number == signal.SIGKILL:
            self.stopped = False
            self.process.wait(20)

    def stop(self):
        self.stopped = True
        self.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.send_signal(signal.SIGCONT)
        self.stopped = False

    def connect(self, timeout=2.0):
        return Connection(self.port, timeout)

    def call(self, *args, timeout=2.0):
        c = self.connect(timeout)
        try:
            return c.call(*args)
        finally:
            c.close()

    def try_call(self, *args, timeout=2.0):
        """The reply, or what went wrong as text."""
        try:
            return self.call(*args, timeout=timeout)
        except TROUBLE as error:
            return "%s: %s" % (type(error).__name__, error)

    def fail_point(self, name, action):
        c = self.connect(5)
        try:
            c.call("DEBUG", "SLOTMIG", "FAILPOINT", name, action)
        finally:
            c.close()

    def fail_points_off(self, names):
        c = self.connect(5)
        try:
            c.pipeline([("DEBUG", "SLOTMIG", "FAILPOINT", name, "off") for name in names])
        finally:
            c.close()

    def info(self, section, connection=None):
        if connection:
            text = connection.call("INFO", section)
        else:
            text = self.call("INFO", section)
        return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)

    def cluster_info(self):
        return dict(line.split(":", 1) for line in self.call("CLUSTER", "INFO").split("\r\n") if ":" in line)

    def config(self, name):
        return self.call("CONFIG", "GET", name)[1]

    def jobs(self, job_id=None, timeout=2.0):
        args = ("ID", job_id) if job_id else ()
        return [pairs(job) for job in self.call("CLUSTER", "SLOT-MIGRATIONS", *args, timeout=timeout)]

    def nodes_view(self):
        """What it thinks of every node: {id: {flags, master, slots, epoch, link}}."""
        view = {}
        for line in self.call("CLUSTER", "NODES").strip().split("\n"):
            words = line.split(" ")
            slots = [w for w in words[8:] if not w.startswith("[")]
            view[words[0]] = {"flags": set(words[2].split(",")), "master": words[3], "epoch": int(words[6]),
                              "link": words[7], "slots": slots, "open": [w for w in words[8:] if w.startswith("[")]}
        return view

    def limit_files(self, size):
        """No file of it can grow beyond this; -1: as it was."""
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))

    def fill_disk(self):
        with open(self.dir + "/filler", "wb", buffering=0) as f:
            for size in 1 << 20, 4096, 1:
                try:
                    while f.write(b"x" * size) == size:
                        pass
                except OSError:
                    pass

    def empty_disk(self):
        os.unlink(self.dir + "/filler")

    def last_saved(self):
        """When the snapshot that it starts from was begun, by now()'s clock; 0: there is none."""
        begun = saved = 0
        with open(self.log, errors="replace") as f:
            for line in f:
                if "Background saving started by" in line or "Saving the final RDB snapshot" in line:
                    begun = log_time(line)
                elif "Background saving terminated with success" in line or "DB saved on disk" in line and ":M " in line:
                    saved = begun
        return saved and saved - (time.time() - now())

    def unwritten_since(self):
        """When this replica copied everything, by now()'s clock, if the append-only file it writes anew after that was
        not in place yet when it died: with any server it comes back with the one before. None: it was."""
        since = None
        with open(self.log, errors="replace") as f:
            for line in f:
                if "Starting AOF after a successful sync" in line:
                    since = log_time(line) - (time.time() - now())
                elif "Background AOF rewrite finished successfully" in line:
                    since = None
        return since

    def descriptors(self):
        """How many of each kind."""
        kinds, sockets = collections.Counter(), socket_ends()
        for fd in os.listdir("/proc/%d/fd" % self.process.pid):
            try:
                to = os.readlink("/proc/%d/fd/%s" % (self.process.pid, fd))
            except OSError:
                continue
            kinds[self.kind_of_socket(sockets.get(to)) if to.startswith("socket:") else kind_of_file(to)] += 1
        return kinds

    def kind_of_socket(self, ends):
        if ends is None:
            return "socket that is not connected"
        local, remote = ends
        if not remote:
            return "listening"
        if local in (self.port, self.bus):
            return "from clients" if local == self.port else "bus, from others"
        return "to another's bus" if remote in self.public_buses else "to another"

    def children(self):
        found = []
        for task in os.listdir("/proc/%d/task" % self.process.pid):
            with open("/proc/%d/task/%s/children" % (self.process.pid, task)) as f:
                found += f.read().split()
        return found

    def threads(self):
        names = []
        for task in os.listdir("/proc/%d/task" % self.process.pid):
            with open("/proc/%d/task/%s/comm" % (self.process.pid, task)) as f:
                names.append(f.read().strip())
        return names


def ranges_to_slots(ranges):
    slots = []
    for text in ranges:
        first, _, last = text.partition("-")
        slots.extend(range(int(first), int(last or first) + 1))
    return slots


def slots_to_ranges(slots):
    """[first, last, first, last, ...]"""
    flat = []
    for slot in sorted(slots):
        if flat and flat[-1] == slot - 1:
            flat[-1] = slot
        else:
            flat += [slot, slot]
    return flat


def private_mounts():
    """May we mount? What is mounted then ends with us."""
    CLONE_NEWNS = 0x20000
    return LIBC.unshare(CLONE_NEWNS) == 0 and subprocess.run(
        ["mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL).returncode == 0


class Proxy:
    def __init__(self, nodes):
        self.lock = threading.Lock()
        self.process = subprocess.Popen([sys.executable, "-B", HERE + "/proxy.py", json.dumps([n.addresses() for n in nodes])],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_us)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("the proxy does not start")

    def do(self, **command):
        with self.lock:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.kill()
        self.process.wait()


class Cluster:
    """Shard i is node i and the nodes i + masters, i + 2 * masters ..."""

    def __init__(self, binary, work, masters, replicas, settings, may_mount):
        self.ports = Ports()
        self.masters, self.replicas = masters, replicas
        self.nodes = [Node(i, i % masters, binary, "%s/node-%d" % (work, i), settings, self.ports, may_mount)
                      for i in range(masters * (1 + replicas))]
        for node in self.nodes:
            node.public_buses.update(n.public_bus for n in self.nodes)
        self.proxy = None

    def start(self):
        self.proxy = Proxy(self.nodes)
        for node in self.nodes:
            node.start()
            node.id = node.call("CLUSTER", "MYID")
        self.form()

    def form(self):
        share = 16384 / self.masters
        for node in self.nodes:
            node.call("CLUSTER", "SET-CONFIG-EPOCH", node.index + 1)
            if node.index < self.masters:
                first, last = round(node.index * share), round((node.index + 1) * share) - 1
                node.call("CLUSTER", "ADDSLOTSRANGE", first, last)
            if node.index:
                node.call("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].public_port, self.nodes[0].public_bus)
        wait_for(60, "all nodes know each other", lambda: all(len(n.nodes_view()) == len(self.nodes) and not any(
            v["flags"] & {"handshake", "fail?", "fail", "noaddr"} for v in n.nodes_view().values()) for n in self.nodes))
        for node in self.nodes[self.masters:]:
            node.call("CLUSTER", "REPLICATE", self.nodes[node.shard].id)
        wait_for(60, "the cluster is ready", self.agrees)
        wait_for(60, "the replicas have synchronized", self.replicas_are_linked)

    def stop(self):
        for node in self.nodes:
            if node.process and node.process.poll() is None:
                node.process.kill()
        for node in self.nodes:
            if node.process:
                node.process.wait()
            if node.log_writer:
                node.log_writer.stdin.close()
                node.log_writer.wait()
        if self.proxy:
            self.proxy.end()

    def unmount(self):
        for node in self.nodes:
            if node.has_own_disk:
                subprocess.run(["umount", "-l", node.dir], stderr=subprocess.DEVNULL)

    def by_id(self, node_id):
        for node in self.nodes:
            if node.id == node_id:
                return node
        return None

    def shard_nodes(self, shard):
        return [n for n in self.nodes if n.shard == shard]

    def master_of(self, shard):
        """The acting master: who says so with the highest epoch, of those who answer."""
        best = None
        for node in self.shard_nodes(shard):
            if node.stopped or not node.alive():
                continue
            try:
                me = node.nodes_view()[node.id]
            except TROUBLE:
                continue
            if "master" in me["flags"] and (best is None or me["epoch"] > best[0]):
                best = (me["epoch"], node)
        return best and best[1]

    def a_replica_of(self, shard):
        for node in self.shard_nodes(shard):
            if node.stopped or not node.alive():
                continue
            try:
                if "slave" in node.nodes_view()[node.id]["flags"]:
                    return node
            except TROUBLE:
                pass
        return None

    def owners(self, node):
        """Slots of each shard as the node sees them."""
        owned = {shard: [] for shard in range(self.masters)}
        for node_id, view in node.nodes_view().items():
            of = self.by_id(node_id)
            if of:
                owned[of.shard] += ranges_to_slots(view["slots"])
        return owned

    def owner_nodes(self, node):
        """Who has each slot, as the node sees it."""
        owned = {}
        for node_id, view in node.nodes_view().items():
            if self.by_id(node_id):
                owned.update((slot, self.by_id(node_id)) for slot in ranges_to_slots(view["slots"]))
        return owned

    def adopt(self, log, violation):
        """A master that was replaced, and whose successor has been given slots of others since, stays a master
        without slots (cluster-allow-replica-migration no): an operator makes it a replica again. It must be
        empty by then."""
        for shard in range(self.masters) if self.replicas else ():
            acting = self.master_of(shard)
            for node in self.shard_nodes(shard):
                if acting is None or node is acting or node.stopped or not node.alive():
                    continue
                try:
                    views = [n.nodes_view() for n in (node, acting)]
                    if all("master" in v[node.id]["flags"] and not v[node.id]["slots"] and v[acting.id]["slots"] for v in views):
                        reply = node.try_call("CLUSTER", "REPLICATE", acting.id)
                        log("%s is made a replica of %s: %s" % (node, acting, reply))
                        if "must be empty" in reply:
                            violation("orphan keys", "%s was replaced by %s and keeps %d keys" % (node, acting, node.call("DBSIZE")))
                            node.call("FLUSHALL")
                except TROUBLE + (KeyError,):
                    pass

    def agrees(self):
        """All nodes see the same owners, masters and no failure."""
        first = None
        try:
            for node in self.nodes:
                if node.cluster_info()["cluster_state"] != "ok":
                    return False
                view = node.nodes_view()
                if any(v["flags"] & {"fail", "fail?", "handshake", "noaddr"} for v in view.values()):
                    return False
                brief = sorted((i, "master" in v["flags"], v["master"], v["slots"], v["epoch"]) for i, v in view.items())
                if first is None:
                    first = brief
                elif brief != first:
                    return False
        except TROUBLE:
            return False
        return True

    def replicas_are_linked(self):
        try:
            for node in self.nodes:
                info = node.info("replication")
                if info["role"] == "slave" and (info["master_link_status"] != "up" or info["master_sync_in_progress"] != "0"):
                    return False
        except TROUBLE:
            return False
        return True
