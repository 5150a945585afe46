"""How the ranks of one launch find each other: through a key-value store that the first of them keeps."""

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from hpcgen.files import reason
from hpcgen.launch.place import Place

_KNOCK = timedelta(seconds=3)
_PAUSE_S = 0.2


def meet(place: Place, timeout: timedelta) -> dist.Store:
    """The store of this launch, of this process alone where there is no other. Raises RuntimeError, ValueError."""
    if place.world == 1:
        return dist.HashStore()
    if place.kind == "torchrun":
        from torch.distributed.rendezvous import rendezvous

        return next(rendezvous("env://", place.rank, place.world, timeout=timeout))[0]
    if place.rank == 0:
        return _host(place, timeout)
    end, why = time.monotonic() + timeout.total_seconds(), "no time to ask"
    while time.monotonic() < end:
        for port in place.ports:
            try:
                return _knock(place, port, timeout)
            except (RuntimeError, OSError) as fault:  # no such name, not there yet, or another's
                why = reason(fault)
        time.sleep(_PAUSE_S)
    raise RuntimeError(f"nobody answers at {place.address}, ports {', '.join(map(str, place.ports))} ({why})")


def _knock(place: Place, port: int, timeout: timedelta) -> dist.Store:
    """The store at a port, if it is that of this launch. Raises RuntimeError if not, OSError where nobody listens."""
    with socket.create_connection((place.address, port), timeout=_KNOCK.total_seconds()):
        pass  # torch would fill the log while there is nobody
    met: list[dist.Store | RuntimeError] = []

    def try_it() -> None:
        try:
            store = dist.TCPStore(place.address, port, None, False, timeout=_KNOCK)
            told = store.get("token").decode()
            store.set_timeout(timeout)
            met.append(store if told == place.token else RuntimeError(f"port {port} is that of job {told}"))
        except RuntimeError as fault:
            met.append(fault)

    thread = threading.Thread(target=try_it, name="knock", daemon=True)  # for ever, where somebody listens in silence
    thread.start()
    thread.join(2 * _KNOCK.total_seconds())
    if not met:
        raise RuntimeError(f"port {port} belongs to somebody else")
    if isinstance(met[0], RuntimeError):
        raise met[0]
    return met[0]


def _host(place: Place, timeout: timedelta) -> dist.Store:
    why = ""
    for port in place.ports:
        try:
            store = dist.TCPStore("localhost", port, None, True, timeout=timeout, wait_for_workers=False)
        except RuntimeError as fault:  # taken
            why = reason(fault)
            continue
        store.set("token", place.token)
        return store
    raise RuntimeError(f"ports {', '.join(map(str, place.ports))} are taken ({why})")
