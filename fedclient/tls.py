"""The node's side of mutual TLS: what it shows is read anew when it was renewed, without a restart."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from shared_models.errors import ProcessFailed
from shared_models.transfer import site_context


@dataclass(slots=True)
class ClientTls:
    """The site's side of mutual TLS; a renewed certificate serves all new connections."""

    keys: Path
    context: ssl.SSLContext = field(init=False)
    changed_at: float = field(init=False)
    joined_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.changed_at, self.joined_at = self._file_changed_at("tls.pem"), self._file_changed_at("node.key")
        self.context = site_context(self.keys)

    def refresh(self) -> None:
        """Reads key and certificate again if their file is a new one.

        Raises:
            ProcessFailed: the node key is a new one too, because the site has joined again: this process holds the old.
        """
        changed_at, joined_at = self._file_changed_at("tls.pem"), self._file_changed_at("node.key")
        if joined_at != self.joined_at:
            raise ProcessFailed("the site has joined again; the node starts anew with its new keys")
        if changed_at != self.changed_at:
            self.context.load_cert_chain(self.keys / "tls.pem")
            self.changed_at = changed_at

    def _file_changed_at(self, name: str) -> float:
        try:
            return (self.keys / name).stat().st_mtime
        except FileNotFoundError:  # `fedclient rejoin` is just putting the new folder in the place of the old
            return 0.0
