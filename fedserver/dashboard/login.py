"""Who may see the dashboard: whoever has shown the token of its file, for as long as his session lasts."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shared_models.supervise import kept_token

SESSION_S = 12 * 3600.0
MOST_SESSIONS = 64  # the oldest goes
TOKEN = "dashboard-token"  # noqa: S105 a file's name


@dataclass(slots=True)
class Login:
    """The token, and the sessions of browsers that have shown it; of a session only a digest is kept.

    Cookies know no ports: a page of another user of this machine at another port would be sent the cookie if one opened
    it. It holds a session of this process, never the token.

    Attributes:
        name: of the cookie, so that two dashboards on one machine do not sign each other out.
    """

    token: str = field(repr=False)
    name: str
    clock: Callable[[], float] = time.monotonic
    _sessions: dict[bytes, float] = field(default_factory=dict, repr=False)

    def begin(self, shown: str) -> str | None:
        """A new session for whoever shows the token; None for another."""
        if not hmac.compare_digest(shown.strip().encode(), self.token.encode()):
            return None
        now = self.clock()
        self._sessions = {of: until for of, until in self._sessions.items() if until > now}
        while len(self._sessions) >= MOST_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        session = secrets.token_urlsafe(32)
        self._sessions[_digest(session)] = now + SESSION_S
        return session

    def knows(self, session: str | None) -> bool:
        return session is not None and self._sessions.get(_digest(session), 0.0) > self.clock()

    def end(self, session: str | None) -> None:
        if session is not None:
            self._sessions.pop(_digest(session), None)


def token_path(folder: Path) -> Path:
    return folder / "secrets" / TOKEN


def login(folder: Path) -> Login:
    """Of a federation; makes its token when it is first asked for.

    Raises:
        StateInvalid: a file that holds no token, or that others may read.
    """
    token = kept_token(token_path(folder))
    return Login(token, f"fedserver-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}")


def _digest(session: str) -> bytes:
    return hashlib.sha256(session.encode()).digest()
