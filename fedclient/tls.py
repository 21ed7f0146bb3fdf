"""The node's side of mutual TLS: what it shows is read anew when it was renewed, without a restart."""

import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

from shared_models.authority import read_authority, read_files
from shared_models.errors import ProcessFailed
from shared_models.identity import read_certificate
from shared_models.transfer import site_context


@dataclass(slots=True)
class ClientTls:
    """The site's side of mutual TLS; a renewed certificate serves all new connections."""

    keys: Path
    context: ssl.SSLContext = field(init=False)
    changed_at: float = field(init=False)
    joined_at: float = field(init=False)
    authority: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.authority = read_files(self.keys)
        self.changed_at, self.joined_at = self._file_changed_at("tls.pem"), self._file_changed_at("node.key")
        self.context = site_context(self.keys)

    def refresh(self) -> None:
        """Reads key and certificate again if their file is a new one.

        Raises:
            ProcessFailed: the node key is a new one too, because the site has joined again: this process holds the old.
                Or an issuing key counts no more, and a context forgets none.
        """
        changed_at, joined_at = self._file_changed_at("tls.pem"), self._file_changed_at("node.key")
        if joined_at != self.joined_at:
            raise ProcessFailed("the site has joined again; the node starts anew with its new keys")
        if changed_at != self.changed_at:
            self.context.load_cert_chain(self.keys / "tls.pem")
            self.changed_at = changed_at

        self._refresh_authority()

    def _refresh_authority(self) -> None:
        told = read_files(self.keys)
        if told == self.authority:
            return
        before, now = read_authority(self.authority), read_authority(told)
        gone = set(before.issuers) - set(
            now.issuers
        )  # what is revoked need not come along; what has ended does no harm
        if any(read_certificate(pem).expires_at_s > time.time() for pem in gone):
            raise ProcessFailed("an issuing key of the federation's authority counts no more; the node starts anew")
        self.context.load_verify_locations(cadata=now.anchors)
        self.authority = told

    def _file_changed_at(self, name: str) -> float:
        try:
            return (self.keys / name).stat().st_mtime
        except FileNotFoundError:  # `fedclient rejoin` is just putting the new folder in the place of the old
            return 0.0
