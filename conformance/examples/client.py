#!/usr/bin/env python3
"""A client of linechat/1 that shows how PROTOCOL.md works. It prints the server's lines as they come.

Usage: client.py NAME [HOST:PORT]   (default 127.0.0.1:9999)
What you type is a MSG. A line that starts with "/" is a request: "/PRIV @bob hi", "/LIST", "/QUIT".
"""
import os
import re
import socket
import sys
import threading


def show_lines(lines):
    for line in lines:
        if line.endswith(b"\n"):  # a last line without an ending may be half a line
            text = line.decode(errors="replace").rstrip("\r\n")
            print(re.sub("[\0-\x08\n-\x1f\x7f-\x9f]", "?", text), flush=True)
            if text.split(" ")[0] == "BYE":
                os._exit(0)  # the main thread may be waiting for input
    os._exit(1)  # the connection is lost


def main():
    host, _, port = (sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:9999").rpartition(":")
    server = socket.create_connection((host, int(port)))
    lines = server.makefile("rb")
    if not lines.readline().startswith(b"HELLO linechat/1"):
        sys.exit("client.py: the server is full, or does not speak linechat/1")
    threading.Thread(target=show_lines, args=[lines]).start()  # so that reading never waits
    server.sendall(f"NAME {sys.argv[1]}\n".encode())
    for line in sys.stdin:
        line = line.rstrip("\n")
        server.sendall((line[1:] if line.startswith("/") else f"MSG {line}").encode() + b"\n")
    server.sendall(b"QUIT\n")


main()
