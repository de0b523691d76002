#!/usr/bin/env python3
"""A server of linechat/1, the core without the annexes, to show how PROTOCOL.md works.
Usage: server.py [HOST:PORT]  (default 127.0.0.1:9999; port 0: the system chooses one)"""
import re
import select
import socket
import sys
import time

MAX_REQUEST, MAX_LINE, MAX_NAME, MAX_ROSTER = 4000, 4096, 50, 100  # bytes, bytes, bytes, people
MAX_CLIENTS, MAX_PENDING = 500, 4 << 20  # connections; bytes that one client has not taken
TIMEOUT = 60  # seconds that a client has to choose a name, and a closing client to end its side
ARGUMENTS = {"NAME": ".+", "MSG": ".+", "PRIV": "@[^ ]+ .+", "PING": ".*",
             "LIST": " *", "HELP": " *", "QUIT": " *"}
BAD_TEXT = re.compile("[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BEYOND_ASCII = (  # any character that is in none of these ranges, nor at the end of a plane
    "[^\0-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f"
    "\u205f-\u206f\u2800\u3000\u3164\ue000-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U0010ffff"
    + "".join(chr(plane + 0xFFFE) + chr(plane + 0xFFFF) for plane in range(0, 0xE0000, 0x10000)) + "]")
NAME = re.compile(f"([A-Za-z0-9]|{BEYOND_ASCII})([A-Za-z0-9_.-]|{BEYOND_ASCII})*")
clients, room = [], {}  # room: from names in lower case to clients, in the order of joining


def roster():
    lines = [f"USERS {len(room)}"]
    for member in room.values():
        if len(f"{lines[-1]} {member.name}\r\n".encode()) > MAX_LINE:
            lines.append(f"USERS {len(room)}")
        lines[-1] += " " + member.name
    return "\r\n".join(lines)


# Sends a line to everybody in the room. If somebody joined or left, the roster follows.
def tell_room(event, but=None, with_roster=False):
    for member in room.values():
        if member is not but:
            member.send(event)
    if with_roster and len(room) <= MAX_ROSTER:
        tell_room(roster())


class Client:
    def __init__(self, listener):
        self.sock, _ = listener.accept()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.fileno, self.name = self.sock.fileno, None  # select.select() calls fileno()
        self.input, self.output = b"", bytearray()  # an unfinished line; what is pending
        self.is_first, self.skipping = True, False  # before the first line; inside a long one
        self.closing, self.ended = False, False  # input is thrown away; the client has ended its side
        self.deadline = time.monotonic() + TIMEOUT  # None while in the room
        clients.append(self)
        if len(clients) <= MAX_CLIENTS:
            self.send("HELLO linechat/1 send NAME and your name")
        else:
            self.close("full", "ERR full try later")
            self.ended = True

    def send(self, line):
        self.output += line.encode() + b"\r\n"

    # Closes the connection once its output is sent, and the client's end has come.
    def close(self, reason, last_line=None):
        if last_line:
            self.send(last_line)
        if self.name:
            del room[self.name.lower()]
            tell_room(f"LEFT {self.name} {len(room)} {reason}", with_roster=True)
        self.name, self.closing, self.deadline = None, True, time.monotonic() + TIMEOUT

    def receive(self):
        try:
            data = self.sock.recv(4096)
        except OSError:  # the connection has failed
            data = b""
        if not data:
            self.ended = True
            return self.close("disconnected")
        *lines, self.input = (self.input + data).split(b"\n")
        for line in lines:
            self.handle(line.removesuffix(b"\r"))
            self.skipping = False
        if len(self.input.removesuffix(b"\r")) > MAX_REQUEST:
            self.handle(self.input)
            self.input, self.skipping = b"", True

    # Checks a line in the order of PROTOCOL.md, "Errors", and carries it out.
    def handle(self, line):
        if self.closing or self.skipping or not line:
            return
        text = line.decode(errors="surrogateescape")  # BAD_TEXT finds what is not UTF-8
        verb, _, argument = text.partition(" ")
        verb = verb.upper() if verb.isascii() else verb  # upper() makes U+017F an S
        to, _, message = argument[1:].partition(" ")
        is_name = NAME.fullmatch(argument) and len(line) <= len("NAME ") + MAX_NAME
        other = self.is_first and (b" HTTP/" in line or line[0] == 22 or len(line) > MAX_REQUEST)
        checks = (
            (other, "usage another protocol, but this is a linechat server"),
            (len(line) > MAX_REQUEST, "line-too-long a request has at most 4000 bytes"),
            (BAD_TEXT.search(text), "bad-text not UTF-8, or with control characters"),
            (verb not in ARGUMENTS, "unknown-command try HELP"),
            (verb == "NAME" and self.name, "already-named a name cannot be changed"),
            (verb in ("MSG", "PRIV", "LIST") and not self.name, "not-named send NAME first"),
            (not re.fullmatch(ARGUMENTS.get(verb, ""), argument), "usage try HELP"),
            (verb == "NAME" and not is_name, "bad-name use letters and digits"),
            (verb == "NAME" and argument.lower() in room, "name-taken choose another"),
            (verb == "PRIV" and to.lower() not in room, "no-such-user nobody has that name"))
        error = next((error for failed, error in checks if failed), None)
        if other:
            self.close("usage", f"ERR {error}")
        elif error:
            self.send(f"ERR {error}")
        elif verb == "NAME":
            self.name, self.deadline, room[argument.lower()] = argument, None, self
            self.send(f"WELCOME {self.name} {len(room)}")
            tell_room(f"JOINED {self.name} {len(room)}", but=self, with_roster=True)
        elif verb == "MSG":
            tell_room(f"MSG {self.name} {argument}", but=self)
        elif verb == "PRIV":
            room[to.lower()].send(f"PRIV {self.name} {message}")
            self.send(f"SENT {room[to.lower()].name} {message}")
        elif verb == "QUIT":
            self.close("quit", "BYE")
        elif verb == "LIST":
            self.send(roster())
        elif verb == "PING":
            self.send(f"PONG {argument}" if argument else "PONG")
        elif verb == "HELP":
            self.send("HELP NAME name, MSG text, PRIV @name text, LIST, PING text, QUIT")
        self.is_first = False

    # Sends as much of the output as the client takes, and enforces the limits.
    def flush(self):
        try:
            del self.output[:self.sock.send(self.output) if self.output else 0]
            if self.closing and not self.output:
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # nothing can be sent, but what was received before is still read
            self.output.clear()
        is_late = self.deadline and time.monotonic() > self.deadline
        if is_late and not self.closing:
            self.close("timeout", "ERR timeout no name was given")
        elif is_late or len(self.output) > MAX_PENDING or self.ended and not self.output:
            self.close("slow")
            clients.remove(self)
            self.sock.close()


host, _, port = (sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9999").rpartition(":")
listener = socket.create_server((host, int(port)), backlog=128)
print("listening on %s:%d" % listener.getsockname(), flush=True)
try:
    while True:
        readers = [listener] + [client for client in clients if not client.ended]
        ready, _, _ = select.select(readers, [client for client in clients if client.output], [], 1)
        for source in ready:
            Client(listener) if source is listener else source.receive()
        for client in list(clients):
            client.flush()
except KeyboardInterrupt:
    for client in [client for client in clients if not client.closing]:
        client.send("BYE the server stops")
        client.flush()
