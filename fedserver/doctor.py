"""What may keep a coordinator from serving, looked at one by one: ports, certificates, disk, backup, clock."""

import ipaddress
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedserver.backup import last_backup_s
from fedserver.checkpoint import RunFolder, read_state
from fedserver.enrol import Federation, open_federation
from fedserver.lifecycle import warnings
from fedserver.state import list_runs, list_sites
from shared_models.alarms import alarm_words
from shared_models.dates import date_text, span_text
from shared_models.doctor import (
    Check,
    Line,
    clock_moved_back,
    disk,
    examined,
    failed,
    flower_names,
    meaning,
    memory,
    versions,
)
from shared_models.errors import FederationError
from shared_models.files import read_lines
from shared_models.identity import is_for, load_credential, read_certificate, split_address
from shared_models.supervise import read_status, troubles

DAY_S = 86400.0
STALE_BACKUP_S = 7 * DAY_S
COPIES = 4  # of a model, for each site, that must fit on the disk: uploads, the spool, two rounds


def examine(folder: Path) -> Iterator[Line]:
    """Every check of the federation in `folder`, line by line as it is made."""
    try:
        federation = open_federation(folder)
    except FederationError as error:
        yield failed("settings", error)
        yield from examined({"versions": versions, "flower": flower_names, "memory": lambda: [memory()]})
        return
    yield Line("settings", "ok", f"{federation.name}; hospitals dial {federation.address}.")
    yield Line("keys", "ok", "the key files are ours alone.")  # `open_federation` has looked at each
    yield from examined(_checks(federation))


def _checks(federation: Federation) -> Mapping[str, Check]:
    return {
        "certificates": lambda: _certificates(federation),
        "address": lambda: _address(federation),
        "port": lambda: _port(federation),
        "disk": lambda: [_disk(federation)],
        "memory": lambda: [memory()],
        "backup": lambda: [_backup(federation)],
        "clock": lambda: [_clock(federation)],
        "processes": lambda: _processes(federation),
        "alarms": lambda: _alarms(federation),
        "versions": versions,
        "flower": flower_names,
    }


def _certificates(federation: Federation) -> Iterator[Line]:
    told = warnings(federation)
    for warned in told:
        words, _, mend = warned.partition(". ")
        bad = "has expired" in words or "begins only" in words
        yield Line("certificates", "fail" if bad else "warn", f"{words}.", mend)
    if not told:
        own = read_certificate(load_credential(federation.server_certificate).certificate)
        yield Line("certificates", "ok", f"all are good; the coordinator's own until {date_text(own.expires_at_s)}.")


def _address(federation: Federation) -> Iterator[Line]:
    yield dialled(federation)
    host, _ = split_address(federation.address)
    if not is_for(load_credential(federation.server_certificate).certificate, host):
        words = f"the coordinator's certificate is not for {host}, so that no hospital takes it for the coordinator."
        yield Line("address, certificate", "fail", words, "`fedserver renew` makes one that is.")


def dialled(federation: Federation) -> Line:
    """Whether hospitals can dial the federation's address, as far as this machine knows, and how it is changed."""
    host, port = split_address(federation.address)
    mend = (
        f"If hospitals cannot dial it: set `address` in {federation.folder / 'federation.toml'}, `fedserver renew`, "
        f"start `fedserver serve` anew, and send new invites; one that has joined sets `coordinator` in its site.toml."
    )
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        return Line("address", "warn", f"{host} has no address here ({error.strerror or error}).", mend)
    if all(_stays_here(each) for each in found):
        words = f"{meaning(host, found)}, by which nobody but this machine reaches it."
        return Line("address", "warn", words, mend)
    return Line("address", "ok", f"{meaning(host, found)}.")


def _stays_here(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_loopback or found.is_unspecified


def _port(federation: Federation) -> Iterator[Line]:
    """Whether the port that hospitals dial is ours, free, or somebody else's."""
    _, port = split_address(federation.address)
    if read_status(federation.folder)["supervisor"] is not None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=3).close()
            yield Line("port", "ok", f"something answers at port {port} of this machine, and the federation is served.")
        except OSError:
            words = f"the federation is served, and nothing answers at port {port} of this machine."
            mend = "It may listen on another address or port (--host, --port); see `fedserver logs --process gateway`."
            yield Line("port", "warn", words, mend)
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            words = f"port {port} cannot be listened on ({error.strerror})."
            yield Line("port", "fail", words, "Stop what uses it, or forward it and give another one to --port.")
            return
    yield Line("port", "warn", f"port {port} is free: nothing serves the federation.", "Start `fedserver serve`.")


def _disk(federation: Federation) -> Line:
    """Room for the largest model of the runs that are not finished, so many times for each site."""
    sizes = [0]
    for run in list_runs(federation.state):
        if run.state in ("queued", "running", "paused"):
            folder = RunFolder(federation.runs / run.id)
            weights = folder.weights(read_state(folder).round)
            sizes.append(weights.stat().st_size if weights.exists() else 0)
    active = sum(site.state == "active" for site in list_sites(federation.state))
    return disk(federation.folder, max(sizes) * COPIES * max(1, active), f"a run with {active} sites")


def _backup(federation: Federation) -> Line:
    at = last_backup_s(federation.folder)
    mend = "`fedserver backup FILE`, every day, and kept elsewhere."
    if at is None:
        return Line("backup", "warn", "none was ever made.", mend)
    age = span_text(max(0.0, time.time() - at))
    if time.time() - at > STALE_BACKUP_S:
        return Line("backup", "warn", f"the last one is {age} old.", mend)
    return Line("backup", "ok", f"the last one is {age} old.")


def _clock(federation: Federation) -> Line:
    lines = read_lines(federation.folder / "audit.jsonl")
    return clock_moved_back(float(lines[-1]["time"]) if lines else 0.0, "the audit log")


def _processes(federation: Federation) -> Iterator[Line]:
    status = read_status(federation.folder)
    told = troubles(status)
    if status["supervisor"] is not None and told:
        yield Line("processes", "warn", " ".join(told), "`fedserver logs` shows what they said.")
    elif status["supervisor"] is not None:
        yield Line("processes", "ok", f"{len(status['children'])} are running.")


def _alarms(federation: Federation) -> Iterator[Line]:
    told = alarm_words(federation.folder / "audit.jsonl")
    for words in told:
        yield Line("audit", "fail", words, "`fedserver audit verify`; then telephone that hospital.")
    if not told:
        yield Line("audit", "ok", "nothing was noticed that contradicts a site's log.")
