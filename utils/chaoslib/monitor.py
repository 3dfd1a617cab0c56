# monitor.py -- samples of every node's role and replication offset, and how long a
# node left a client without an answer.
#
# SPDX-License-Identifier: AGPL-3.0-only

import threading

from chaoslib.cluster import TROUBLE, now

INTERVAL = 0.15


class Monitor(threading.Thread):
    """Of one node. samples: (asked, answered, pid, role, offset)."""

    def __init__(self, node, ending):
        super().__init__(daemon=True)
        self.node, self.ending = node, ending
        self.samples = []
        self.stood_still = []       # (when, seconds), while nobody had stopped it

    def run(self):
        connection = None
        while not self.ending.wait(INTERVAL):
            asked = now()
            stopped = self.node.stopped
            try:
                connection = connection or self.node.connect(60)
                info = self.node.info("replication", connection)
                pid = self.node.process.pid
            except TROUBLE:
                if connection:
                    connection.close()
                connection = None
                continue
            answered = now()
            role = info["role"]
            offset = int(info["slave_repl_offset" if role == "slave" else "master_repl_offset"])
            self.samples.append((asked, answered, pid, role, offset))
            if answered - asked > 1 and not stopped and not self.node.stopped:
                self.stood_still.append((asked, answered - asked))
        if connection:
            connection.close()
