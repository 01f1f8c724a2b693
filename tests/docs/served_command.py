"""`moesaic` for bash blocks, run by forks of a process that has imported it.

Importing takes seconds, which every command of every page would spend again. A fork has all else of a process of its own:
arguments, environment, folder, standard streams, exit code.

As a script: python served_command.py SOCKET. It serves until its standard input ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps({{"argv": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    code = server.recv(8)
sys.exit(int(code) if code else "the process of this command was killed")
"""


@contextlib.contextmanager
def served_command(folder: Path) -> Iterator[Path]:
    """A folder for the front of PATH, inside `folder`, with the command `moesaic`."""
    address, commands = folder / "socket", folder / "bin"
    commands.mkdir()
    client = commands / "moesaic"
    client.write_text(CLIENT.format(python=sys.executable, path=str(address)), encoding="utf-8")
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield commands
    finally:
        server.stdin.close()
        server.wait(30)


def serve(address: str) -> None:
    """Answer requests until standard input ends; in a fork, runs the command that was asked for."""
    from moesaic.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that end are gone
    gc.freeze()  # a collection in a fork would write to, and so copy, the memory of all modules
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listener, 0], [], [])
            if listener not in readable:
                return
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _become(client)
    try:
        main()
        code: int | str | None = 0
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    # What the end of an interpreter does for users; to take down all modules takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(str(code or 0).encode())
    os._exit(0)


def _become(client: socket.socket) -> None:
    """Take over the arguments, environment, folder and standard streams of the process that asks."""
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(length, "big")))
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]


if __name__ == "__main__":
    serve(sys.argv[1])
