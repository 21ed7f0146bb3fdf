"""`[serve]` of site.toml: where `fedclient serve-model` listens, whom it hears, how much it takes, whom it answers."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from shared_models.errors import StudyInvalid
from shared_models.parse import STRICT

AET = r"[A-Za-z0-9][A-Za-z0-9_ .-]{0,15}"
Port = Annotated[int, Field(ge=0, le=65535)]
Peer = Annotated[str, Field(pattern=rf"^{AET}(@[^@\s]+)?$")]
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Serve:
    """`[serve]`; options of the command go before it.

    Attributes:
        host, port: of the pages, the REST interface and DICOMweb. Beyond this machine they need TLS.
        public_origin: `https://name` under which a proxy of the hospital's own shows the pages to others; empty: none
            does. The proxy may keep the name that it was asked by or not.
        token: they ask for the token in `secrets/serve-token`; without it every user of this machine reads all results.
        dicom_host, dicom_port: of the DICOM receiver.
        ae_title: of the receiver; who calls another name is refused.
        allow: who may send: `AE`, or `AE@address` with an IP address, for names are not looked up. None named: there is
            no receiver.
        return_to: where results go: `AE@host:port` (C-STORE) or the URL of a DICOMweb service (STOW-RS); empty:
            nowhere.
        insecure_return: `return_to` may be http:// to another machine: whoever listens on the way reads results.
        quiet_s: a series is whole when nothing more has come for so long, and who sent of it has hung up, begun another
            series, or sent nothing of it for a minute.
        join_s: files of a series are kept so long after it was handed on: what comes of it later is predicted on
            together with them. What comes later still, or ever with 0, is refused until the whole series is sent again.
        quota_gib: that files received and results may take up together.
        most_mib: of one upload, or of one DICOM object.
        queue: cases that wait; one more is answered with 503, or as out of resources.
        time_limit_s: for one case.
        keep_hours: results are deleted so long after they were written; an upload is as soon as it is predicted on.
        return_hours: results that `return_to` does not take are sent again for so long. Then they are given up, and
            kept for `keep_hours` more.
        tls_certificate, tls_key: PEM files, of pages and receiver alike.
        tls_ca: PEM file; DICOM peers must show a certificate of it.
    """

    __pydantic_config__ = STRICT
    host: str = "127.0.0.1"
    port: Port = 8484
    public_origin: str = ""
    token: bool = True
    dicom_host: str = "127.0.0.1"
    dicom_port: Port = 11112
    ae_title: Annotated[str, Field(pattern=f"^{AET}$")] = "FEDIMAGING"
    allow: Annotated[tuple[Peer, ...], Field(max_length=100)] = ()
    return_to: str = ""
    insecure_return: bool = False
    quiet_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    join_s: Annotated[float, Field(ge=0, le=86400)] = 600.0
    quota_gib: Annotated[float, Field(gt=0, le=1e6)] = 20.0
    most_mib: Annotated[float, Field(gt=0, le=65536)] = 2048.0
    queue: Annotated[int, Field(ge=1, le=10_000)] = 16
    time_limit_s: Annotated[float, Field(gt=0, le=86400)] = 1800.0
    keep_hours: Annotated[float, Field(gt=0, le=8760)] = 24.0
    return_hours: Annotated[float, Field(gt=0, le=8760)] = 72.0
    tls_certificate: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    def __post_init__(self) -> None:
        to = destination(self.return_to) if self.return_to else None
        if to is not None and to.plain and not self.insecure_return:
            raise ValueError(
                f"return_to is {self.return_to!r}, by which results leave this machine for all to read: give an https "
                f"URL, or insecure_return = true where the network is closed to others"
            )
        if self.insecure_return and (to is None or not to.plain):
            raise ValueError("insecure_return is for a return_to by http to another machine, which this is not")
        for peer in self.allow:
            _, at, address = peer.partition("@")
            if at and address_of(address) is None:
                raise ValueError(
                    f"allow names {peer!r}; behind the @ goes the IP address from which it sends, as in PACS@10.0.0.7: "
                    f"names are not looked up"
                )
        if self.public_origin and not re.fullmatch(
            r"https://[a-z0-9][a-z0-9.-]*(:(?!443$)[1-9]\d{0,4})?", self.public_origin
        ):
            raise ValueError(
                f"public_origin is {self.public_origin!r}; allowed is what browsers show before the path, all in lower "
                f"case: https://name, or https://name:port where that is not 443"
            )
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key come together")
        if self.tls_ca and not self.tls_key:
            raise ValueError("tls_ca is for TLS, which needs tls_certificate and tls_key")
        if not is_local(self.host) and not self.tls_key:
            raise ValueError(
                f"host is {self.host!r}, beyond this machine: give tls_certificate and tls_key, or keep 127.0.0.1 "
                f"behind a proxy of the hospital's own, and give what browsers ask that for as public_origin"
            )
        if not is_local(self.host) and not self.token:
            raise ValueError(f"token is off and host is {self.host!r}, beyond this machine: leave token on")
        if self.public_origin and not self.token:
            raise ValueError("token is off and public_origin shows the pages to other machines: leave token on")

    @property
    def local(self) -> bool:
        """Whether the pages are for this machine alone."""
        return is_local(self.host)

    @property
    def unencrypted(self) -> list[str]:
        """What whoever listens on the network can read: few PACS speak TLS, so that it is told and not refused."""
        to = destination(self.return_to) if self.return_to else None
        found = []
        if to is not None and to.kind == "dicom" and not is_local(to.host):
            found.append(f"C-STORE to {to.host} is not encrypted: whoever listens on the way reads results")
        if self.allow and not is_local(self.dicom_host) and not self.tls_key:
            found.append("the DICOM receiver is without TLS (tls_key): whoever listens on the way reads what is sent")
        return found


@dataclass(frozen=True, slots=True)
class Destination:
    """Where results go: a DICOM peer by its AE title, or a DICOMweb service by its URL."""

    kind: Literal["dicom", "web"]
    host: str
    port: int
    ae_title: str = ""
    url: str = ""

    @property
    def plain(self) -> bool:
        """Whether HTTP without TLS goes to another machine."""
        address = urlsplit(self.url)
        return address.scheme == "http" and not is_local(address.hostname or "")

    def __str__(self) -> str:
        return self.url or f"{self.ae_title}@{self.host}:{self.port}"


def destination(text: str) -> Destination:
    """`AE@host:port`, or the URL of a DICOMweb service.

    Raises:
        ValueError: neither.
    """
    if re.fullmatch(r"https?://[^\s@]+", text):
        return Destination("web", "", 0, url=text.rstrip("/"))
    found = re.fullmatch(rf"({AET})@([^\s@:]+|\[[0-9a-fA-F:]+\]):(\d{{1,5}})", text)
    if found is None or not 0 < int(found[3]) < 65536:
        raise ValueError(f"return_to is {text!r}; allowed is AE@host:port, or the URL of a DICOMweb service")
    return Destination("dicom", found[2].strip("[]"), int(found[3]), found[1].strip())


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address, the same one however it is written; None of what is none."""
    try:
        found = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_local(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_files(serve: Serve) -> None:
    """Raises StudyInvalid for a file of TLS that is not there."""
    for key in ("tls_certificate", "tls_key", "tls_ca"):
        name = getattr(serve, key)
        if name and not Path(name).is_file():
            raise StudyInvalid(f"[serve] {key}: {name} is not there. Give the path of a PEM file.")
