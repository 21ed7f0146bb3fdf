"""Flower's own simulation engine on Ray, for many GPUs or machines: the same server and client code, the same weights.

Ray moves the app to its workers with its own pickling; it is for simulations, never for a machine that a hospital
serves from.
"""

import math
import time
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedserver.checkpoint import RunFolder, State, read_state, read_study
from fedserver.cohort import Presence
from fedserver.courier import Inline
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.archive import load_app
from shared_models.errors import ProcessFailed
from shared_models.study import canonical, sha256
from shared_models.wire import Order, read_reply, write_order
from simulations.engine import NodeConfig, with_members
from simulations.roster import roster_of

INSTALLED = "fedclient.app:app"


def run_ray(folder: Path, nodes: Mapping[str, NodeConfig], workers: int, gpus: float, app: str = INSTALLED) -> State:
    """Carries out the run in `folder` with one Ray actor for each of `workers` orders at a time.

    Args:
        gpus: share of a GPU for each order.
        app: "module:name" of the client app; Ray's workers import it.

    Raises:
        ProcessFailed: the run did not end; Flower has printed why.
    """
    nodes = with_members(folder, nodes)
    run, configs = RunFolder(folder), [nodes[site] for site in sorted(nodes)]
    server, done = ServerApp(), list[State]()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        presence = greet(grid, run, len(configs))
        done.append(
            carry_out(
                Setting(
                    grid,
                    run,
                    lambda: presence,
                    Inline(),
                    poll_s=0.02,
                    presence_s=math.inf,
                    bounded=False,
                    roster=lambda: roster_of(folder),
                )
            )
        )

    backend: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        "init_args": {"num_cpus": max(1, workers), "logging_level": "ERROR", "include_dashboard": False},
    }
    run_simulation(server, client_of(configs, app), num_supernodes=len(configs), backend_config=backend)
    if not done:
        raise ProcessFailed(f"{folder}: the Ray engine ended without finishing the run. Its message stands above.")
    return done[0]


def client_of(configs: list[NodeConfig], name: str) -> ClientApp:
    """The client app of that name, told which site a node is by Flower's partition number."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        here = copy(context)  # Flower keeps the context for the node's next message
        here.node_config = dict(configs[int(str(context.node_config["partition-id"]))])
        client: ClientApp = load_app(name)  # imports torch, in the worker
        return client(message, here)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


def greet(grid: Grid, run: RunFolder, nodes: int) -> Presence:
    """Asks every node which site it is: Flower numbers simulated nodes as it likes, and starts them meanwhile."""
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.1)
    study, state = read_study(run), read_state(run)
    order = Order("hello", state.run, 0, 1, canonical(study).decode(), sha256(study), base_sha256=state.weights_sha256)
    replies = grid.send_and_receive([write_order(order, node) for node in grid.get_node_ids()])
    sites: dict[str, int] = {}
    for reply in replies:
        if reply.has_error():
            raise ProcessFailed(f"a simulated site could not start: {reply.error.reason}. Its trace stands above.")
        sites[read_reply(reply, "hello").site] = reply.metadata.src_node_id
    return Presence(sites)
