"""Lets workers on other machines use this one's study: ``--storage grpc://HOST:13000`` there.

    python sweeps/proxy.py --storage sqlite:///sweeps.db --host 10.0.0.5

Nothing is encrypted and nobody is asked for a password: for private networks only.
"""

from __future__ import annotations

import argparse

from optuna.storages import run_grpc_proxy_server

from ogls.sweep.attempts import requeue_killed
from ogls.sweep.storage import open_storage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--storage", default="sqlite:///sweeps.db", help="of Optuna (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=13000, help="default: %(default)s")
    given = parser.parse_args()
    try:
        storage = open_storage(given.storage, requeue_killed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"--storage grpc://{given.host}:{given.port}", flush=True)
    run_grpc_proxy_server(storage, host=given.host, port=given.port)
