"""A client app whose sites do what a file in their folder says: work, sleep, hang, diverge, or lie to the coordinator.

All but the learning is the real client. An update moves one weight by 1 and another by a thousandth of the round, both
of the site's own, so that the next weights say whose updates were counted, of which round, and how often: see `ledger`.
"""

import ctypes
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedclient.client import client_app
from fedclient.kept import kept_path
from fedclient.site import Site, open_site
from fedclient.work import Holding, Learned
from shared_models.envelope import signed
from shared_models.files import file_sha256, read_json, write_json
from shared_models.identity import load_secret, new_identity_key
from shared_models.scores import Score
from shared_models.study import Study
from shared_models.transfer import Blobs, site_context
from shared_models.weights import Arrays, load, save_arrays
from shared_models.wire import PROTOCOL, BlobRef, Reply, SignedReply, Split, read_order, read_reply, write_reply

MOST_SITES = 16
EXAMPLES = 100
STEP_S = 0.05
FIRST: Arrays = {"round": np.zeros(MOST_SITES, np.float32), "site": np.zeros(MOST_SITES, np.float32)}


def script_file(site: Path) -> Path:
    """What a site is to do: `do`, `seconds` of work on each order, `rounds` in which it does so (none: all); or `each`,
    a word for each of some rounds."""
    return site / "script.json"


def working_file(site: Path) -> Path:
    """There while the site works on an order."""
    return site / "working.json"


def own_place(site: str) -> int:
    """`s3` has the place 2."""
    return int(site.removeprefix("s")) - 1


def moved(weights: Arrays, site: str, round_number: int) -> dict[str, np.ndarray[Any, Any]]:
    """What an honest site makes of the weights of a round."""
    after = {name: array.copy() for name, array in weights.items()}
    after["site"][own_place(site)] += 1
    after["round"][own_place(site)] += np.float32(round_number / 1000)
    return after


def wanted(site: Path, round_number: int) -> tuple[str, float]:
    """What the script says for a round, and for how many seconds; nothing and none where it says nothing."""
    with suppress(OSError, ValueError):
        script = read_json(script_file(site))
        if str(round_number) in script.get("each", {}):
            return str(script["each"][str(round_number)]), 0.0
        if round_number in (script.get("rounds") or [round_number]):
            return str(script.get("do", "")), float(script.get("seconds", 0))
    return "", 0.0


@dataclass(frozen=True, slots=True)
class ScriptedLearner:
    """Takes the time that the script says, and fails where it says so."""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        word, seconds = wanted(site.folder, round_number)
        with suppress(OSError):  # a full disk, which is a fault of its own
            write_json(working_file(site.folder), round_number)
        if word == "hang":
            ctypes.PyDLL(None).sleep(100_000)  # a call that holds the interpreter: no thread beside it runs
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            site.go_on()
            time.sleep(STEP_S)
        working_file(site.folder).unlink(missing_ok=True)
        if word == "out-of-memory":
            raise MemoryError
        after = moved(weights, site.name, round_number)
        if word == "diverge":
            after["site"][own_place(site.name)] = np.nan
        return Learned(after, examples=EXAMPLES, steps=1, device="cpu")

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        return {}

    def holding(self, site: Site, study: Study) -> Holding:
        return Holding(8, 2, 8)


honest = client_app(ScriptedLearner())
app = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """The honest answer, or the lie that the script wants in its place."""
    order, site = read_order(message), open_site(context.node_config)
    word, _ = wanted(site.folder, order.round)
    if word not in LIES:
        return honest(message, context)
    with nullcontext() if word in WITH_HONEST_UPLOAD else patch.object(Blobs, "send"):
        reply = honest(message, context)
    if reply.has_error():
        return reply
    told = read_reply(reply, site.name)
    return LIES[word](message, told, site, kept_path(order, site.folder).with_suffix(".safetensors"))


app.train()(answer)
app.evaluate()(answer)
app.query()(answer)

Lie = Callable[[Message, Reply, Site, Path], Message]


def facts(**change: Any) -> Lie:
    """An honest update under false facts."""
    return lambda message, told, site, kept: told_by(site, replace(told, **change), message)


def tensors(spoil: Callable[[dict[str, Any], int], None]) -> Lie:
    """Honest facts about a spoilt update, which is uploaded as an honest one is."""

    def lie(message: Message, told: Reply, site: Site, kept: Path) -> Message:
        arrays = dict(load(kept))
        spoil(arrays, own_place(site.name))
        path = site.folder / "lie.safetensors"
        save_arrays(path, arrays)
        return told_by(site, replace(told, blob=_sent(site, path)), message)

    return lie


def _sent(site: Site, path: Path) -> BlobRef:
    blob = BlobRef(file_sha256(path), path.stat().st_size)
    Blobs(site.coordinator, site_context(site.folder / "keys")).send(path, blob.sha256, 60.0)
    return blob


def _put(name: str, value: float) -> Callable[[dict[str, Any], int], None]:
    def spoil(arrays: dict[str, Any], place: int) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return spoil


def garbage(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """A blob that is no tensors at all."""
    path = site.folder / "lie.bin"
    path.write_bytes(b"\xff" * 4096)
    return told_by(site, replace(told, blob=_sent(site, path)), message)


def replay(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """The reply of an earlier round, word for word, and its update uploaded again; the first one is kept for it."""
    path = site.folder / "replayed.json"
    blob = path.with_suffix(".safetensors")
    if not path.exists():
        shutil.copyfile(kept, blob)
        first = _signed(site, told, message)
        write_json(path, {"facts": first.facts.hex(), "envelope": first.envelope.hex(), "by": first.signature.hex()})
    _sent(site, blob)
    parts = read_json(path)
    return write_reply(SignedReply(*(bytes.fromhex(parts[name]) for name in ("facts", "envelope", "by"))), message)


def forge(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """The honest reply as somebody signs it who has the site's certificate and node key, and not its identity key."""
    return write_reply(signed(told, read_order(message), new_identity_key()), message)


def _signed(site: Site, told: Reply, message: Message) -> SignedReply:
    return signed(told, read_order(message), load_secret(site.folder / "keys" / "identity.key"))


def told_by(site: Site, told: Reply, message: Message) -> Message:
    """What a site says and signs."""
    return write_reply(_signed(site, told, message), message)


def bomb(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """Tensors inside the message, where none belong in a deployment: Flower would inflate them before anybody looks."""
    content = told_by(site, told, message).content
    content["tensors"] = ArrayRecord({"site": FlowerArray(np.zeros(1 << 20, np.float32))})
    return Message(content, reply_to=message)


def foreign(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """No message of this system."""
    return Message(RecordDict({"answer": ConfigRecord({"sum": 1})}), reply_to=message)


def other_version(message: Message, told: Reply, site: Site, kept: Path) -> Message:
    """The same facts in another version of the protocol."""
    record = ConfigRecord({"protocol": PROTOCOL + 1, "json": _signed(site, told, message).facts})
    return Message(RecordDict({"facts": record}), reply_to=message)


LIES: Mapping[str, Lie] = {
    "nan": tensors(_put("site", float("nan"))),
    "infinity": tensors(_put("round", float("inf"))),
    "far": tensors(_put("site", 65.0)),
    "shape": tensors(lambda a, i: a.update(site=a["site"][:1])),
    "dtype": tensors(lambda a, i: a.update(site=a["site"].astype(np.float64))),
    "missing": tensors(lambda a, i: a.pop("round")),
    "extra": tensors(lambda a, i: a.update(more=a["site"])),
    "garbage": garbage,
    "negative": facts(examples=-9),
    "none": facts(examples=0),
    "huge": facts(examples=10**9),
    "other-site": facts(site="s1"),
    "other-study": facts(study_sha256="a" * 64),
    "other-weights": facts(base_sha256="a" * 64),
    "no-blob": facts(blob=None),
    "not-sent": facts(blob=BlobRef("b" * 64, 100)),
    "replay": replay,
    "forge": forge,
    "foreign": foreign,
    "other-version": other_version,
    "bomb": bomb,
}
# the coordinator holds few uploads of a site that no reply names: an honest one goes only with a reply that names it
WITH_HONEST_UPLOAD = {"negative", "none", "huge", "other-site", "other-study", "other-weights"}
