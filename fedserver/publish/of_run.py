"""From a run to what its release is made from, in a federation or after a simulation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedserver.checkpoint import RunFolder, check_weights, read_state, read_study, trained_study
from fedserver.publish.card import Words, card
from fedserver.publish.lineage import RETRAINED, counted_rounds, earlier
from fedserver.publish.making import Recipe
from fedserver.publish.software import code_sha256, environment, package
from fedserver.report import facts
from shared_models.calibration import carried
from shared_models.control import without_control
from shared_models.errors import StateInvalid
from shared_models.files import canonical_json, file_sha256, read_json
from shared_models.identity import Credential
from shared_models.provenance import APPROVED, CARDS, ENVIRONMENT, PLAN, sha256_of
from shared_models.release import CALIBRATION, FINGERPRINT, Origin, Parent, check_version
from shared_models.study import Study
from shared_models.weights import load

REFERENCE = "reference.json"  # in the run's folder: what its sites' patients are like, where the study asks for it
RELEASED = ("segmentation", "classification", "prognosis")  # tasks whose answers prediction gives


@dataclass(frozen=True, slots=True)
class Maker:
    """Who makes a release.

    Attributes:
        name: of the federation, or of the simulation.
        authority, trust: as in Recipe.
        evidence: further members (audit, roster), made anew for each release.
    """

    kind: str
    name: str
    signer: Credential = field(repr=False)
    authority: bytes
    trust: bytes
    evidence: Mapping[str, bytes] = field(default_factory=dict)
    roster: tuple[int, str] | None = None
    approvals: int = 0
    approvers: Mapping[str, str] = field(default_factory=dict)


def recipe_of(
    run: RunFolder,
    version: str,
    by: Maker,
    words: Words,
    round_number: int | None = None,
    data_cards: Mapping[str, Mapping[str, Any]] | None = None,
    parents: Sequence[Parent] = (),
) -> Recipe:
    """What the release of a run's last weights, or of those after an earlier round, is made from.

    Raises:
        ReleaseInvalid: a version that none can be called.
        StateInvalid: no round is finished, weights that are not as they were written, a study of which there are no
            releases, or a data card of no site of the run.
    """
    check_version(version)
    state, cards = read_state(run), data_cards or {}
    number = state.round if round_number is None else round_number
    if state.round == 0 or not 0 < number <= state.round:
        raise StateInvalid(
            f"run {run.id!r}: has finished {state.round} rounds; there are no weights of round {number}."
        )
    study = trained_study(run)
    _check_released(run, study)
    check_weights(run, state)
    found = facts(run)
    if number != state.round:  # what was tested is the last model, and no other
        found = {**found, "test": {}, "not_tested": {}, "calibration": {}, "finished": False, "rounds_done": number}
    rounds = [line for line in found["rounds"] if line["round"] <= number]
    digest = file_sha256(run.weights(number))
    if digest != rounds[-1]["weights_sha256"]:
        raise StateInvalid(f"{run.weights(number)}: is not as it was written. Restore it from a backup.")
    if set(cards) - set(found["sites"]):
        raise StateInvalid(
            f"data card of {sorted(set(cards) - set(found['sites']))[0]!r}: is no site of run {run.id!r}."
        )
    members = {**_members(run, state.plan_sha256 is not None, cards), **by.evidence}
    if number == state.round and (run.path / REFERENCE).exists():
        members[FINGERPRINT] = (run.path / REFERENCE).read_bytes()
    if (calibration := carried(study, found["calibration"])) is not None:
        members[CALIBRATION] = canonical_json(calibration)
    origin = Origin(
        kind="federation" if by.kind == "federation" else "simulation",
        federation=by.name,
        run=run.id,
        round=number,
        made_at=round(time.time(), 3),
        study_sha256=state.study_sha256,
        weights_sha256=digest,
        sites=counted_rounds(rounds),
        plan_sha256=state.plan_sha256,
        parents=(*parents, *_parents(run, read_study(run))),
        roster_epoch=by.roster[0] if by.roster else None,
        roster_sha256=by.roster[1] if by.roster else None,
        data_cards={site: sha256_of(members[f"{CARDS}/{site}.json"]) for site in cards},
        package=package(),
        code_sha256=code_sha256(),
        environment_sha256=sha256_of(members[ENVIRONMENT]),
    )
    told = card(study, version, found, words, found["privacy"], cards, origin.kind)
    return Recipe(
        study=study,
        weights=without_control(load(run.weights(number))),
        version=version,
        origin=origin,
        signer=by.signer,
        authority=by.authority,
        trust=by.trust,
        card=told,
        words=words,
        privacy=found["privacy"],
        members=members,
        approvals=by.approvals,
        approvers=by.approvers,
    )


def _check_released(run: RunFolder, study: Study) -> None:
    """Refuses a study of which there are no releases; where sites keep layers, the federation has no whole model."""
    if study.personal.keep:
        raise StateInvalid(
            f"run {run.id!r}: its sites keep their {' and '.join(study.personal.keep)} layers, so what the federation "
            "has is no whole model. Each site's own is at that site."
        )
    if study.task.kind not in RELEASED:
        raise StateInvalid(
            f"run {run.id!r}: a {study.task.kind} is not released yet; releases answer {', '.join(RELEASED)}."
        )
    if study.of_bags:
        raise StateInvalid(
            f"run {run.id!r}: its network answers for bags of features, and `fedclient predict` reads images. Releases "
            f"are of networks that see images or tables."
        )


def _members(run: RunFolder, planned: bool, cards: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """What lies beside the weights, by its name in the release: study, software, plan and data cards."""
    members = {APPROVED: (run.path / "study.json").read_bytes(), ENVIRONMENT: environment()}
    if planned:
        members[PLAN] = run.plan.read_bytes()
    return members | {f"{CARDS}/{site}.json": canonical_json(dict(one)) for site, one in cards.items()}


def _parents(run: RunFolder, study: Study) -> list[Parent]:
    parents: list[Parent] = []
    if study.transfer.sha256:
        parents.append(Parent("weights", study.name, study.transfer.sha256))
        parents += [
            Parent("run", each.run.id, study.transfer.sha256) for each in earlier(run)[:1] if each.run is not None
        ]
    if (run.path / RETRAINED).exists():
        before = read_json(run.path / RETRAINED)
        parents.append(Parent("run", str(before["run"]), str(before["weights_sha256"])))
    return parents
