"""A study in plain words for the person who says yes or no: what it sees, what leaves, what it costs, what is new."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fedclient.consent import Asked, alike_here, list_asked
from fedclient.data.truths import has_truth
from fedclient.policy import objections
from fedclient.site import Site
from shared_models.errors import FederationError
from shared_models.files import read_json
from shared_models.protect.stages import on_the_wire
from shared_models.scores import NAMES, measure_of
from shared_models.study import Study

MIB = 2**20
SIDES = {
    "classification": ", and so are those that show it and those that do not",
    "prognosis": ", and so are those with the event and those without",
}


def explained(site: Site, asked: Asked) -> dict[str, Any]:
    """Sections of sentences, by their heading, in the order in which they are read."""
    return {
        "trains": list(_trains(asked.study)),
        "sees": list(_sees(site, asked.study)),
        "leaves": [*_leaves(site, asked.study), *_alike(site, asked)],
        "costs": list(_costs(site, asked)),
        "changes": list(_changes(site, asked)),
        "policy": [str(objection) for objection in objections(site.policy, asked.study)]
        or ["The study keeps to [policy] of site.toml."],
    }


def _trains(study: Study) -> Iterator[str]:
    net = "a network that the sites' counts decide" if study.plan == "federated" else f"a {study.model.name}"
    yield f"{study.title or study.name}: {study.task.kind} of {', '.join(study.task.labels)} by {net}."
    if study.transfer.sha256:
        yield (
            f"It begins with weights from a file at the coordinator (SHA-256 {study.transfer.sha256[:12]}): what they "
            f"were trained on, this hospital's patients perhaps among it, is not told here. Ask the coordinator."
        )
    steps = f"{study.train.local_steps} steps" if study.train.local_steps else f"{study.train.local_epochs} epochs"
    yield (f"{study.rounds.count} rounds of {steps} here; a round is counted with {study.rounds.quorum} or more sites.")


def _sees(site: Site, study: Study) -> Iterator[str]:
    from fedclient.gate.run import usable_cases  # imports the image readers

    channels = f" ({', '.join(study.channels)})" if study.channels else ""
    what = "bags of features" if study.of_bags else "rows of tables" if study.table_only else f"{study.modality} images"
    yield f"{what}{channels} and labels in {site.data}; on this machine alone."
    try:
        cases = usable_cases(site)
    except FederationError as error:
        yield f"How many cases that is cannot be told now: {error}"
        return
    count = Counter(case.split for case in cases if has_truth(case, study.task))
    kind = "cases" if study.task.kind == "reconstruction" else "labelled cases"  # which looks at no label
    yield (
        f"{count['train']} {kind} for training, {count['val']} for validation after rounds, "
        f"{count['test']} for the test after the last."
    )
    if study.unlabelled.method != "none":
        without = sum(case.split == "train" and not has_truth(case, study.task) for case in cases)
        yield f"It learns from images without labels as well: {without} more cases for training."


def _leaves(site: Site, study: Study) -> Iterator[str]:
    secure = study.protect.secure_aggregation is not None
    summed = " inside the masked sum" * secure
    if study.plan == "federated":
        yield (
            f"Once, before training{summed}: counts of spacing, size and grey values over all training cases, no "
            f"image. Nothing of fewer than {site.smallest_count} patients."
        )
        yield "Each round: the change of each weight. The counts decide the network, so its size is not known before."
    else:
        from shared_models.nets import network, schema  # imports torch
        from shared_models.weights import size_bytes

        tensors = schema(network(study))
        times = 2 if study.train.scaffold else 1
        bytes_ = size_bytes(on_the_wire(study.protect, tensors)) * times
        yield (
            f"Each round: the change of each weight, {len(tensors) * times} tensors, {bytes_ / MIB:.1f} MiB; in "
            f"{study.rounds.count} rounds {bytes_ * study.rounds.count / MIB:.0f} MiB."
        )
    yield from _shortened(study)
    yield from _noised(study)
    if secure:
        yield from _summed(study)
    elif study.protect.privacy is None:
        yield "Each round: the number of examples and steps, ten mean losses, seconds, and cpu or cuda."
    if study.evaluate.every and study.task.kind == "detection":
        yield (
            f"Every {study.evaluate.every} rounds and at the end{summed}, for each of "
            f"{', '.join(study.task.answers)}: number of scans, of lesions, of those found and of false marks; and how "
            f"their scores are distributed if there are lesions in {site.smallest_count} patients or more, or in none."
        )
    elif study.evaluate.every:
        yield (
            f"Every {study.evaluate.every} rounds and at the end{summed}, for each "
            f"of {', '.join(study.task.answers)}: number of cases and sums of {NAMES[measure_of(study.task)]} over "
            f"them, and how they are distributed if they are of {site.smallest_count} patients or more"
            f"{SIDES.get(study.task.kind, '')}."
        )
    if study.evaluate.reference:
        yield (
            "At the end, for those who use the model to tell a drift by: how many validation and test cases have which "
            "voxel size, size, grey values and answers, on coarse grids, if there are "
            f"{site.smallest_count} patients or more. Users of the release see it, without this site's name."
        )


def _noised(study: Study) -> Iterator[str]:
    """What does not leave where updates are differentially private."""
    if study.protect.privacy is not None:
        yield (
            "The change carries noise for each patient, and nothing else leaves: no score, loss, count, time or "
            "histogram. What the model is worth here `fedclient score` tells of a release, and nobody else."
        )


def _shortened(study: Study) -> Iterator[str]:
    """What is done to an update before it leaves; nobody is hidden by it."""
    if study.protect.clip_norm is not None:
        yield f"Before it leaves, a change longer than {study.protect.clip_norm:g} is shortened to that length."
    if study.protect.compression != "none":
        how = {"fp16": "16 bits of each", "int8": "8 bits of each", "top_k": "the largest of each tensor"}
        yield (
            f"Compressed: {how[study.protect.compression]}; what is cut off stays here and is added to the next change."
        )


def _summed(study: Study) -> Iterator[str]:
    """What of this site the others and the coordinator can know, where updates are summed securely."""
    weights = "the number of examples, a loss" if study.strategy.weighting == "examples" else "a loss"
    if study.protect.privacy is not None:
        weights = "nothing else"
    yield (
        f"All of it masked: the coordinator learns the sum over {study.rounds.quorum} or more sites, and nothing of "
        f"this one by itself. In the sum are the change of each weight and {weights}."
    )
    yield (
        "Beside it, each round: public keys, shares of keys that are sealed for the other sites, and two signatures. "
        "This site refuses a sum of fewer sites, and one that could leave it alone."
    )
    if study.strategy.weighting == "examples":
        yield (
            "The sum of examples is known. When this site alone comes or goes between two rounds, the difference is "
            'its number of examples; weighting = "uniform" would tell none.'
        )


def _alike(site: Site, asked: Asked) -> Iterator[str]:
    """Which other studies may tell what secure sums hide, and why; no policy approves such a one by itself."""
    for other in alike_here(site, asked.sha256, asked.study):
        yield f"{other.why} Ask the coordinator who takes part in both; a person approves it with --also-alike."


def _costs(site: Site, asked: Asked) -> Iterator[str]:
    seconds = measured_s(site, asked.sha256)
    if seconds is None:
        yield "Hours: nothing is measured before the first round is done here."
    else:
        hours = seconds * asked.study.rounds.count / 3600
        yield f"Hours: {hours:.1f} for {asked.study.rounds.count} rounds, from {seconds:.0f} s of the last one here."
    private = asked.study.protect.privacy
    if private is not None:
        yield (
            f"Privacy: differentially private by patient, noise {private.noise_multiplier:g}, "
            f"{asked.study.rounds.count} rounds; `fedclient ledger` says what is left of the budget, and an order that "
            f"would exceed it is refused."
        )
        if asked.study.transfer.sha256:
            yield (
                "What the weights that it begins with hold of this site's patients is not made private by that: the "
                "ledger counts it only where it was trained privately here too."
            )
    elif asked.study.protect.secure_aggregation is not None:
        yield (
            "Privacy: the coordinator sees sums of the sites' updates, without noise. What is in a sum is of no site "
            "alone, unless all the others in it work together; no privacy budget is spent, because none bounds this."
        )
    else:
        yield (
            "Privacy: the coordinator sees this site's update by itself, without noise. Images might be inferred from "
            "it in part by somebody who has it; no privacy budget is spent, because none bounds this."
        )


def measured_s(site: Site, digest: str) -> float | None:
    """Seconds of the last round of a study that was finished here, or None."""
    kept = sorted((site.folder / "runs").glob(f"*/*-{digest}.json"), key=lambda path: path.stat().st_mtime)
    replies = [reply for reply in map(read_json, kept) if reply["kind"] == "update"]
    return float(replies[-1]["seconds"]) if replies else None


def _changes(site: Site, asked: Asked) -> Iterator[str]:
    others = [
        a for a in list_asked(site) if a.sha256 != asked.sha256 and a.decision and a.decision.verdict == "approved"
    ]
    same = [a for a in others if a.study.name == asked.study.name]
    if not others:
        yield "No other study has been approved here."
        return
    last = max(same or others, key=lambda a: a.decision.at_s if a.decision else 0.0)
    yield f"Compared with {last.study.name} ({last.sha256[:12]}), approved last:"
    before, now = flat(json.loads(last.text)), flat(json.loads(asked.text))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"  {key}: {before.get(key, 'nothing')} -> {now.get(key, 'nothing')}"


def flat(table: Any, above: str = "") -> dict[str, str]:
    """`train.batch_size` -> `16`: every key of nested tables by its path."""
    if not isinstance(table, dict):
        return {above: json.dumps(table)}
    return {k: v for key, held in table.items() for k, v in flat(held, f"{above}.{key}" if above else key).items()}
