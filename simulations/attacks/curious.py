"""A curious coordinator that keeps every byte of a run: what it reads of one site, and what a secure sum leaves.

One round of the study by the real client and server code, every reply recorded as it arrives; of a study with secure
sums one without them and one as it is. Then the updates of the one without go through a secure sum by the real code of
both sides: every masked vector and every message is kept, and what the shares that are revealed in the end give away
is taken off again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.app import app as installed
from fedserver.checkpoint import RunFolder, create_run
from shared_models import nets
from shared_models.errors import StudyInvalid
from shared_models.protect.masking import self_mask_key
from shared_models.protect.prg import Masks
from shared_models.protect.ring import signed, unpacked
from shared_models.protect.shamir import combine
from shared_models.scores import row_of
from shared_models.study import Study
from shared_models.weights import Arrays, load, save_arrays
from shared_models.wire import VECTOR, Reply, read_order, read_reply, tensors_of
from simulations.attacks.finding import Finding, Row, judged
from simulations.attacks.people import as_sent, secured
from simulations.attacks.sums import Transcript, mean_of, secure_sum
from simulations.engine import NodeConfig, run_local

STEPS = 2  # of the round that is listened to: what is told of it is the same as of a long one
FEWEST = 3
SECURE = "secure sum"
KEPT = "updates of single sites that are found in the folder"


class Listening:
    """The installed client; keeps every reply that it gives, and what a site had for a secure sum, which no reply has.

    Attributes:
        summed: site -> the update that it added to a sum.
    """

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.summed: dict[str, dict[str, NDArray[Any]]] = {}

    def __call__(self, message: Any, context: Any) -> Any:
        reply = installed(message, context)
        self.heard.append(reply)
        if read_order(message).kind == "train" and "sums" in context.node_config:
            [kept] = Path(context.node_config["sums"]).glob("runs/*/round-*.safetensors")
            self.summed[context.node_config["site"]] = load(kept)
        return reply


@dataclass(frozen=True, slots=True)
class Heard:
    """What a coordinator got of one round.

    Attributes:
        deltas: site -> its update, whether it was sent or not.
        vectors: site -> uint8[bytes], its masked vector; of a round without secure sums none.
    """

    run: RunFolder
    replies: Mapping[str, list[Reply]]
    deltas: Mapping[str, dict[str, NDArray[Any]]]
    vectors: Mapping[str, NDArray[np.uint8]]


def attack(study: Study, nodes: Mapping[str, NodeConfig], folder: Path) -> Finding:
    """Listens to a round without secure sums, to a secure sum of its updates, and to a round as the study has it.

    Raises:
        StudyInvalid: fewer than three sites.
    """
    if len(nodes) < FEWEST:
        raise StudyInvalid(f"study {study.name!r}: a secure sum needs {FEWEST} sites, there are {len(nodes)}.")
    bare_round = listened(as_sent(study), nodes, folder, "listened")
    run, replies, deltas = bare_round.run, bare_round.replies, bare_round.deltas
    private = study.protect.privacy is not None
    told = readable(replies)
    flat = {site: _flat(delta) for site, delta in deltas.items()}
    clip = 1.01 * max(float(np.abs(values).max()) for values in flat.values())
    counts = {site: {"cases": max(of.examples for of in replies[site])} for site in deltas}
    transcript = secure_sum(deltas, clip, counts=counts, table=study.protect.secure_aggregation)
    chance = 5 / len(next(iter(flat.values()))) ** 0.5  # five deviations of a correlation of what has none
    bare = min(alike(flat[site], _flat(transcript.without_masks(deltas[site]))) for site in flat)
    masked = max(alike(flat[site], _flat(transcript.read_as_plain(site))) for site in flat)
    halfway = max(alike(flat[site], half_unmasked(transcript, site)) for site in flat)
    mean: NDArray[np.float64] = np.stack(list(flat.values())).astype(np.float64).mean(0)
    off = float(np.abs(_flat(mean_of(transcript)) - mean).max())
    step = len(flat) / transcript.context.scale  # each site rounds by half an element at most
    kept = on_disk(run.path, deltas)
    findable = on_disk(_each_in_a_file(folder / "kept", deltas), deltas)
    likeness = "likeness of what is read to one site's update (correlation)"
    rows = (
        judged("nothing: the same vector without its masks", likeness, bare, above=0.999, control=True),
        Row("nothing", "told of each site beside its update", ", ".join(told) or "no number", "no number" * private,
            not told if private else None, study=not secured(study)),
        Row("nothing: each update in a file of its own", KEPT, float(findable), f"{len(deltas)}",
            findable == len(deltas), control=True),
        Row("nothing", f"{KEPT} of the run", float(kept), "below 1", kept == 0, study=not secured(study)),
        judged(SECURE, likeness, masked, below=chance, study=secured(study)),
        judged(f"{SECURE}, its revealed shares used", likeness, halfway, below=chance, study=secured(study)),
        *(secure_rows(study, nodes, folder, chance) if secured(study) else ()),
        Row(SECURE, "told of all sites together", ", ".join(sorted(transcript.total.counts))),
        judged(SECURE, "largest difference of the sum from the plain mean", off, below=max(1e-6, step)),
    )  # fmt: skip
    return Finding(
        "curious",
        "A curious coordinator",
        f"One round of the study{' with its secure sums, and one without them,' * secured(study)} with {len(nodes)} "
        f"sites by the real client and server code, all replies kept; then a secure sum of the same updates "
        f"({len(mean):,} weights in a ring of {transcript.context.ring_bits} bits, "
        f"{transcript.context.threshold} of {len(nodes)} sites needed to its end), all vectors and messages kept.",
        rows,
        _verdict(study, rows, told),
        details={"told": told, "clip": clip},
    )


def _verdict(study: Study, rows: Sequence[Row], told: Sequence[str]) -> str:
    """What is read of a site; that a secure sum tells nothing of it only where every figure of it is as it must be."""
    failed = [row for row in rows if row.holds is False and (row.control or row.against.startswith(SECURE))]
    figures = ", ".join(f"{row.figure} of {row.told} under {row.against!r}" for row in failed)
    if secured(study):
        if failed:
            return f"That the coordinator reads nothing of one site is not shown: {figures}."
        return "Of this study's rounds the coordinator reads the mean and sums over all sites, and of one site nothing."
    what = "each site's update, whole" if study.protect.privacy is None else "the noisy update of each site"
    also = f", and {', '.join(told)}" if told else ", and nothing else" if study.protect.privacy is not None else ""
    would = f"That a secure sum would tell less is not shown: {figures}." if failed else (
        "Under a secure sum it would read the mean and sums alone."
    )  # fmt: skip
    return f"Of this study's rounds the coordinator reads {what}{also}. {would}"


def secure_rows(study: Study, nodes: Mapping[str, NodeConfig], folder: Path, chance: float) -> tuple[Row, ...]:
    """What is read of one site in a round of secure sums as the study has it; and that it would be found if told."""
    heard = listened(study, nodes, folder, "listened-secure")
    told = readable(heard.replies)
    site, said = min(heard.replies.items())
    planted = readable({**heard.replies, site: [*said[:-1], replace(said[-1], train_cases=3)]})
    kept, round_of_it = on_disk(heard.run.path, heard.deltas), f"{SECURE}, a round of the study"
    findable = on_disk(_each_in_a_file(folder / "kept-secure", heard.deltas), heard.deltas)
    bits = 32 if study.protect.secure_aggregation is None else study.protect.secure_aggregation.ring_bits
    flat = {site: _flat(delta) for site, delta in heard.deltas.items()}
    read = max(alike(of, signed(unpacked(heard.vectors[s], bits)[: of.size], bits)) for s, of in flat.items())
    return (
        Row("nothing: one count planted in a reply of the secure round", "told of one site",
            ", ".join(planted) or "no number", "cases", "cases" in planted, control=True),
        Row("nothing: each update of the secure round in a file of its own", KEPT, float(findable),
            f"{len(heard.deltas)}", findable == len(heard.deltas), control=True),
        Row(round_of_it, "told of one site", ", ".join(told) or "no number", "no number", not told, study=True),
        Row(round_of_it, f"{KEPT} of the run", float(kept), "below 1", kept == 0, study=True),
        judged(round_of_it, "likeness of a vector to the update in it (correlation)", read, below=chance, study=True),
    )  # fmt: skip


def listened(study: Study, nodes: Mapping[str, NodeConfig], folder: Path, name: str) -> Heard:
    """One round of the study, and its scores, in `folder` / `name`."""
    short = replace(
        study,
        train=replace(study.train, local_steps=STEPS),
        rounds=replace(study.rounds, count=1, quorum=len(nodes), cohort=1.0),
    )
    shutil.rmtree(folder / name, ignore_errors=True)  # of an attack before, or of one that was stopped
    run = create_run(folder / name, "round", short, nets.initial_weights(short))
    listening: Any = Listening()
    run_local(run.path, {site: {**config, "work": str(folder)} for site, config in nodes.items()}, app=listening)
    replies, deltas = dict[str, list[Reply]](), dict(listening.summed)
    vectors = dict[str, NDArray[np.uint8]]()
    for message in listening.heard:
        reply = read_reply(message, "a reply")
        replies.setdefault(reply.site, []).append(reply)
        tensors = tensors_of(message, "a reply")
        if tensors and VECTOR in tensors:
            vectors.setdefault(reply.site, tensors[VECTOR])  # of the round; the scores' comes later
        elif tensors:
            deltas[reply.site] = {n: a for n, a in tensors.items() if a.dtype.kind == "f"}
    if len(deltas) < len(nodes):
        refused = sorted({f"{r.site}: {r.refusal}" for of in replies.values() for r in of if r.refusal})
        raise StudyInvalid(f"study {study.name!r}: not every site trained ({', '.join(refused) or 'see above'}).")
    return Heard(run, replies, deltas, vectors)


def readable(replies: Mapping[str, list[Reply]]) -> list[str]:
    """Which numbers of a site stand in its replies, in words; of numbers that are the study's none is counted."""
    every = [reply for of in replies.values() for reply in of]
    told = {
        "examples": any(reply.examples for reply in every),
        "losses": any(reply.losses for reply in every),
        "scores of its patients": any(row_of(score) for reply in every for score in reply.scores.values()),
        "seconds": any(reply.seconds for reply in every),
        "cases": any(reply.train_cases or reply.test_cases for reply in every),
        "variance of its steps": any(reply.variance for reply in every),
        "histograms": any(reply.fingerprint for reply in every),
    }
    return [name for name, there in told.items() if there]


def alike(update: NDArray[Any], read: NDArray[Any]) -> float:
    """|Pearson correlation| of two vectors; 0 where one does not vary."""
    one, other = update.astype(np.float64), read.astype(np.float64)
    one, other = one - one.mean(), other - other.mean()
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return abs(float(one @ other)) / length if length > 0 else 0.0


def half_unmasked(transcript: Transcript, site: str) -> NDArray[np.float64]:
    """One site's vector without its own mask, as the shares allow that are revealed in the end; pair masks stay."""
    context = transcript.context
    shares = {context.place(of.site): bytes.fromhex(of.own_masks[site]) for of in transcript.revealed}
    chosen = dict(sorted(shares.items())[: context.threshold])
    elements = transcript.elements(site).copy()
    Masks([(self_mask_key(combine(chosen), context.digest, site), -1)]).apply(elements)
    return signed(elements, context.ring_bits).astype(np.float64)


def on_disk(folder: Path, deltas: Mapping[str, Arrays]) -> int:
    """Of how many sites the update lies in some file of a folder, by a stretch of the bytes of its largest element.

    Simulated sites keep their own in `members`, which the coordinator does not see.
    """
    seen = (path for path in sorted(folder.rglob("*")) if "members" not in path.relative_to(folder).parts)
    files = [path.read_bytes() for path in seen if path.is_file()]
    found = 0
    for delta in deltas.values():
        values = max((array.ravel() for array in delta.values()), key=lambda each: float(np.abs(each).max()))
        at = int(np.abs(values).argmax()) // 8 * 8
        stretch = values[at : at + 8].astype("<f4").tobytes()
        found += any(stretch in content for content in files)
    return found


def _each_in_a_file(folder: Path, deltas: Mapping[str, Arrays]) -> Path:
    for site, delta in deltas.items():
        save_arrays(folder / f"{site}.safetensors", delta)
    return folder


def _flat(tensors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
