"""All attacks on one study: its data is prepared once, each attack is timed, and what is missed is told."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shared_models.errors import StudyInvalid
from shared_models.study import Study
from simulations.attacks import claim, curious, imprint, inversion, membership
from simulations.attacks.finding import Finding
from simulations.attacks.people import EXAMPLE, Patient, people_of
from simulations.engine import NodeConfig

ATTACKS = ("inversion", "imprint", "membership", "claim", "curious")
Progress = Callable[[str, int, int], None]  # attack, done, of


@dataclass(frozen=True, slots=True)
class Size:
    """How much work the attacks are.

    Attributes:
        iterations: of an inversion.
        networks: of membership inference, for each protection.
        patients: most that are learned from.
        canaries: of the audit.
    """

    iterations: int = 1000
    networks: int = 33
    patients: int = 90
    canaries: int = 2000


FULL, QUICK = Size(), Size(iterations=800, networks=17, patients=30, canaries=600)


def chosen(words: str) -> tuple[str, ...]:
    """Attacks by name, in their order; all of them for `all`.

    Raises:
        StudyInvalid: no such attack.
    """
    asked = [word.strip() for word in words.split(",") if word.strip()]
    strange = [word for word in asked if word not in (*ATTACKS, "all")]
    if strange or not asked:
        raise StudyInvalid(f"--attacks {words!r}: allowed are {', '.join(ATTACKS)}, separated by commas, or all.")
    return tuple(name for name in ATTACKS if name in asked or "all" in asked)


def carry_out(
    study: Study,
    nodes: Mapping[str, NodeConfig],
    folder: Path,
    names: Sequence[str],
    size: Size,
    progress: Progress = lambda name, done, of: None,
) -> list[Finding]:
    """The findings of the attacks `names`; what they keep lies in `folder`.

    Raises:
        StudyInvalid: a study whose network follows from a plan, or whose data the attacks are not for.
    """
    if study.plan == "federated":
        raise StudyInvalid(
            f'study {study.name!r}: plan = "federated" has no network yet. Attack the study with the plan in it: '
            f"give model and preprocess."
        )
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    visible = {"inversion", "imprint", "membership"} & set(names)
    people = people_of(study, nodes, inversion.EDGE, size.patients) if visible else []
    found = []
    for name in names:
        began, of, done = time.monotonic(), _steps(name, size), 0
        progress(name, 0, of)

        def tick(name: str = name, of: int = of) -> None:
            nonlocal done
            done += 1
            progress(name, done, of)

        finding = _one(name, study, nodes, folder, people, size, tick)
        progress(name, of, of)
        found.append(replace(finding, seconds=time.monotonic() - began))
    return found


def _one(
    name: str,
    study: Study,
    nodes: Mapping[str, NodeConfig],
    folder: Path,
    people: Sequence[Patient],
    size: Size,
    tick: Callable[[], None],
) -> Finding:
    if name == "inversion":
        return inversion.attack(study, people, size.iterations, tick)
    if name == "imprint":
        return imprint.attack(study, nodes, people, tick)
    if name == "membership":
        return membership.attack(study, people, size.networks, tick)
    if name == "claim":
        return claim.attack(study, EXAMPLE, size.canaries, tick)
    return curious.attack(study, nodes, folder)


def _steps(name: str, size: Size) -> int:
    """How often an attack ticks."""
    return {"inversion": 6 * size.iterations, "imprint": 2, "membership": 3 * size.networks, "claim": 2}.get(name, 1)
