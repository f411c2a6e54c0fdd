"""This program runs a script that ends when the process that started it ends.

It is called as ``python ogls/system/attached.py SCRIPT ...``. The starter holds the other end of standard input. If it
is killed, the system closes that end, and the script gets the SIGTERM that its starter could not send: it finishes the
step and leaves a checkpoint, and no process stays behind.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _end_with_starter() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Runs the script that the first argument names, with the arguments after it."""
    threading.Thread(target=_end_with_starter, name="ogls-starter", daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
