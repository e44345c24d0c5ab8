"""Serves a store until standard input is closed: `python -m bench.scale.store_server` prints its port."""

import sys

from torch.distributed import TCPStore  # type: ignore[attr-defined]

if __name__ == "__main__":
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.read()
