"""What may keep a hospital's node from working, looked at one by one: network, machine, the site's own files."""

import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fedclient.authorities import refresh
from fedclient.clock import clock_gap, gap_words, too_far
from fedclient.consent import undecided
from fedclient.data.quota import cache_bytes
from fedclient.gpus import asked
from fedclient.limits import Limits
from fedclient.policy import Policy
from fedclient.release_policy import Releases
from fedclient.renewal import SITE_KEYS, certificate_of, expiry_warning
from fedclient.site import SiteFile, check_data, open_site, read_site_file
from fedclient.trust import kept_lists
from fedclient.welcome import shut_out
from shared_models.alarms import alarm_words
from shared_models.authority import read_files
from shared_models.dates import date_text, day
from shared_models.doctor import (
    Check,
    Line,
    disk,
    examined,
    failed,
    flower_names,
    gib,
    memory,
    secrets,
    versions,
)
from shared_models.errors import FederationError, StateInvalid
from shared_models.identity import is_issued_by, split_address, whose
from shared_models.standing import ahead
from shared_models.supervise import read_status, troubles
from shared_models.transfer import connect, site_context

TIMEOUT_S = 10.0
GIB = 2**30


def examine(folder: Path) -> Iterator[Line]:
    """Every check of the site in `folder`, line by line as it is made; the network's first."""
    try:
        file = read_site_file(folder)
    except FederationError as error:
        yield failed("settings", error)
        yield from examined({"versions": versions, "flower": flower_names, "memory": lambda: [memory()]})
        return
    yield Line("settings", "ok", f"{file.name}, node of {file.federation}; coordinator {file.coordinator}.")
    yield from examined(_checks(folder, file))


def _checks(folder: Path, file: SiteFile) -> Mapping[str, Check]:
    address = file.coordinator
    return {
        "keys": lambda: secrets(folder / name for name in SITE_KEYS),
        "certificate": lambda: _certificate(folder),
        "proxy": lambda: _proxy(address),
        "dns": lambda: _dns(address),
        "tls": lambda: _coordinator(folder, address),
        "clock": lambda: _clock(folder, address),
        "disk": lambda: [_disk(folder, file)],
        "memory": lambda: [memory(_bytes(file.limits))],
        "device": lambda: device(file.compute.device, file.limits),
        "data": lambda: _data(folder, file),
        "policy": lambda: _policy(folder, file.policy),
        "node": lambda: _node(folder),
        "alarms": lambda: _alarms(folder),
        "releases": lambda: _releases(folder, file.releases),
        "versions": versions,
        "flower": flower_names,
    }


def _bytes(limits: Limits) -> int | None:
    return None if limits.memory_gib is None else int(limits.memory_gib * GIB)


def _certificate(folder: Path) -> Iterator[Line]:
    now, shown = time.time(), certificate_of(folder)
    warned = expiry_warning(folder, now)
    if warned is None:
        yield Line("certificate", "ok", f"good until {date_text(shown.expires_at_s)}.")
        return
    words, _, mend = warned.partition(". ")
    yield Line("certificate", "warn" if shown.since_s <= now < shown.expires_at_s else "fail", f"{words}.", mend)


# The network


@dataclass(frozen=True, slots=True)
class Proxy:
    """The proxy on the way to the coordinator."""

    host: str
    port: int


def proxy_of(host: str) -> Proxy | None:
    """The proxy that HTTPS_PROXY names for `host`, as our own connections take it; None for the direct way.

    Raises:
        StateInvalid: it names no host.
    """
    named = urllib.request.getproxies().get("https")
    if named is None or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(named if "//" in named else f"//{named}")
    if parts.hostname is None:
        raise StateInvalid("HTTPS_PROXY: names no host. Set it to http://host:port, or unset it.")
    return Proxy(parts.hostname, parts.port or 3128)


def _proxy(address: str) -> Iterator[Line]:
    host, _ = split_address(address)
    by = proxy_of(host)
    set_here = [name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY") if _environment(name)]
    if by is None:
        why = "is set and leaves it out" if _environment("HTTPS_PROXY") else "is not set"
        words = f"the way to the coordinator is direct, HTTPS_PROXY {why}."
        if "HTTP_PROXY" in set_here and not _environment("HTTPS_PROXY"):
            mend = "The coordinator speaks TLS: set HTTPS_PROXY to the same proxy if it must be passed."
            yield Line("proxy", "warn", f"HTTP_PROXY is set and HTTPS_PROXY is not; {words}", mend)
        else:
            yield Line("proxy", "ok", words)
    else:
        _reach(by.host, by.port, "Check HTTPS_PROXY, and that the proxy runs.")
        yield Line("proxy", "ok", f"by way of {by.host}:{by.port}, which answers.")
    if any(name in set_here for name in ("HTTP_PROXY", "ALL_PROXY")) and not _spares_loopback():
        words = "HTTP_PROXY would take calls of this machine to itself, too."
        mend = "`fedclient start` keeps its own off it; for other programs: NO_PROXY=127.0.0.1,localhost,::1."
        yield Line("proxy, loopback", "warn", words, mend)


def _environment(name: str) -> str:
    return os.environ.get(name.lower(), os.environ.get(name, ""))


def _spares_loopback() -> bool:
    return bool(urllib.request.proxy_bypass("127.0.0.1")) and bool(urllib.request.proxy_bypass("localhost"))


def _dns(address: str) -> Iterator[Line]:
    host, port = split_address(address)
    by = proxy_of(host)
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        words = f"{host} has no address here ({error.strerror or error})."
        if by is None:
            yield Line("dns", "fail", words, "Check the name in site.toml, and this machine's name server.")
        else:
            yield Line("dns", "ok", f"{words} The proxy looks it up.")
        return
    yield Line("dns", "ok", f"{host} is {', '.join(sorted(found))}.")


def _reach(host: str, port: int, mend: str) -> None:
    """Raises StateInvalid unless something listens at `host:port`."""
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise StateInvalid(f"{host}:{port} cannot be reached ({why}). {mend}") from error


def _coordinator(folder: Path, address: str) -> Iterator[Line]:
    """Whether the coordinator answers, whether it is the coordinator, and whether it lets this site in."""
    host, port = split_address(address)
    if proxy_of(host) is None:
        _reach(host, port, "Check the firewall (one outbound port), and that `fedserver serve` runs there.")
        yield Line("reach", "ok", f"something listens at {address}.")
    try:
        refresh(folder, certificate_of(folder).name, address)
    except StateInvalid as error:
        yield failed("authority", error)
        return
    except FederationError:
        pass  # the next lines say why it cannot be reached
    context, authority = site_context(folder / "keys"), read_files(folder / "keys")
    try:
        with closing(connect(address, context, TIMEOUT_S)) as connection:
            connection.connect()
    except ssl.SSLCertVerificationError as error:
        yield _stranger(address, authority, error.verify_message)
        return
    except (OSError, FederationError) as error:
        words = f"{address} takes no TLS 1.3 connection ({getattr(error, 'strerror', None) or error})."
        yield Line("tls", "fail", words, "Check that this is the coordinator's port; a proxy must let CONNECT pass.")
        return
    yield Line("tls", "ok", "the certificate shown there is of the authority that this site pinned when it joined.")
    why = shut_out(folder, address)
    if why is None:
        yield Line("admission", "ok", "the coordinator lets this site in.")
    else:
        yield Line("admission", "fail", f"the coordinator does not let this site in: {why}", "Telephone it.")


def _stranger(address: str, authority: bytes, why: str) -> Line:
    """Whose certificate is shown where the coordinator's should be."""
    shown = presented(address)
    if shown is None:
        return Line("tls", "fail", f"the certificate shown at {address} is not good ({why}).", "Telephone it.")
    if is_issued_by(shown, authority):
        mend = "Check the address in site.toml and this clock; the coordinator renews its own with `fedserver renew`."
        return Line("tls", "fail", f"the certificate of {address} is the coordinator's and not good: {why}.", mend)
    mend = (
        f"Somebody on the way reads TLS. Have {address} exempted from TLS inspection; if nobody inspects here, do not "
        "go on, and telephone the coordinator."
    )
    return Line("tls interception", "fail", f"{address} shows a certificate of {whose(shown)}.", mend)


def presented(address: str) -> bytes | None:
    """The certificate (DER) shown at `address`, whoever's it is; nothing is sent over that connection but its end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with closing(connect(address, context, TIMEOUT_S)) as connection:
            connection.connect()
            assert isinstance(connection.sock, ssl.SSLSocket)
            return connection.sock.getpeercert(binary_form=True)
    except (OSError, FederationError):
        return None


def _clock(folder: Path, address: str) -> Iterator[Line]:
    gap = clock_gap(address, site_context(folder / "keys"))
    if gap is None:
        yield Line("clock", "warn", "could not be compared, the coordinator does not answer.", "See the lines above.")
    elif too_far(gap):
        words = f"this machine's clock is {gap_words(gap)} the coordinator's, and every call would be refused."
        yield Line("clock", "fail", words, "Set both by NTP (`timedatectl set-ntp true`).")
    else:
        yield Line("clock", "ok", "as the coordinator's, to the second that its answer tells.")


# The machine


def _disk(folder: Path, file: SiteFile) -> Line:
    held = cache_bytes(folder / "cache")
    quota = int(file.cache.quota_gib * GIB)
    return disk(folder, max(0, quota - held), f"the cache ({gib(held)} of {file.cache.quota_gib:g} GiB are in it)")


def device(wanted: str, limits: Limits) -> Iterator[Line]:
    """The device of site.toml: whether it is there and computes, and a GPU that nobody uses."""
    from fedclient.training.device import build, gpus, try_gpu

    seen, there = nvidia(), gpus()
    if wanted == "cpu" or (wanted == "auto" and not there):
        words = f"the CPU trains; PyTorch {build()}"
        if seen and wanted == "auto":
            mend = "Install a PyTorch for CUDA that fits this driver (pytorch.org), or a newer driver."
            yield Line("device", "warn", f"{words}, and {seen[0]} stands idle.", mend)
        else:
            yield Line("device", "ok", f"{words}, {len(os.sched_getaffinity(0))} cores.")
        return
    number = int(wanted.partition(":")[2] or 0)
    if number >= there:
        words = f"site.toml asks for {wanted}, PyTorch {build()} sees {there} GPUs{f'; {seen[0]}' if seen else ''}."
        yield Line("device", "fail", words, 'Install driver and PyTorch for CUDA, or set device = "auto".')
        return
    gpu = try_gpu(number)
    driver = seen[number].partition(" with ")[2] if number < len(seen) else "a driver that nvidia-smi does not tell"
    words = f"{gpu.name}, {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} GiB free, {driver}, PyTorch {build()}"
    allowed = limits.gpu_memory_share * gpu.total_bytes
    if gpu.free_bytes < min(allowed, 2 * GIB):
        mend = "End what fills it, or lower gpu_memory_share under [limits]."
        yield Line("device", "warn", f"{words}; others hold most of it.", mend)
    else:
        yield Line("device", "ok", f"{words}; training may take {gib(allowed)} GiB.")


def nvidia() -> list[str]:
    """`NAME with driver VERSION` of each GPU that NVIDIA's own tool sees; nothing where there is no such tool."""
    return [f"{name} with driver {driver}" for name, driver in asked("name", "driver_version")]


# What is the site's own


def _data(folder: Path, file: SiteFile) -> Iterator[Line]:
    from fedclient.gate.run import last_needs, standing

    check_data(folder, file.data.folder)
    site = open_site({"site-dir": str(folder)})
    found = standing(site, last_needs(site))
    words = f"{found.layout}; {found.cases} cases"
    if found.blocking:
        codes = ", ".join(f"{code} ({times})" for code, times in sorted(found.blocking.items()))
        mend = "`fedclient check` says which cases, how to mend them, and what may be waived."
        yield Line("data", "fail", f"{words}; training is stopped by {codes}.", mend)
    elif not found.cases:
        yield Line("data", "fail", f"{words}.", f"Put images into {folder / 'site.toml'}'s data folder.")
    elif found.unseen:
        yield Line("data", "warn", f"{words}, {found.unseen} not looked at yet.", "`fedclient check` looks at them.")
    else:
        yield Line("data", "ok", f"{words}, all looked at, none stops training.")
    if os.access(file.data.folder, os.W_OK) and os.geteuid() != 0:
        mend = "It only reads: mount the folder read-only for this user (ReadOnlyPaths=, :ro)."
        yield Line("data, rights", "warn", "this user may write into the data folder.", mend)


def _policy(folder: Path, policy: Policy) -> Iterator[Line]:
    open_now = policy.is_open(time.time())
    hours = f"hours {', '.join(policy.hours)} ({policy.time_zone}), {'open' if open_now else 'closed'} now"
    words = f"approval {policy.approval}; {hours if policy.hours else 'at any hour'}."
    waiting = len(undecided(folder))
    if waiting:
        mend = "`fedclient studies`, then `fedclient approve STUDY` or `fedclient refuse STUDY`."
        yield Line("policy", "warn", f"{words} {waiting} studies wait for a decision here.", mend)
    else:
        yield Line("policy", "ok", words)


def _node(folder: Path) -> Iterator[Line]:
    status = read_status(folder)
    told = troubles(status)
    if status["supervisor"] is None:
        yield Line("node", "warn", "does not run.", "`fedclient start` starts it.")
    elif told:
        yield Line("node", "warn", " ".join(told), "`fedclient logs` shows what it said.")
    else:
        yield Line("node", "ok", f"runs, {len(status['children'])} processes.")


def _alarms(folder: Path) -> Iterator[Line]:
    told = alarm_words(folder / "audit.jsonl")
    for words in told:
        yield Line("audit", "fail", words, "`fedclient audit verify`; then telephone the coordinator.")
    if not told:
        yield Line("audit", "ok", "nothing was noticed that contradicts the coordinator's log.")


def _releases(folder: Path, policy: Releases) -> Iterator[Line]:
    """Whether this site would hear that a release of its was retired; nothing where it keeps no list and needs none."""
    lists = kept_lists(folder)
    mend = (
        "Get the output of `fedserver release-status` from the coordinator; `fedclient verify RELEASE --status FILE`."
    )
    if not lists and policy.status_required:
        yield Line("releases", "fail", "site.toml asks for a list of releases, and none was handed in.", mend)
    for each in lists:
        if wrong := ahead(each, time.time()):
            yield Line("releases", "fail", f"of {each.federation!r}, {wrong}", mend)
            continue
        words = f"the list of {each.federation!r} is good until {day(each.good_until)}."
        yield Line("releases", "ok", words) if time.time() <= each.good_until else Line("releases", "warn", words, mend)
