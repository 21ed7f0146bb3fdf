"""Which unlabelled cases of a site are most worth a label: those that a model is unsure of, and unlike each other.

Cases are taken one by one, each time the one with the largest product of uncertainty and distance to what is labelled
or taken already (the k-centre greedy of Sener & Savarese 2018, algorithm 1, weighed by entropy). All of it stays here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from fedclient.data.cases import Case, read_case
from fedclient.data.truths import has_truth
from fedclient.gate.run import usable_cases
from fedclient.memory import FINAL, SENT, Sent
from fedclient.site import Site
from fedclient.training.explaining import Trained, around, model_at
from fedclient.training.uncertainty import augmented
from shared_models.dates import date_text
from shared_models.errors import ExplanationFailed, StateInvalid
from shared_models.files import file_sha256
from shared_models.parse import parse_json
from shared_models.preprocess import preprocess
from shared_models.seeds import rng
from shared_models.study import Study, from_json

PLANES = 3  # of a case, spread over it, that a model is asked on
LABELLED = 64  # labelled cases that distances are taken to, at most


@dataclass(frozen=True, slots=True)
class Wish:
    """One case of the list.

    Attributes:
        key: of the case; says nothing to who has not the site's secret.
        row: in the manifest, as a spreadsheet counts; 0 where there is none.
        entropy: in nats, of the model's mean answer to changed copies of the case.
        distance: to the nearest case that is labelled, or above it in the list; in mean distances of two cases.
    """

    key: str
    row: int
    entropy: float
    distance: float


def worklist(site: Site, model: Trained, most: int) -> list[Wish]:
    """The unlabelled training cases most worth a label, the most first.

    Raises:
        ExplanationFailed: every case has a label, or the study sees no images.
        ImageUnreadable: a case that cannot be read.
    """
    study = model.study
    if study.task.kind not in ("segmentation", "classification"):
        raise ExplanationFailed(f"study {study.name!r}: a worklist is for labels that somebody draws or names.")
    if study.of_bags:
        raise ExplanationFailed(f"study {study.name!r} sees bags of features and no image, which a worklist looks at.")
    cases = [case for case in usable_cases(site) if case.split == "train" and case.channels]
    unlabelled = [case for case in cases if not has_truth(case, study.task)]
    labelled = [case for case in cases if has_truth(case, study.task)][:LABELLED]
    if not unlabelled:
        raise ExplanationFailed(f"{site.data}: every case for training has a label of study {study.name!r} already.")
    (net,) = model.nets(most=1)
    asked = [_asked(net, case, study) for case in unlabelled]
    known = np.array([_asked(net, case, study)[1] for case in labelled])
    entropies = np.array([entropy for entropy, _ in asked])
    features = np.array([feature for _, feature in asked])
    order, distances = greedy(entropies, features, known.reshape(len(labelled), features.shape[1]), most)
    return [
        Wish(unlabelled[n].key, unlabelled[n].row, round(float(entropies[n]), 6), round(distance, 6))
        for n, distance in zip(order, distances, strict=True)
    ]


def greedy(
    entropies: NDArray[np.float64], features: NDArray[np.float64], known: NDArray[np.float64], most: int
) -> tuple[list[int], list[float]]:
    """Places of the chosen cases in their order, and how far each was from what was there before.

    Args:
        entropies: float64[n]; features: float64[n, d]; known: float64[m, d], of labelled cases.
    """
    both, near = np.concatenate([features, known]), np.full(len(features), np.inf)
    total, pairs = 0.0, 0
    for place, feature in enumerate(features):
        apart = cdist(feature[None], both)[0]
        total, pairs = total + float(apart.sum()), pairs + int((apart > 0).sum())
        near[place] = apart[len(features) :].min(initial=np.inf)
    scale = total / pairs if pairs else 1.0
    near /= scale
    order: list[int] = []
    distances: list[float] = []
    for _ in range(min(most, len(features))):
        # before anything is known all are equally far away
        worth = entropies * np.where(np.isfinite(near), near, 1.0)
        worth[order] = -1.0
        chosen = int(worth.argmax())
        order.append(chosen)
        distances.append(float(near[chosen]) if np.isfinite(near[chosen]) else 1.0)
        near = np.minimum(near, cdist(features, features[chosen : chosen + 1])[:, 0] / scale)
    return order, distances


def _asked(net: nn.Module, case: Case, study: Study) -> tuple[float, NDArray[np.float64]]:
    """Mean entropy over some planes of a case, and the mean of what the network's narrowest layer has of them."""
    entropies, features = zip(
        *(_of(net, image, study, case.key, axis) for image, axis in _examples(case, study)), strict=True
    )
    return float(np.mean(entropies)), np.asarray(np.mean(features, axis=0), np.float64)


def _of(net: nn.Module, image: Tensor, study: Study, key: str, left_right_axis: int) -> tuple[float, NDArray[Any]]:
    sure = augmented(net, image, study, rng(study.seed, study.name, "worklist", key), left_right_axis)
    return float(sure.entropy.mean()), narrowest(net, image[None])


def _examples(case: Case, study: Study) -> Iterator[tuple[Tensor, int]]:
    """Some planes of a case, each with the axis along which left and right lie."""
    volume = read_case(case, study.channels)
    images = preprocess(volume.voxels, volume.spacing_mm, study.preprocess).images
    size = study.preprocess.size
    for n in sorted({round(at) for at in np.linspace(0, len(images) - 1, PLANES + 2)[1:-1]}):
        image = images[n]
        if image.shape[1:] != size:  # the study trains on patches
            image = image[(slice(None), *around([edge // 2 for edge in image.shape[1:]], size, image))]
        yield torch.from_numpy(np.ascontiguousarray(image)), volume.left_right_axis


def narrowest(net: nn.Module, batch: Tensor) -> NDArray[np.float64]:
    """float64[d]: the features with the fewest places on the way through the network, averaged over these."""
    found: list[Tensor] = []

    def note(module: nn.Module, given: Any, made: Any) -> None:
        if not isinstance(made, Tensor) or made.ndim != batch.ndim:
            return
        if not found or made[0, 0].numel() <= found[0][0, 0].numel():
            found[:] = [made.detach()]

    hooks = [module.register_forward_hook(note) for name, module in net.named_modules() if name]
    try:
        with torch.no_grad():
            answer: Tensor = net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    features = found[0] if found else answer
    return np.asarray(features.flatten(2).mean(dim=2)[0].double().cpu().numpy())


@dataclass(frozen=True, slots=True)
class Received:
    """A model that the coordinator has sent this site, as it is trained, and where it is from, in words."""

    model: Trained
    words: str


def received(site: Site, study: Study, digest: str) -> Received:
    """The last weights that came with an order of the study of this digest; after its end, those it came to.

    Raises:
        ExplanationFailed: there are none, or those of another study have taken their place.
    """
    newest = sorted(site.folder.glob(f"states/*-{digest}/{site.name}"), key=_came_ns, reverse=True)
    for folder in newest:
        run = folder.parent.name.removesuffix(f"-{digest}")
        note, final = folder / SENT, folder / FINAL
        if note.exists():
            sent = parse_json(Sent, note.read_bytes(), str(note), StateInvalid)
            blob = site.folder / "blobs" / sent.sha256
            if blob.is_file() and file_sha256(blob) == sent.sha256:
                words = f"sent for round {sent.round} of run {run} on {_came(note)}"
                return Received(Trained(from_json(sent.study, str(note)), (blob,)), words)
        if final.exists():
            return Received(model_at(folder), f"of the end of run {run} on {_came(final)}")
    raise ExplanationFailed(
        f"{site.folder}: no weights of study {study.name!r} ({digest[:12]}) are here: none have come yet, or those of "
        f"another study since. Wait for a round of it, or give --model."
    )


def _came_ns(folder: Path) -> int:
    files = [folder / SENT, folder / FINAL]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _came(file: Path) -> str:
    return date_text(file.stat().st_mtime)


def rows_of(wishes: Sequence[Wish], folder: Path) -> str:
    """For the terminal."""
    lines = [f"{'':3} {'case':16} {'row':>5} {'entropy':>8} {'distance':>8}"]
    lines += [f"{n:3} {w.key} {w.row or '':>5} {w.entropy:8.4f} {w.distance:8.3f}" for n, w in enumerate(wishes, 1)]
    return "\n".join([*lines, f"Rows are of the manifest in {folder}. This list stays here."])
