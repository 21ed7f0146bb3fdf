"""What a site's page shows, as plain values for its templates: from what `fedclient status` and its files tell."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclient.book import MOST_RUNS, Book, RunHere, newest
from fedclient.consent import Asked
from fedclient.gpus import Gpu
from fedclient.overview import card
from fedclient.policy import in_words
from fedclient.site import SiteFile
from shared_models.doctor import GIB, LEAST_FREE_BYTES, SCARCE_FREE_BYTES, SCARCE_MEMORY_BYTES, memory_bytes

CONNECTION = {"connected": "good", "working": "work", "away": "look", "stopped": "look", "refused": "bad"}
DECISIONS = {
    "pending": ("look", "waits for your decision"), "expired": ("look", "waits for your decision again"),
    "approved": ("good", "approved"), "refused": ("bad", "refused"), "withdrawn": ("bad", "withdrawn"),
}  # fmt: skip
STATES = {"work": ("work", "at work"), "sent": ("good", "answered"), "refused": ("bad", "order refused")}
FIRST = {"work": 0, "look": 1, "bad": 2, "good": 3, "quiet": 4}
DOES = {  # kind of an order -> what is done for it here
    "hello": "counting cases", "statistics": "reading images for the plan", "train": "training",
    "evaluate": "scoring the model", "advertise": "secure sum: keys", "share": "secure sum: shares",
    "mask": "secure sum: masked update", "confirm": "secure sum: who is in it", "unmask": "secure sum: end",
}  # fmt: skip
CHILDREN = {"running": "good", "waiting": "look", "stopped": "quiet"}
MOSTLY_SPENT, NEARLY_SPENT = 0.75, 0.95  # of a privacy budget
WAITS = ("APPROVAL_PENDING", "OUTSIDE_HOURS")  # refusals after which the coordinator asks again


def connection(facts: Mapping[str, Any]) -> dict[str, Any]:
    """State, last answer, certificate and processes of the node."""
    state, running = facts["connection"]["state"], facts["processes"]["supervisor"] is not None
    return {
        **facts["connection"],
        "mark": CONNECTION[state],
        "certificate_ends": facts["certificate_expires_at"],
        "children": [
            {"name": name, "mark": CHILDREN.get(now, "look"), "state": now, "restarts": child["restarts"]}
            for name, child in sorted(facts["processes"]["children"].items())
            for now in (child["state"] if running else "stopped",)  # a killed supervisor wrote no last word
        ],
    }


def round_now(facts: Mapping[str, Any], book: Book, asked: Mapping[str, Asked]) -> dict[str, Any] | None:
    """The order under way here, with its round; None where there is none."""
    work = facts["work"]
    if work is None:
        return None
    run = book.runs.get(str(work["run"]))
    study = asked.get(run.study) if run is not None else None
    rounds, does = study.study.rounds.count if study else None, DOES.get(str(work["kind"]), str(work["kind"]))
    stands = facts["connection"]["state"] == "stopped"
    where = f"round {work['round']} of {rounds}" if rounds else f"round {work['round']}"
    return {
        "run": work["run"],
        "title": study.study.title if study else "",
        "does": "interrupted: the node does not run" if stands else does,
        "mark": "look" if stands else "work",
        "round": work["round"],
        "rounds": rounds,
        "sent": run.rounds if run is not None else 0,
        "since": work["since"],
        "kind": does,
        "sentence": f"{work['run']}: {where}, {'interrupted' if stands else does}.",
    }


def queue(book: Book, asked: Mapping[str, Asked], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs at this site, and what each waits for: those at work first, then those that wait, then the others."""
    rows = [_queued(run, asked.get(run.study), facts) for run in newest(book)]
    return sorted(rows, key=lambda row: FIRST[row["mark"]])[:MOST_RUNS]


def _queued(run: RunHere, study: Asked | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    mark, words = STATES[run.state] if run.state else ("quiet", "unknown")
    under_way = facts["work"] is not None and facts["work"]["run"] == run.run
    more = ""
    if run.state == "refused":
        more = run.code
        if run.code in WAITS:
            mark = "look"
            words = "waits for your decision" if run.code == "APPROVAL_PENDING" else "waits for the hours of the policy"
    elif run.state == "work" and not under_way:
        mark, words, more = "look", "interrupted", "the order was not answered"
    elif run.state == "sent":
        words = f"{DOES.get(run.kind, run.kind)} done"
        more = "waits for the coordinator's next order"
    elif run.state == "work":
        words = DOES.get(run.kind, run.kind)
    return {
        "run": run.run,
        "study": study.study.name if study else "",
        "mark": mark,
        "words": words,
        "more": more,
        "round": run.round,
        "rounds": study.study.rounds.count if study else None,
        "sent": run.rounds,
        "at": run.at,
    }


def studies(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Every study that has come, what waits for a decision first, then the newest."""
    rows = [
        {
            "name": each.study.name,
            "digest": each.sha256[:12],
            "mark": DECISIONS[each.state][0],
            "words": DECISIONS[each.state][1],
            "asked": each.asked_at_s,
            "by": each.decision.by if each.decision else "",
            "until": each.decision.until_s if each.decision and each.state == "approved" else None,
            "waits": each.state in ("pending", "expired"),
            "rounds": each.study.rounds.count,
        }
        for each in reversed(asked)
    ]
    return sorted(rows, key=lambda row: not row["waits"])


def machine(device: str, seen: Sequence[Gpu], share: float) -> dict[str, Any]:
    """Processor, memory and GPUs, with what of them is taken.

    Args:
        device: of `[compute]` in site.toml.
        share: of the GPU's memory that training may take.
    """
    total, free = memory_bytes()
    return {
        "device": device,
        "missing": not seen and device.startswith("cuda"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "memory": gauge(total - free, total, free, SCARCE_MEMORY_BYTES, 0),
        "share": share,
        "gpus": [
            {
                "name": gpu.name,
                "driver": gpu.driver,
                "memory": None if not gpu.size_bytes or gpu.used_bytes is None else gauge(
                    gpu.used_bytes, gpu.size_bytes, gpu.size_bytes - gpu.used_bytes, 0, 0
                ),
                "busy": gpu.busy,
                "celsius": gpu.celsius,
            }
            for gpu in seen
        ],
    }  # fmt: skip


def disks(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The disk of the site's folder, and the cache upon it."""
    disk = facts["disk"]
    used = disk["total"] - disk["free"]
    return {
        "disk": gauge(used, disk["total"], disk["free"], SCARCE_FREE_BYTES, LEAST_FREE_BYTES),
        "cache": gauge(disk["cache"], disk["quota"], disk["quota"] - disk["cache"], 0, 0),
    }


def gauge(used: float, size: float, free: float, scarce: float, least: float) -> dict[str, Any]:
    """How much of something is taken, in GiB, and whether what is free is scarce (look) or too little (bad)."""
    mark = "bad" if free < least else "look" if free < scarce else "good"
    return {
        "used": _gib(used),
        "size": _gib(size),
        "free": _gib(free),
        "share": round(min(1.0, max(0.0, used / size)), 3) if size else 0.0,
        "mark": mark,
    }


def _gib(size_bytes: float) -> str:
    """One decimal, which does not waver at every look; three where it is small."""
    value = max(0.0, size_bytes) / GIB
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def data_card(folder: Path) -> dict[str, Any] | None:
    """The data card as it was made last, and when; None before."""
    made = card(folder)
    if made is None:
        return None
    few = f"fewer than {made['smallest_count']}"
    return {
        "at": (folder / "gate" / "card.json").stat().st_mtime,
        "smallest": made["smallest_count"],
        "cases": few if made["cases"] is None else f"{made['cases']:,}",
        "patients": few if made["patients"] is None else f"{made['patients']:,}",
        "tables": [
            (name, [(cell, "withheld" if count is None else f"{count:,}") for cell, count in sorted(cells.items())])
            for name, cells in sorted(made["tables"].items())
        ],
    }


def policy(file: SiteFile) -> list[str]:
    """What the hospital allows, as sentences."""
    words = in_words(file.policy)
    if file.privacy.required:
        words.append("Only studies with differential privacy are taken part in.")
    if file.privacy.most_epsilon is not None:
        words.append(f"One study may spend epsilon {file.privacy.most_epsilon:g} at most.")
    if file.limits.memory_gib is not None:
        words.append(f"A process may take {file.limits.memory_gib:g} GiB of memory.")
    if file.limits.gpu_memory_share < 1:
        words.append(f"Training may take {file.limits.gpu_memory_share:.0%} of a GPU's memory.")
    if file.limits.order_s is not None:
        words.append(f"An order may take {file.limits.order_s:g} s.")
    return words


def ledger(accounts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Privacy spent, by data set that has a budget."""
    return [
        {
            "data_set": each["data_set"],
            "spent": f"{each['spent']:.3g}",
            "budget": f"{each['budget']:g}",
            "left": f"{max(0.0, each['budget'] - each['spent']):.3g}",
            "delta": f"{each['delta']:g}",
            "share": (share := round(min(1.0, each["spent"] / each["budget"]), 3)),
            "mark": "bad" if share >= NEARLY_SPENT else "look" if share >= MOSTLY_SPENT else "good",
            "not_settled": each["not_settled"],
        }
        for each in accounts
        if each["budget"] is not None
    ]


def sent(book: Book) -> dict[str, Any]:
    """What has left: all of it by kind, and the last messages, the newest first."""
    return {
        "messages": book.messages,
        "bytes": book.size_bytes,
        "kinds": [(kind, *counted) for kind, counted in sorted(book.kinds.items(), key=lambda item: -item[1][1])],
        "rows": [
            {
                "number": line["number"],
                "at": line["time"],
                "kind": line["kind"],
                "code": line.get("code") or "",
                "bytes": int(line["bytes"]),
                "run": line.get("run") or "",
                "round": line.get("round"),
                "digest": str(line.get("sha256", ""))[:12],
            }
            for line in reversed(book.latest)
        ],
    }


def summary(
    facts: Mapping[str, Any],
    now: Mapping[str, Any] | None,
    waiting: int,
    book: Book,
    room: Mapping[str, Any],
    budgets: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The figures at the top, of what `disks` and `ledger` tell too."""
    return {
        "state": facts["connection"]["state"],
        "mark": CONNECTION[facts["connection"]["state"]],
        "round": None if now is None else f"round {now['round']}",
        "rounds": None if now is None else now["rounds"],
        "run": None if now is None else now["run"],
        "waiting": waiting,
        "sent": book.size_bytes,
        "disk": room["disk"],
        "budget": min(budgets, key=lambda each: 1 - each["share"], default=None),
        "open": facts["open_now"],
    }
