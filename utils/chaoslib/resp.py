# resp.py -- a client whose outcomes are unambiguous: a reply, Refused (the server
# answered with an error), NotSent (nothing was sent), Unknown (sent, no answer).
#
# SPDX-License-Identifier: AGPL-3.0-only

import socket


class Refused(Exception):
    """The server's error; the command had no effect."""


class NotSent(Exception):
    """No connection: the command had no effect."""


class Unknown(Exception):
    """The connection broke, or was silent for too long, after the command was sent."""


def encode(args):
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        if not isinstance(arg, bytes):
            arg = str(arg).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(arg), arg))
    return b"".join(parts)


class Connection:
    def __init__(self, port, timeout=5.0):
        self.buffer = b""
        try:
            self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        except OSError as error:
            raise NotSent(str(error)) from None
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self):
        self.socket.close()

    def set_timeout(self, seconds):
        self.socket.settimeout(seconds)

    def send(self, *commands):
        try:
            self.socket.sendall(b"".join(map(encode, commands)))
        except OSError as error:
            raise Unknown(str(error)) from None

    def _more(self):
        try:
            data = self.socket.recv(65536)
        except OSError as error:
            raise Unknown(str(error)) from None
        if not data:
            raise Unknown("connection closed")
        self.buffer += data

    def _line(self):
        while (end := self.buffer.find(b"\r\n")) < 0:
            self._more()
        line, self.buffer = self.buffer[:end], self.buffer[end + 2:]
        return line

    def _bulk(self, length):
        while len(self.buffer) < length + 2:
            self._more()
        data, self.buffer = self.buffer[:length], self.buffer[length + 2:]
        return data

    def read(self):
        """A reply; errors are values here, as they are inside of arrays."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return Refused(rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._bulk(int(rest)).decode(errors="surrogateescape")
        if kind == b"*":
            return None if rest == b"-1" else [self.read() for _ in range(int(rest))]
        raise Unknown("not understood: %r" % line[:60])

    def call(self, *args):
        self.send(args)
        reply = self.read()
        if isinstance(reply, Refused):
            raise reply
        return reply

    def pipeline(self, commands, at_once=500):
        """Replies of many commands, errors as values."""
        replies = []
        for i in range(0, len(commands), at_once):
            some = commands[i:i + at_once]
            self.send(*some)
            replies.extend(self.read() for _ in some)
        return replies


# ---- slots ----

def _crc16_table():
    table = []
    for i in range(256):
        crc = i << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xffff
        table.append(crc)
    return table


_CRC16 = _crc16_table()


def slot_of(key):
    start = key.find("{")
    end = key.find("}", start + 1)
    if start >= 0 and end > start + 1:
        key = key[start + 1:end]
    crc = 0
    for byte in key.encode():
        crc = (crc << 8 & 0xffff) ^ _CRC16[(crc >> 8 ^ byte) & 0xff]
    return crc % 16384


def slot_tags():
    """For each slot the first number that hashes to it."""
    tags, found, i = [None] * 16384, 0, 0
    while found < 16384:
        slot = slot_of(str(i))
        if tags[slot] is None:
            tags[slot] = str(i)
            found += 1
        i += 1
    return tags
