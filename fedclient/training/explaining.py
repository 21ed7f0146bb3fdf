"""Answers of a model on images, explained: which example, which map, how sure; drawn and written down, all of it here.

OUT/0001-grad-cam.png     numbered as the images were given: no name of a file, and none of a patient
OUT/explanations.json     what is on them, in numbers
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedclient.data.cases import Case, Channel, read_case
from fedclient.memory import FINAL, FINAL_STUDY, final_study
from fedclient.overlay import Panel, displayed, drawn
from fedclient.training.device import device_named, gpus
from fedclient.training.maps import Explained, Method, channel_of, explain
from fedclient.training.sanity import LIMITS
from fedclient.training.uncertainty import Spread, augmented, ensemble
from fedclient.training.windows import logits
from shared_models import nets
from shared_models.control import without_control
from shared_models.errors import ExplanationFailed, StateInvalid, StudyInvalid
from shared_models.files import file_sha256, write_atomic, write_json
from shared_models.parse import parse_json
from shared_models.plan import Plan
from shared_models.planned import planned
from shared_models.preprocess import preprocess
from shared_models.seeds import rng
from shared_models.study import Study, from_json, load_study
from shared_models.tasks.chosen import functions_of
from shared_models.weights import load

TITLES: dict[Method, str] = {"grad-cam": "Grad-CAM", "occlusion": "occlusion", "smooth-grad": "SmoothGrad"}
SCORE = {
    "classification": "the score is the answer's logit",
    "segmentation": "the score is the mean logit over the predicted region",
}


@dataclass(frozen=True, slots=True)
class Trained:
    """A model: what it was trained as, and its weights files, the newest first; further ones are of rounds before."""

    study: Study
    files: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        return file_sha256(self.files[0])

    def nets(self, device: torch.device | str = "cpu", most: int | None = None) -> Iterator[nn.Module]:
        """A network for each of the files, the newest first."""
        for file in self.files[:most]:
            net = nets.network(self.study)
            nets.load_arrays(net, without_control(load(file)))
            yield net.to(device).eval()


@dataclass(frozen=True, slots=True)
class Pictured:
    """The examples of one image.

    Attributes:
        images: float32[N, C, *size]; of the whole image where the study trains on patches.
        left_right_axis: 0 where rows run between the patient's left and right (volumes), 1 where columns do.
    """

    images: NDArray[np.float32]
    left_right_axis: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of each image.

    Attributes:
        answer: of the task; empty is the first.
        methods: a picture each.
        plane: of a volume that is answered plane by plane; None is the one with the most of the answer.
        layer: for Grad-CAM.
    """

    answer: str = ""
    methods: tuple[Method, ...] = ("grad-cam",)
    plane: int | None = None
    layer: str = ""


def model_at(path: Path, study: str = "") -> Trained:
    """The model of a weights file and the study that names its network, or of the folder of a run: the coordinator's,
    or what a finished run has left at a site (`fedclient.memory`).

    Raises:
        StudyInvalid: a weights file without a study, or with one whose plan is not in it; or a study beside a run,
            which has its own.
        StateInvalid: a folder that holds no run, or no weights.
    """
    if path.is_file():
        if not study:
            raise StudyInvalid(f"{path}: weights do not say of what network they are. Name the study with --study.")
        named = load_study(study)
        if named.plan == "federated":
            raise StudyInvalid(
                f"{path}: the network of study {named.name!r} comes from its plan, and weights alone do not hold it. "
                f"Give the folder of the run, which does; at a site that of a finished run is site/states/RUN-.../SITE."
            )
        return Trained(named, (path,))
    left = (path / FINAL_STUDY).is_file()
    if not left and not (path / "study.json").is_file():
        raise StateInvalid(f"{path}: is neither a weights file nor the folder of a run. Give one of them.")
    if study:
        raise StudyInvalid(f"{path}: a run has a study of its own. Leave --study out.")
    if left:
        return Trained(final_study(path), (path / FINAL,))
    made = from_json((path / "study.json").read_bytes(), str(path / "study.json"))
    if made.plan == "federated":
        if not (path / "plan.json").is_file():
            raise StateInvalid(f"{path}: the run has no plan yet, so it has no network. Let it go on.")
        made = planned(made, parse_json(Plan, (path / "plan.json").read_bytes(), str(path / "plan.json"), StateInvalid))
    files = tuple(sorted(path.glob("round-*.safetensors"), reverse=True))
    if not files:
        raise StateInvalid(f"{path}: holds no weights. Let the run go on for a round.")
    return Trained(made, files)


def read_pictured(files: Sequence[Path], study: Study) -> Pictured:
    """One image from its file or folder, or from one for each of the study's channels, in their order; colours are
    those of one picture.

    Raises:
        ImageUnreadable: as `read_case`.
        StudyInvalid: another number of files than the study sees.
        ExplanationFailed: a study that sees no image.
    """
    if study.of_bags or study.table_only:
        sees = "a table" if study.table_only else "bags of features that somebody has computed"
        raise ExplanationFailed(
            f"study {study.name!r} sees {sees} and no image, so there is no map of one to draw. Choose a model that "
            f"sees images."
        )
    names = ("",) if study.in_colour else study.channels or ("",)
    if len(files) != len(names):
        mend = f"Join the files of an image by commas, in this order: {', '.join(names)}."
        if len(names) == 1:
            mend = "Give each image by itself" + (", as one picture in colour." if study.in_colour else ".")
        raise StudyInvalid(f"{len(files)} files for one image; study {study.name!r} sees {len(names)}. {mend}")
    channels = tuple(Channel(name, (file,)) for name, file in zip(names, files, strict=True))
    volume = read_case(Case("", "", channels, None, "test"), study.channels)
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
    return Pictured(examples.images, volume.left_right_axis)


def explain_all(
    model: Trained, pictured: Sequence[Pictured], wanted: Wanted, out: Path, device: str, rounds: int
) -> dict[str, Any]:
    """Draws the maps of each image into `out`, and writes and returns what is on them.

    Args:
        rounds: how many of the last rounds say how sure an answer is; with 1 changed copies of the image do.

    Raises:
        ExplanationFailed: as `explain`; fewer rounds than asked for; a device that is not there.
    """
    on = device_named(device)
    if on is None:
        raise ExplanationFailed(f"--device {device}: PyTorch sees {gpus()} GPUs here. Give cpu or cuda:N.")
    if rounds > len(model.files):
        raise ExplanationFailed(f"{rounds} rounds were asked for, weights of {len(model.files)} are there.")
    study = model.study
    answer = wanted.answer or study.task.answers[0]
    channel_of(study, answer)
    (net,) = model.nets(on, 1)
    told: list[dict[str, Any]] = []
    for number, picture in zip(count(1), pictured):
        image, plane = example_of(net, picture.images, study, answer, wanted.plane, on)
        if rounds > 1:
            sure = ensemble(model.nets(on, rounds), image, study)
        else:
            draw = rng(study.seed, study.name, "explain", number)
            sure = augmented(net, image, study, draw, picture.left_right_axis)
        for method in wanted.methods:
            line: dict[str, Any] = {"image": number, "plane": plane, "method": method, "answer": answer}
            line |= _sureness(sure, channel_of(study, answer))
            try:
                found = explain(net, image, study, answer, method, layer=wanted.layer)
            except ExplanationFailed as e:
                told.append({**line, "file": None, "why": str(e)})
                continue
            file = f"{number:04d}-{method}.png"
            write_atomic(
                out / file,
                picture_of(found, image, sure, study, f"sha256 {model.sha256[:16]}", picture.left_right_axis),
            )
            told.append({**line, "chance": round(found.chance, 6), "layer": found.layer, "file": file})
    results = {
        "study": study.name,
        "model_sha256": model.sha256,
        "score": SCORE[study.task.kind],
        "limits": LIMITS,
        "explained": told,
    }
    write_json(out / "explanations.json", results)
    return results


def _sureness(sure: Spread, channel: int) -> dict[str, Any]:
    return {
        "uncertainty": sure.kind,
        "members": sure.members,
        "deviation": round(float(sure.deviation[channel].mean()), 6),
        "entropy_nats": round(float(sure.entropy.mean()), 6),
        "disagreement_nats": round(float(sure.disagreement.mean()), 6),
    }


def example_of(
    net: nn.Module, images: NDArray[np.float32], study: Study, answer: str, plane: int | None, device: torch.device
) -> tuple[Tensor, int]:
    """The example of an image that is explained, float32[C, *size], and its number: where there is most of the answer.

    Where the study trains on patches, the patch around the place that is surest.

    Raises:
        ExplanationFailed: a plane that is not there.
    """
    channel = channel_of(study, answer)
    if plane is not None and not 0 <= plane < len(images):
        raise ExplanationFailed(f"plane {plane}: the image has {len(images)}, from 0 on.")
    with torch.no_grad():
        chances = functions_of(study.task).chances(logits(net, images, study, device))[:, channel]
    most = chances.flatten(1).sum(dim=1) if chances.ndim > 1 else chances
    chosen = int(most.argmax()) if plane is None else plane
    example, size = images[chosen], study.preprocess.size
    if study.preprocess.fit == "patches" and example.shape[1:] != size:
        window = around(
            [int(n) for n in np.unravel_index(int(chances[chosen].argmax()), example.shape[1:])], size, example
        )
        example = example[(slice(None), *window)]
    return torch.from_numpy(np.ascontiguousarray(example)), chosen


def around(place: Sequence[int], size: Sequence[int], example: NDArray[Any]) -> tuple[slice, ...]:
    """The patch of an example [C, *whole] that has a place in its middle, as far as the edges allow."""
    begins = [
        min(max(at - edge // 2, 0), whole - edge)
        for at, edge, whole in zip(place, size, example.shape[1:], strict=True)
    ]
    return tuple(slice(begin, begin + edge) for begin, edge in zip(begins, size, strict=True))


def picture_of(found: Explained, image: Tensor, sure: Spread, study: Study, stamp: str, left_right_axis: int) -> bytes:
    """The PNG of one map; of a volume its plane with the most of the map.

    Args:
        stamp: which model it is, with its digest.
    """
    channel = channel_of(study, found.answer)
    plane = _flattener(found.saliency, left_right_axis)
    panels = [Panel(TITLES[found.method], plane(found.saliency), "share of the largest")]
    region = None
    if found.region is not None:
        region = plane(found.region)
        most = float(np.log(len(sure.mean) if study.task.exclusive else 2))
        panels.append(Panel(f"uncertainty: {sure.kind}", plane(sure.entropy), "entropy in nats", most))
    what = f"{found.answer}: probability {found.chance:.3f}" + (" in the region" if region is not None else "")
    deviation = float(sure.deviation[channel].mean())
    lines = [
        f"{study.title or study.name}",
        f"{what}, deviation {deviation:.3f} over {sure.members} ({sure.kind})",
        f"{TITLES[found.method]}" + (f" at {found.layer}" if found.layer else "") + f"; {SCORE[study.task.kind]}",
        f"model {stamp}",
    ]
    return drawn(plane(image[0].numpy()), panels, lines, region)


def _flattener(saliency: NDArray[Any], left_right_axis: int) -> Any:
    """What takes [*size] to rows and columns as displayed, for all that lies on the grid of a map."""
    if saliency.ndim == 2:
        return lambda values: displayed(values, left_right_axis)
    most = int(saliency.sum(axis=(0, 1)).argmax())
    return lambda values: displayed(values[..., most], left_right_axis)
