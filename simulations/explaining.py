"""Explanations of a simulated run: pictures of its sites' cases, and whether such maps may be believed at all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.data.cases import Case, Mask, read_case, read_case_labels
from fedclient.data.truths import classes_of, has_truth
from fedclient.gate.run import usable_cases
from fedclient.site import open_site
from fedclient.training.explaining import Pictured, Trained, Wanted, around, explain_all
from fedclient.training.maps import Method, channel_of
from fedclient.training.sanity import LIMITS, Checkup, Sample, check_maps
from fedserver.checkpoint import RunFolder, read_state, trained_study
from shared_models.errors import ExplanationFailed
from shared_models.files import write_json
from shared_models.preprocess import preprocess, preprocess_labels
from shared_models.study import Study
from shared_models.tasks.segmentation import truth_of
from simulations.engine import NodeConfig


@dataclass(frozen=True, slots=True)
class Which:
    """Which cases: of a split, so many of each site at most, in the order of their keys."""

    split: str = "test"
    most: int = 4


def model_of(run: RunFolder) -> Trained:
    """What a run has trained, the last round first."""
    last = read_state(run).round
    return Trained(trained_study(run), tuple(run.weights(number) for number in range(last, -1, -1)))


def explain_sites(
    model: Trained, nodes: Mapping[str, NodeConfig], which: Which, wanted: Wanted, out: Path, rounds: int
) -> dict[str, Any]:
    """Pictures of cases of each site, in OUT/SITE; site -> what `explain_all` tells."""
    told: dict[str, Any] = {}
    for name, config in nodes.items():
        site = open_site(config)
        cases = [case for case in usable_cases(site) if case.split == which.split and case.channels][: which.most]
        device = "cpu" if site.device == "auto" else site.device
        told[name] = explain_all(model, [_pictured(c, model.study) for c in cases], wanted, out / name, device, rounds)
    return told


def _pictured(case: Case, study: Study) -> Pictured:
    volume = read_case(case, study.channels)
    return Pictured(preprocess(volume.voxels, volume.spacing_mm, study.preprocess).images, volume.left_right_axis)


def check_explanations(
    model: Trained, nodes: Mapping[str, NodeConfig], which: Which, answer: str, methods: Sequence[Method], out: Path
) -> list[Checkup]:
    """The sanity checks of each method, on cases that show what `answer` names and whose masks say where.

    Writes OUT/checks.json.

    Raises:
        ExplanationFailed: no case has such a mask.
    """
    study = model.study
    answer = answer or study.task.answers[0]
    channel_of(study, answer)
    samples = [sample for name, config in nodes.items() for sample in _samples(name, config, study, answer, which)]
    if not samples:
        raise ExplanationFailed(
            f"no case of split {which.split} shows {answer!r} and has a mask that says where. Give the phantom, or "
            f"data whose manifest has masks."
        )
    (net,) = model.nets(most=1)
    found = [check_maps(net, study, samples, answer, method) for method in methods]
    write_json(
        out / "checks.json",
        {
            "study": study.name,
            "model_sha256": model.sha256,
            "answer": answer,
            "checks": [each.plain() for each in found],
        },
    )
    return found


def _samples(name: str, config: NodeConfig, study: Study, answer: str, which: Which) -> Iterator[Sample]:
    taken = 0
    k = study.task.answers.index(answer)
    for case in usable_cases(open_site(config)):
        if case.split != which.split or not isinstance(case.label, Mask) or not has_truth(case, study.task):
            continue
        if study.task.kind == "classification" and not classes_of(case, study.task)[k]:
            continue
        volume = read_case(case, study.channels)
        examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
        masks = preprocess_labels(read_case_labels(case, volume, study.task.labels), examples.geometry)
        lesions = list(truth_of(study.task, masks))[k] if study.task.kind == "segmentation" else masks == k + 1
        most = int(lesions.reshape(len(lesions), -1).sum(axis=1).argmax())
        if not lesions[most].any():
            continue
        image, lesion = examples.images[most], lesions[most]
        size = study.preprocess.size
        if image.shape[1:] != size:  # the study trains on patches
            window = around([int(n) for n in np.argwhere(lesion).mean(axis=0)], size, image)
            image, lesion = image[(slice(None), *window)], lesion[window]
            if not lesion.any():
                continue
        yield Sample(np.ascontiguousarray(image), lesion, f"{name} {case.patient}")
        taken += 1
        if taken == which.most:
            return


def in_words(checked: Sequence[Checkup]) -> str:
    """The verdicts for the terminal, and what such maps cannot say even where they pass."""
    lines: list[str] = []
    for each in checked:
        lines.append(f"{each.method} on {each.examples} examples: {'PASSED' if each.passed else 'FAILED'}")
        lines += [f"  {'pass' if v.passed else 'FAIL'}  {v.name}: {v.words}" for v in each.verdicts]
        cascade = ", ".join(f"{value:.2f}" for value in each.cascade)
        lines.append(
            f"        AUPRC: maps {each.localisation:.3f}, random weights {each.randomised:.3f}, middle "
            f"{each.centre:.3f}, chance {each.chance:.3f}; cascade from the head on: {cascade}"
        )
    return "\n".join([*lines, LIMITS])
