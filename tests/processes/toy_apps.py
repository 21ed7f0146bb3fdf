"""A run without learning: five order-reply rounds over real Flower processes, for tests of those processes.

runs/ID/plan.json says how many rounds, how many sites, and how long a site works on each.
"""

import os
import threading
import time
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from shared_models.files import append_json, read_json, write_json

SILENCE_S = 20.0  # after which an order is given again: Flower loses messages with a process that dies
POLL_S = 0.05
BROKEN = threading.Event()  # a GPU that has failed computes nothing more for its process

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["federation"])) / "runs" / str(context.run_config["run"])
    plan = read_json(folder / "plan.json")
    state = folder / "state.json"
    done = read_json(state)["round"] if state.exists() else 0
    for number in range(done + 1, plan["rounds"] + 1):
        began = time.monotonic()
        answers = one_round(grid, number, plan["sleep_s"], plan["sites"])
        line = {"round": number, "seconds": time.monotonic() - began, "pid": os.getpid(), **answers}
        append_json(folder / "rounds.jsonl", line)
        write_json(state, {"round": number})


def one_round(grid: Grid, number: int, sleep_s: float, sites: int) -> dict[str, object]:
    while len(nodes := sorted(n.node_id for n in grid.get_nodes())) < sites:
        time.sleep(POLL_S)
    asked: dict[str, int] = {}
    asked_at: dict[int, float] = {}
    sums: dict[int, int] = {}
    errors: list[str] = []

    def ask(node: int) -> None:
        content = RecordDict({"order": ConfigRecord({"round": number, "sleep_s": sleep_s})})
        for message_id in grid.push_messages([Message(content, node, "train", group_id=str(number))]):
            asked[message_id] = node
        asked_at[node] = time.monotonic()

    for node in nodes:
        ask(node)
    while len(sums) < sites:
        replies = list(grid.pull_messages(list(asked)))
        for reply in replies:
            node = asked.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                errors.append(f"{reply.error.code} {reply.error.reason}")
                time.sleep(0.2)
                ask(node)
            else:
                sums[node] = cast(int, cast(ConfigRecord, reply.content["answer"])["sum"])
        for node, at in list(asked_at.items()):
            if node not in sums and time.monotonic() - at > SILENCE_S:
                errors.append("silence")
                ask(node)
        if not replies:
            time.sleep(POLL_S)
    return {"sum": sum(sums.values()), "errors": errors}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    order = cast(ConfigRecord, message.content["order"])
    site = Path(str(context.node_config["site-dir"]))
    write_json(site / "working.json", {"pid": os.getpid(), "round": order["round"]})
    time.sleep(cast(float, order["sleep_s"]))
    (site / "working.json").unlink(missing_ok=True)
    if cast(int, order["round"]) == 97 and not (site / "broke").exists():
        (site / "broke").touch(mode=0o600)
        BROKEN.set()
    if BROKEN.is_set():
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported elsewhere")
    if cast(int, order["round"]) == 99:
        raise ValueError(f"{site}: patient 4711")
    return Message(RecordDict({"answer": ConfigRecord({"sum": cast(int, order["round"]) ** 2})}), reply_to=message)
