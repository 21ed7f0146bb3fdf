"""The SuperLink on loopback, and what the coordinator's other processes ask of it.

Flower 1.41 serves its Fleet, Runtime and Control calls on one port. Here that port is on 127.0.0.1 with TLS; hospitals
reach the Fleet calls through fedserver/gateway.py. Flower's Control calls know no authentication, so that every local
user could start an app of his own on all sites: here they ask for a secret that only the owner of the folder can read.
"""

import argparse
import hmac
import os
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import httpx

from shared_models.archive import LOOPBACK, flower_module, quiet_flower, replace_name, start_log
from shared_models.errors import FederationError, ProcessFailed, StateInvalid
from shared_models.files import write_json
from shared_models.supervise import kept_secret, read_port

if TYPE_CHECKING:  # flwr reads some switches when it is imported: see `quiet_flower`
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext

CONTROL_HEADER = "x-federation-control"
BUSY_TIMEOUT_MS = "25000"  # of SQLite; Flower's 5 s gave `database is locked` and HTTP 500; below its 30 s HTTP timeout
PUSH_SESSION_S = 30  # after which a reply whose sender died half-way counts as lost; Flower: 180 s
KEEP_ALIVE_S = 75

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = TypeVar("Answer")


# ---- what other processes of the coordinator ask of a running SuperLink ----


@dataclass(frozen=True, slots=True)
class Link:
    """How to reach the SuperLink of a federation.

    Attributes:
        patience_s: how long to try when it cannot be reached; one that was killed is back within 5.
    """

    address: str
    ca_pem: bytes = field(repr=False)
    control_secret: bytes = field(repr=False)
    patience_s: float = 20.0


class ControlRefused(FederationError):
    """The SuperLink did not do what it was asked.

    Attributes:
        code: one of Flower's `ApiErrorCode`, 0 where it gave none.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def open_link(folder: Path, address: str | None = None) -> Link:
    """The SuperLink of a federation folder, by default at the port where it was last served."""
    address = address or f"{LOOPBACK}:{read_port(folder / 'superlink/port')}"
    return Link(address, (folder / "ca/ca.pem").read_bytes(), kept_secret(folder / "secrets/control"))


def register_node(link: Link, public_key_pem: bytes, name: str) -> int:
    """Lets the SuperNode with this key (PEM, a NIST curve) in; returns its node id, again when it is known already."""
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
    from flwr.supercore.error import ApiErrorCode

    request = RegisterNodeRequest(public_key=public_key_pem, name=name)
    try:
        return int(_ask(link, lambda client: client.RegisterNode(request)).node_id)
    except ControlRefused as refused:
        if refused.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
            raise
        nodes = _ask(link, lambda client: client.ListNodes(ListNodesRequest())).nodes_info
        known = [int(node.node_id) for node in nodes if node.public_key == public_key_pem and not node.unregistered_at]
        if not known:
            raise
        return known[0]


def unregister_node(link: Link, node_id: int) -> None:
    """Shuts a SuperNode out for good; one that is not known is out already."""
    from flwr.proto.control_pb2 import UnregisterNodeRequest
    from flwr.supercore.error import ApiErrorCode

    try:
        _ask(link, lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))
    except ControlRefused as refused:
        if refused.code not in (ApiErrorCode.NODE_NOT_FOUND, ApiErrorCode.NODE_NOT_FOUND_OR_NOT_OWNER):
            raise


def start_run(link: Link, fab: bytes, config: Mapping[str, str | int]) -> int:
    """Starts a Flower run; may have started one more when an answer was lost, which nobody then takes up."""
    from flwr.common.serde import user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab

    request = StartRunRequest(fab=Fab(content=fab), override_config=user_config_to_proto(dict(config)))
    return int(_ask(link, lambda client: client.StartRun(request)).run_id)


def stop_run(link: Link, flower_run_id: int) -> None:
    """Stops a Flower run; one that is finished or unknown is stopped already."""
    from flwr.proto.control_pb2 import StopRunRequest
    from flwr.supercore.error import ApiErrorCode

    try:
        _ask(link, lambda client: client.StopRun(StopRunRequest(run_id=flower_run_id)))
    except ControlRefused as refused:
        if refused.code not in (ApiErrorCode.RUN_ALREADY_FINISHED, ApiErrorCode.RUN_ID_NOT_FOUND):
            raise


def run_states(link: Link, limit: int = 1000) -> Mapping[int, str]:
    """State of each Flower run by its id, newest first: `running`, `finished:completed`, ..."""
    from flwr.proto.control_pb2 import ListRunsRequest

    runs = _ask(link, lambda client: client.ListRuns(ListRunsRequest(limit=limit))).run_dict
    return {
        int(run_id): ":".join(filter(None, (run.status.status, run.status.sub_status))) for run_id, run in runs.items()
    }


def _ask(link: Link, call: "Callable[[ControlHttpClient], Answer]") -> Answer:
    """Calls the Control API, again for as long as it cannot be reached and patience lasts."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.error import FlowerError
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    until = time.monotonic() + link.patience_s
    pause_s = 0.1
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor("fedserver"),
        _ControlSecret(link.control_secret),
    ]
    with ControlHttpClient.from_server_address(link.address, False, link.ca_pem, interceptors) as client:
        while True:
            try:
                return call(client)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (502, 503, 504) or time.monotonic() > until:
                    told = FlowerError.from_json(error.response.text)
                    code, words = (int(told.code), told.message) if told else (0, f"HTTP {error.response.status_code}")
                    raise ControlRefused(code, f"SuperLink at {link.address}: {words}. See logs/link.log.") from None
            except httpx.TransportError as error:
                if time.monotonic() > until:
                    raise ProcessFailed(
                        f"SuperLink at {link.address}: cannot be reached ({type(error).__name__}). "
                        "Start it with `fedserver serve`, and see logs/link.log."
                    ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)


@dataclass(frozen=True, slots=True)
class _ControlSecret:
    """Shows the secret of the Control calls; Flower's form of an interceptor."""

    secret: bytes

    def intercept(self, context: "ProtobufRequestContext", call_next: "ProtobufCall") -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self.secret.hex()
        return call_next(context)


# ---- the process ----


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedserver.link", description="The SuperLink on loopback.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    try:
        serve_link(arguments.folder, arguments.port)
    except FederationError as error:
        sys.exit(f"fedserver.link: {error}")


def serve_link(folder: Path, port: int) -> None:
    """Runs the SuperLink in this process until SIGTERM.

    Raises:
        ProcessFailed: no database file, or another Flower than the one this is made for.
    """
    home = folder / "superlink"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.umask(0o077)  # Flower makes its database 0644
    os.environ.update(quiet_flower(home / "flower", os.environ))
    start_log()
    database = home / "state.db"
    check_database(database)
    patch_flower()
    kept_secret(folder / "secrets/superexec")
    app = guarded(_flower_app(folder, database, port), kept_secret(folder / "secrets/control"))
    require_file(database)
    write_json(home / "port", port)

    import uvicorn

    uvicorn.run(
        app,
        host=LOOPBACK,
        port=port,
        ssl_certfile=str(folder / "tls/loopback.pem"),
        access_log=False,  # hospitals ask three times a second
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=3,
        ws="none",
    )


def _flower_app(folder: Path, database: Path, port: int) -> Asgi:
    """Flower's own application, from its own command line."""
    cli = flower_module("flwr.superlink.cli.flower_superlink")
    create_app = flower_module("flwr.superlink.main").create_app
    flags = {
        "--host": LOOPBACK,
        "--port": port,
        "--ssl-ca-certfile": folder / "ca/ca.pem",
        "--ssl-certfile": folder / "tls/loopback.pem",
        "--ssl-keyfile": folder / "tls/loopback.pem",
        "--database": database,
        "--isolation": "process",
        "--superexec-auth-secret-file": folder / "secrets/superexec",
    }
    sys.argv = ["flower-superlink", "--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    sys.argv += [str(part) for flag in flags.items() for part in flag]
    config = cli._parse_superlink_lifespan_config()
    if not (config.superexec_auth_secret and config.enable_supernode_auth and config.certificates):
        raise ProcessFailed(f"{folder}: Flower did not take its secret, its keys or its certificates. See `secrets/`.")
    if config.database != str(database) or config.runtime_dependency_install:
        raise ProcessFailed(f"{folder}: Flower did not take its database or its switches. Install flwr==1.41.0.")
    return cast(Asgi, create_app(config, cli.SuperLinkLifespan))


def patch_flower() -> None:
    """Changes Flower's own settings where it offers no switch; before its database is opened."""
    constants = flower_module("flwr.supercore.constant")
    pragmas = tuple((k, BUSY_TIMEOUT_MS if k == "busy_timeout" else v) for k, v in constants.SQLITE_PRAGMAS)
    if ("busy_timeout", BUSY_TIMEOUT_MS) not in pragmas:
        raise ProcessFailed("flwr: sets no busy_timeout for SQLite any more. Install flwr==1.41.0.")
    replace_name(constants, "SQLITE_PRAGMAS", pragmas)
    replace_name(flower_module("flwr.supercore.sql_mixin"), "SQLITE_PRAGMAS", pragmas)
    state = flower_module("flwr.supercore.corestate.sql_corestate")
    replace_name(state, "OBJECT_PUSH_SESSION_TTL_SECONDS", PUSH_SESSION_S)


def check_database(path: Path) -> None:
    """Refuses a file that is not a sound SQLite database; one that is not there yet will be made."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0].replace("\n", " ")
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise StateInvalid(
            f"{path}: is damaged ({found}). Put back a copy from your backup; without one, move the file away and "
            "invite the sites anew: registered keys and the orders under way were in it, models and studies were not."
        )
    path.chmod(0o600)


def require_file(database: Path) -> None:
    """Raises ProcessFailed unless Flower has opened its database as a file; nodes are lost with a state in memory."""
    if not database.exists():
        raise ProcessFailed(f"{database}: Flower did not open it, and a state in memory is lost with the process.")
    database.chmod(0o600)


def guarded(app: Asgi, control_secret: bytes) -> Asgi:
    """Flower's application without its open doors: Control calls show the secret, documentation is not served."""
    expected = control_secret.hex().encode()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path in ("/docs", "/openapi.json", "/docs/oauth2-redirect"):
                return await _refuse(send, 404)
            shown = dict(scope["headers"]).get(CONTROL_HEADER.encode(), b"")
            if not path.startswith(("/v1/fleet/", "/v1/runtime/", "/health")) and not hmac.compare_digest(
                shown, expected
            ):
                return await _refuse(send, 401)
        await app(scope, receive, send)

    return guard


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    main()
