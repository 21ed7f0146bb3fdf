"""`fedclient serve-model` put together: pages, receiver, queue, predicting process, and the way back."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from fedclient.serving.back import Back
from fedclient.serving.guard import Asgi
from fedclient.serving.intake import Intake
from fedclient.serving.jobs import Job, Jobs, Room
from fedclient.serving.receiver import Receiver, server_context
from fedclient.serving.settings import GIB, MIB, Serve, check_files, destination
from fedclient.serving.warm import Warm
from fedclient.serving.web import Parts, application
from shared_models.errors import ProcessFailed
from shared_models.files import private_folder
from shared_models.heads import Heads
from shared_models.supervise import kept_token

TICK_S = 1.0
MOST_CONNECTIONS = 64  # beyond it 503
KEEP_ALIVE_S = 20

log = logging.getLogger("fedclient.serving")


@dataclass(slots=True)
class Service:
    """All that runs, in the folder of a site.

    Attributes:
        command: of the predicting process.
    """

    site: Path
    serve: Serve
    command: Sequence[str]
    warm: Warm = field(init=False)
    jobs: Jobs = field(init=False)
    intake: Intake = field(init=False)
    receiver: Receiver | None = field(init=False, default=None)
    back: Back | None = field(init=False, default=None)
    token: str | None = field(init=False, default=None)
    _server: uvicorn.Server = field(init=False)
    _stop: threading.Event = field(init=False, default_factory=threading.Event)

    def start(self) -> None:
        """Opens the release and everything that listens, but the pages.

        Raises:
            FederationError: a release that is not trusted, a port that is taken, a file that is not there.
        """
        serve, folder = self.serve, self.site / "serve"
        check_files(serve)
        private_folder(folder)
        self.warm = Warm(self.command, serve.time_limit_s)
        self.warm.start()
        room = Room(folder, int(serve.quota_gib * GIB))
        if serve.return_to:
            self.back = Back(destination(serve.return_to), lambda: self.jobs, serve.ae_title)
        done: Callable[[Job], None] | None = self.back.add if self.back else None
        self.jobs = Jobs(
            folder / "jobs", self.warm, room, serve.queue, serve.keep_hours * 3600, done, join_s=serve.join_s,
            return_s=serve.return_hours * 3600,
        )  # fmt: skip
        self.intake = Intake(folder, self.jobs, room, serve.quiet_s)
        self.token = kept_token(self.site / "secrets" / "serve-token") if serve.token else None
        parts = Parts(
            self.jobs, self.intake, room, self.warm, int(serve.most_mib * MIB), self.token, serve.local,
            self.back is not None, serve.public_origin,
        )  # fmt: skip
        self._server = uvicorn.Server(listener(application(parts), serve))
        if serve.allow:
            self.receiver = Receiver(serve, self.intake, room, server_context(serve))
            self.receiver.start()
        self.jobs.start()
        if self.back is not None:
            self.back.start()
        threading.Thread(target=self._tick, name="intake", daemon=True).start()

    def run(self, ready: Callable[["Service"], None]) -> None:
        """Serves the pages until SIGTERM or Ctrl-C, in the main thread; tells when they can be asked.

        Raises:
            ProcessFailed: their port is taken.
        """
        threading.Thread(target=self._tell, args=(ready,), name="ready", daemon=True).start()
        try:
            with suppress(KeyboardInterrupt):
                self._server.run()
        except SystemExit:
            raise ProcessFailed(
                f"pages: port {self.serve.port} of {self.serve.host} cannot be used. Choose another with --port."
            ) from None
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends everything; a case that is being worked on is worked on again after the next start."""
        self._stop.set()
        if self.receiver is not None:
            self.receiver.stop()
        if self.back is not None:
            self.back.stop()
        self.jobs.stop(0.1)
        self.warm.stop()
        self.jobs.stop()  # the case from which the worker is taken is written down as waiting

    @property
    def port(self) -> int:
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    def _tell(self, ready: Callable[["Service"], None]) -> None:
        while not self._server.started:
            if self._stop.wait(0.02):
                return
        ready(self)

    def _tick(self) -> None:
        while not self._stop.wait(min(TICK_S, max(0.1, self.serve.quiet_s / 4))):
            try:
                self.intake.hand_on()
            except OSError as error:  # a full disk: what is there is handed on when there is room
                log.error("received files cannot be handed on: %s", error.strerror)
                time.sleep(TICK_S)


def listener(app: Asgi, serve: Serve) -> uvicorn.Config:
    """How the pages are listened for; over TLS from 1.2 on where there is a key."""
    config = uvicorn.Config(
        app, host=serve.host, port=serve.port, loop="asyncio", http=Heads, ws="none", lifespan="off",
        interface="asgi3", access_log=False, log_level="error", server_header=False, proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=3,
        ssl_certfile=serve.tls_certificate or None, ssl_keyfile=serve.tls_key or None,
    )  # fmt: skip
    config.load()
    if serve.tls_key:
        config.ssl = server_context(serve, mutual=False)  # uvicorn's own would take what OpenSSL takes
    return config
