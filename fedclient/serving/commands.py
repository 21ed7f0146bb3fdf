"""`fedclient serve-model` and `fedclient drift`: a release inside the hospital's network, and whether it still fits."""

import json
import shutil
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedclient.verify import Authority, Status
from shared_models.cli import guarded, print_json

if TYPE_CHECKING:  # they import the readers, pydicom and more
    from fedclient.drift import Drift
    from fedclient.serving.service import Service
    from fedclient.serving.settings import Serve
    from shared_models.release import Release

console = Console(soft_wrap=True)
Folder = Annotated[
    Path,
    typer.Option("--site", envvar="FEDCLIENT_SITE", help="Folder of this node: settings, trust, what is kept."),
]
ReleasePath = Annotated[Path, typer.Argument(help="A release: its folder, or its .fedrelease file.")]
Research = Annotated[
    bool, typer.Option("--research", help="Take a release that no federation has signed; never for patients.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
SHOWN = 8  # features


class Device(StrEnum):
    """Where the network is computed."""

    CPU = "cpu"
    CUDA = "cuda"


@guarded
def serve_model(
    release: ReleasePath,
    site: Folder = Path("site"),
    host: Annotated[str | None, typer.Option(help="Of pages, REST and DICOMweb; beyond 127.0.0.1 with TLS.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of the pages; 0 takes a free one.")] = None,
    public_origin: Annotated[
        str | None, typer.Option(help="https://NAME under which a proxy of the hospital's own shows the pages.")
    ] = None,
    token: Annotated[
        bool | None,
        typer.Option("--token/--no-token", help="Ask for a token; off, every user of this machine reads all results."),
    ] = None,
    dicom_host: Annotated[str | None, typer.Option(help="Of the DICOM receiver.")] = None,
    dicom_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of the DICOM receiver; 0 takes a free one.")
    ] = None,
    ae_title: Annotated[str | None, typer.Option(help="Of the receiver.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="Who may send: AE, or AE@IP-ADDRESS; repeated. Nobody: no receiver.")
    ] = None,
    return_to: Annotated[
        str | None, typer.Option(help="Where results go: AE@host:port, or a DICOMweb URL. Nowhere without it.")
    ] = None,
    insecure_return: Annotated[
        bool | None, typer.Option("--insecure-return", help="Let results go to another machine by http, unencrypted.")
    ] = None,
    quiet_s: Annotated[float | None, typer.Option(min=0, help="Silence after which a series is whole.")] = None,
    join_s: Annotated[
        float | None, typer.Option(min=0, help="How long a received series is kept, to be joined with what comes late.")
    ] = None,
    quota_gib: Annotated[float | None, typer.Option(min=0.001, help="For files received and results.")] = None,
    most_mib: Annotated[float | None, typer.Option(min=0.001, help="Of one upload or DICOM object.")] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Cases that may wait.")] = None,
    time_limit_s: Annotated[float | None, typer.Option(min=1, help="For one case.")] = None,
    keep_hours: Annotated[float | None, typer.Option(min=0.01, help="How long results are kept here.")] = None,
    return_hours: Annotated[
        float | None, typer.Option(min=0.01, help="How long results are sent again that are not taken.")
    ] = None,
    tls_certificate: Annotated[str | None, typer.Option(help="PEM file, of pages and receiver.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file.")] = None,
    tls_ca: Annotated[str | None, typer.Option(help="PEM file: DICOM peers show a certificate of it.")] = None,
    device: Annotated[Device, typer.Option(help="cpu takes onnxruntime, cuda PyTorch.")] = Device.CPU,
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU; 0 for as many as there are cores.")] = 0,
    authority: Authority = None,
    status: Status = None,
    research: Research = False,
) -> None:
    """Answers images from PACS, DICOMweb, REST and a page with a released model, until Ctrl-C. Not for diagnosis.

    Options go before \\[serve] of site.toml. Nothing received is trained on, and nothing leaves but to --return-to.
    """
    from fedclient.serving.logs import own_lines_only
    from fedclient.serving.service import Service
    from fedclient.serving.warm import python
    from fedclient.trust import trust_in
    from shared_models.supervise import only_one

    given = {
        "host": host, "port": port, "public_origin": public_origin, "token": token,
        "dicom_host": dicom_host, "dicom_port": dicom_port, "ae_title": ae_title,
        "allow": tuple(allow) if allow else None, "return_to": return_to, "insecure_return": insecure_return,
        "quiet_s": quiet_s,
        "join_s": join_s, "quota_gib": quota_gib, "most_mib": most_mib, "queue": queue, "time_limit_s": time_limit_s,
        "keep_hours": keep_hours, "return_hours": return_hours,
        "tls_certificate": tls_certificate, "tls_key": tls_key, "tls_ca": tls_ca,
    }  # fmt: skip
    serve = settings(site, {key: value for key, value in given.items() if value is not None})
    own_lines_only()
    with only_one(site / "serve"):
        arguments = [str(_unpacked(release, site)), "--site", str(site), "--device", device.value]
        arguments += ["--threads", str(threads), *(["--research"] if research else [])]
        trust_in(site, authority or (), research)  # or the worker would say it, after a while
        for path in authority or ():
            arguments += ["--authority", str(path)]
        arguments += ["--status", str(_copied(status, site))] if status is not None else []
        service = Service(site, serve, python("fedclient.serving.worker", *arguments))
        try:
            service.start()
            service.run(_say)
        finally:
            service.stop()


def settings(site: Path, given: dict[str, Any]) -> "Serve":
    """`[serve]` of site.toml, where there is one, with options in the place of its keys.

    Raises:
        StudyInvalid: a value that is not allowed.
    """
    from fedclient.serving.settings import Serve
    from fedclient.site import read_site_file
    from shared_models.parse import parse, plain

    file = plain(read_site_file(site).serve) if (site / "site.toml").exists() else plain(Serve())
    return parse(Serve, file | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}, "serve-model")


def _unpacked(release: Path, site: Path) -> Path:
    """The folder of a release; of one that is a file a fresh copy, whose digests the predicting process compares."""
    from shared_models.onefile import unpack

    scratch = site / "serve" / "release"
    shutil.rmtree(scratch, ignore_errors=True)
    return unpack(release, scratch) if release.is_file() else release


def _copied(status: Path, site: Path) -> Path:
    """A list of releases, for whichever predicting process takes the place of the first: the stick that it came on may
    be pulled out by then.

    Raises:
        ReleaseInvalid: it is not there.
    """
    from shared_models.errors import ReleaseInvalid
    from shared_models.files import write_atomic

    if not status.is_file():
        raise ReleaseInvalid(f"{status}: is not there. Give the output of `fedserver release-status`.")
    copy = site / "serve" / "release-status.json"
    write_atomic(copy, status.read_bytes())
    return copy


def _say(service: "Service") -> None:
    model, serve = service.warm.model, service.serve
    scheme = "https" if serve.tls_key else "http"
    shown = f"[{serve.host}]" if ":" in serve.host else serve.host
    page = serve.public_origin or f"{scheme}://{shown}:{service.port}"
    lines = [f"{model['name']} {model['version']} ({model['sha256'][:16]}), {model['engine']}. Not for diagnosis."]
    lines += [f"warning: {words}" for words in (*model["warnings"], *serve.unencrypted)]
    lines.append(f"page and REST: {page}/   DICOMweb: {page}/dicom-web")
    if service.token is None:
        lines.append("token: off; every user of this machine can read all results")
    elif sys.stdout.isatty():
        lines.append(f"open: {page}/#token={service.token}")
    else:  # what is kept as a log holds no token
        lines.append(f"token: {service.site / 'secrets' / 'serve-token'}; open the page with #token=TOKEN behind it")
    if service.receiver is not None:
        tls = ", TLS" if serve.tls_key else ""
        lines.append(
            f"DICOM: {serve.ae_title}@{serve.dicom_host}:{service.receiver.port}{tls}, from {', '.join(serve.allow)}"
        )
    else:
        lines.append("DICOM: no receiver; name who may send with --allow AE")
    lines.append(
        f"results go to {serve.return_to}" if serve.return_to else "results go nowhere; --return-to sends them"
    )
    for line in lines:
        print(line, flush=True)


@guarded
def drift(
    release: ReleasePath,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of cases, the last ones.")] = 5,
    forget: Annotated[bool, typer.Option("--forget", help="Begin anew: delete what was counted here.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the counts for a federated round; they are logged as sent.")
    ] = None,
    site: Folder = Path("site"),
    authority: Authority = None,
    research: Research = False,
    as_json: AsJson = False,
) -> None:
    """Says whether what a release is asked here, and what it answers, is still like what it was measured on."""
    import tempfile

    from fedclient.drift import told
    from fedclient.monitoring import exported
    from fedclient.monitoring import forget as begin_anew

    with tempfile.TemporaryDirectory(prefix="fedclient-") as scratch:
        opened = _opened(release, site, authority, research, Path(scratch))
    if forget:
        begin_anew(site, opened.digest)
        if as_json:
            print_json({"release": opened.digest, "forgotten": True})
            return
        console.print("Forgotten; the next case is the first.")
        return
    if export is not None:
        cases = exported(site, opened, export)
        if as_json:
            print_json({"release": opened.digest, "file": str(export), "cases": cases})
            return
        console.print(f"{escape(str(export))}: counts of {cases} cases, for the coordinator's `fedserver monitor`.")
        return
    found = told(site, opened.study, opened.digest, opened.fingerprint, windows)
    if as_json:
        print_json(json.loads(json.dumps(asdict(found))) | {"release": opened.digest})
        return
    _tell(found, opened)


def _opened(release: Path, site: Path, authority: list[Path] | None, research: bool, scratch: Path) -> "Release":
    from fedclient.trust import trust_in
    from shared_models.release import open_release

    return open_release(release, trust_in(site, authority or (), research), scratch=scratch)


def _tell(found: "Drift", release: "Release") -> None:
    from shared_models.betting import ALARM, WINDOW

    console.print(f"{release.name} {release.version}: {found.cases} cases here.", highlight=False)
    if found.against == "nothing":
        console.print(
            f"The release tells of no reference, so the first {WINDOW} cases here become it; "
            f"{WINDOW - found.cases} more are needed."
        )
        return
    like = (
        f"the {found.profiles} sites of the release" if found.against == "release" else f"the first {WINDOW} cases here"
    )
    for first, window in found.windows:
        cases = f"cases {first} to {first + window.cases - 1}"
        if window.alarm is None:
            console.print(f"{cases}: like {like} (evidence {window.wealth:.1f} of {ALARM:.0f})", highlight=False)
            continue
        names = ", ".join(name for name, wealth in window.features[:3] if wealth > 1)
        console.print(f"[bold red]{cases}: a drift[/], told after {window.alarm} cases: {names}", highlight=False)
    table = Table("feature", "divergence", "by chance", "here", "there", box=None)
    for each in found.differences[:SHOWN]:
        table.add_row(each.feature, f"{each.divergence:.2f}", f"{each.chance:.2f}", each.here, each.there)
    console.print(table)
    if found.alarm and all(window.alarm is None for _, window in found.windows):
        console.print("[bold red]A drift[/] was told in the window before, which --windows 2 shows.", highlight=False)
    if found.alarm:
        console.print("Look at scanners, protocols and referrals since then; check answers by hand before you go on.")
    console.print(
        f"Without a drift at most one window of {WINDOW} in a hundred is called one, however often you look.",
        style="dim",
    )
