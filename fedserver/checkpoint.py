"""A run on disk: the study, the weights of every round, and where it stands; a killed process goes on from here.

runs/ID/study.json               canonical JSON of the study
runs/ID/round-0003.safetensors   weights after round 3 (0: before the first)
runs/ID/server-0003.safetensors  what the server optimizer keeps, where it keeps anything
runs/ID/state.json               the last finished round; written last, so that it only names whole files
runs/ID/metrics.jsonl            a line for each finished round, then one for the final evaluation
runs/ID/progress.json            the round in progress and whom it waits for
runs/ID/plan.json                canonical JSON of the plan, where it is derived from the sites' statistics
runs/ID/plan-proof.json          the coordinator's signature of that plan, in a deployment
runs/ID/fingerprint.json         the sum of those statistics
runs/ID/without.json             sites that are not asked in this run, where there are any
runs/ID/retrained.json           which run it goes on from, where it does
runs/ID/reference.json           what the sites' patients and the answers on them are like, for a release to carry
runs/ID/spool/SITE.safetensors   updates of the round in progress, where the strategy needs them all at once
runs/ID/sum/                     the secure sum of the round in progress (fedserver/secure_round.py)
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedserver.optimizers import Optimizer, advance
from fedserver.spool import clear
from shared_models.control import CONTROL, with_control
from shared_models.errors import StateInvalid
from shared_models.files import (
    append_json,
    canonical_json,
    file_sha256,
    read_json,
    read_lines,
    write_atomic,
    write_json,
)
from shared_models.parse import STRICT, parse_json, plain
from shared_models.plan import Fingerprint, Plan
from shared_models.plan import sha256 as plan_sha256
from shared_models.planned import planned
from shared_models.study import Study, canonical, from_json, sha256
from shared_models.weights import NO_WEIGHTS, Array, Arrays, Schema, Spec, load, one, open_tensors, save, save_arrays

WITHOUT = "without.json"


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands: `round` is finished, its weights are `weights_sha256`."""

    __pydantic_config__ = STRICT
    run: str
    study_sha256: str
    round: int
    weights_sha256: str
    cohort: tuple[str, ...] = ()  # sites that were counted in `round`
    plan_sha256: str | None = None
    counted: Mapping[str, int] = field(default_factory=dict)  # site -> round of its last update that was counted


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    def weights(self, round_number: int) -> Path:
        return self.path / f"round-{round_number:04d}.safetensors"

    def server_state(self, round_number: int) -> Path:
        return self.path / f"server-{round_number:04d}.safetensors"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def sum(self) -> Path:
        return self.path / "sum"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def signed(self) -> Path:
        """What its sites have signed: see `fedserver.signed`."""
        return self.path / "signed.jsonl"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def reference(self) -> Path:
        return self.path / "reference.json"


class Mean(Protocol):
    """What a round is closed with: a running sum, or a spool of updates."""

    @property
    def schema(self) -> Schema: ...

    def take_mean(self, name: str) -> NDArray[np.float64] | NDArray[np.int64]:
        """The mean update of one tensor, or what stands for it; each may be taken once."""
        ...


def create_run(runs: Path, run: str, study: Study, initial: Arrays | None) -> RunFolder:
    """Makes the folder of a run with its study and its first weights; a folder that is there is refused.

    `initial` is None where the plan is federated: there is no network yet, its weights come with the plan.
    """
    folder = RunFolder(runs / run)
    if (folder.path / "state.json").exists():
        raise StateInvalid(f"{folder.path}: holds a run already. Choose another name, or resume that one.")
    write_atomic(folder.path / "study.json", canonical(study))
    digest = NO_WEIGHTS if initial is None else save_arrays(folder.weights(0), _first(study, initial))
    write_json(folder.path / "state.json", asdict(State(run, sha256(study), 0, digest)))
    return folder


def adopt_plan(
    folder: RunFolder,
    state: State,
    plan: Plan,
    fingerprint: Fingerprint,
    cohort: tuple[str, ...],
    initial: Callable[[Study], Arrays],
) -> State:
    """Makes the plan of a run durable, and the first weights of its network; killed before the end, it is made anew."""
    study = planned(read_study(folder), plan)
    weights = _first(study, initial(study))
    write_atomic(folder.path / "fingerprint.json", canonical_json(plain(fingerprint)))
    write_atomic(folder.plan, canonical_json(plain(plan)))
    digest = save_arrays(folder.weights(0), weights)
    done = replace(state, weights_sha256=digest, cohort=cohort, plan_sha256=plan_sha256(plan))
    write_json(folder.path / "state.json", asdict(done))
    return done


def _first(study: Study, initial: Arrays) -> Arrays:
    return with_control(initial) if study.train.scaffold else initial


def read_plan(folder: RunFolder, state: State) -> str | None:
    """The text of a run's plan, which it is known by; None where the study gives it or it is still to be made.

    Raises:
        StateInvalid: another plan than the run began with.
    """
    if state.plan_sha256 is None:
        return None
    try:
        written = folder.plan.read_bytes()
    except FileNotFoundError:
        raise StateInvalid(f"{folder.plan}: is missing. Restore the folder from its backup.") from None
    if hashlib.sha256(written).hexdigest() != state.plan_sha256:
        raise StateInvalid(f"{folder.plan}: was changed after the run began. Put it back, or start a new run.")
    return written.decode()


def trained_study(folder: RunFolder) -> Study:
    """The study of a run as its sites train it: with the plan in it, where they have made one."""
    study, text = read_study(folder), read_plan(folder, read_state(folder))
    return study if text is None else planned(study, parse_json(Plan, text, str(folder.plan), StateInvalid))


def read_study(folder: RunFolder) -> Study:
    return from_json((folder.path / "study.json").read_bytes(), str(folder.path / "study.json"))


def read_state(folder: RunFolder) -> State:
    """The last finished round.

    Raises:
        StateInvalid: no run, another study than the one it was started with, or weights that are not there.
    """
    path = folder.path / "state.json"
    if not path.exists():
        raise StateInvalid(f"{folder.path}: holds no run. See `fedserver status` for the runs that there are.")
    try:
        state = parse_json(State, path.read_bytes(), str(path), StateInvalid)
        written = (folder.path / "study.json").read_bytes()
    except StateInvalid as e:
        raise StateInvalid(f"{e} Restore the folder from its backup.") from None
    except OSError as e:
        raise StateInvalid(
            f"{folder.path}: state.json or study.json cannot be read ({type(e).__name__}). "
            f"Restore the folder from its backup."
        ) from None
    # the bytes as they were written: a later version of the package may know more keys
    if hashlib.sha256(written).hexdigest() != state.study_sha256:
        raise StateInvalid(
            f"{folder.path}: study.json was changed after the run began. Put it back, or start a new run."
        )
    if state.weights_sha256 != NO_WEIGHTS and not folder.weights(state.round).exists():
        raise StateInvalid(f"{folder.weights(state.round)}: is missing. Restore the folder from its backup.")
    return state


def excluded(folder: RunFolder) -> tuple[str, ...]:
    """Sites that are not asked in a run."""
    path = folder.path / WITHOUT
    return tuple(read_json(path)["sites"]) if path.exists() else ()


def finish_round(
    folder: RunFolder,
    state: State,
    total: Mean,
    optimizer: Optimizer,
    cohort: tuple[str, ...],
    line: Mapping[str, Any],
    late: Mapping[str, int] | None = None,
) -> State:
    """Steps the weights by the mean of `total` and makes the round durable; holds one tensor beside `total`.

    SCAFFOLD's control variate stays the mean over all sites that were ever counted (Karimireddy et al. 2020, Algorithm
    1, line 17); one that comes later brings its first from zero.

    `line` goes into metrics.jsonl before the state names the round; a line of a round that was not finished is cut off
    by `forget_unfinished` when the run resumes.
    """
    round_number = state.round + 1
    schema = total.schema
    weights = open_tensors(folder.weights(state.round), "weights of the last round")
    before = load(folder.server_state(state.round)) if optimizer.slots and state.round else {}
    tardy = {site: max(number, state.counted.get(site, 0)) for site, number in (late or {}).items()}
    counted = {**state.counted, **tardy, **dict.fromkeys(cohort, round_number)}
    everybody = max(1, len(counted))
    after: dict[str, Array] = {}

    def stepped() -> Iterator[tuple[str, Array]]:
        for name in sorted(schema):
            spec = schema[name]
            if name.startswith(CONTROL):
                sums = len(state.counted) * one(weights, name) + len(cohort) * total.take_mean(name)
                yield name, (sums / everybody).astype(spec.dtype)
                continue
            starts = optimizer.slots.items()
            slots = {s: before.pop(f"{s}/{name}", np.full(spec.shape, start, np.float32)) for s, start in starts}
            moved, kept = advance(optimizer, one(weights, name), total.take_mean(name), slots)
            after.update({f"{s}/{name}": a for s, a in kept.items()})
            yield name, moved
            del moved, kept  # before the next tensor is read

    digest = save(folder.weights(round_number), schema, stepped())
    if after:
        save_arrays(folder.server_state(round_number), after)
    append_json(folder.metrics, {"round": round_number, "weights_sha256": digest, **line})
    done = replace(state, round=round_number, weights_sha256=digest, cohort=cohort, counted=counted)
    write_json(folder.path / "state.json", asdict(done))
    clear(folder.spool)
    return done


def forget_unfinished(folder: RunFolder, state: State) -> None:
    """Cuts lines of rounds that a killed process wrote before they were finished, and what it left half written.

    Raises:
        StateInvalid: metrics.jsonl holds a line that is none of a round.
    """
    clear(folder.spool)
    for part in folder.path.glob(".*.part"):
        part.unlink(missing_ok=True)
    try:
        lines = read_lines(folder.metrics)
        kept = [line for line in lines if line["round"] <= state.round]
    except (ValueError, KeyError, TypeError):
        raise StateInvalid(
            f"{folder.metrics}: has a line that tells of no round. Restore the file from its backup, or take out that "
            "line; weights and state do not follow from it."
        ) from None
    if len(kept) != len(lines):
        write_atomic(folder.metrics, b"".join(canonical_json(line) + b"\n" for line in kept))


def check_weights(folder: RunFolder, state: State) -> None:
    """Raises StateInvalid unless the weights of the last finished round are those that were written."""
    if file_sha256(folder.weights(state.round)) != state.weights_sha256:
        raise StateInvalid(
            f"{folder.weights(state.round)}: is not as it was written. Restore it from a backup, or start anew."
        )


def schema_on_disk(folder: RunFolder, round_number: int) -> Schema:
    found = open_tensors(folder.weights(round_number), f"weights of round {round_number}").schema
    return {name: Spec(spec.shape, spec.dtype) for name, spec in found.items()}


def write_progress(folder: RunFolder, progress: Mapping[str, Any]) -> None:
    """Shows where the run is; replaced whole, but not synced: it tells, nothing is decided by it."""
    path = folder.path / "progress.json"
    part = path.with_name(f".progress.{os.getpid()}.part")
    with suppress(OSError):  # a full disk: what matters is written elsewhere, and complains there
        with os.fdopen(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(canonical_json(dict(progress)))
        part.replace(path)


def read_progress(folder: RunFolder) -> dict[str, Any]:
    """The last of them; {} where there is none, or none that a power cut has left whole."""
    try:
        return dict(read_json(folder.path / "progress.json"))
    except (FileNotFoundError, ValueError):
        return {}
