"""One case as it is kept on disk: pixels, labels, and facts of a closed list, under a key that says nothing.

    cache/PLAN/KEY-STATE.safetensors    PLAN: what it is made for; KEY: of the case; STATE: of the files behind it

Nothing of a header or a path is copied here: what is written are the fields of `Facts`, each a number or a word that
`provenance` knows.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.bags import read_bag
from fedclient.data.cases import Case, read_case, read_case_labels
from fedclient.data.images import is_picture
from fedclient.data.lesions import lesions_of, of_examples
from fedclient.data.lesions import places as centres
from fedclient.data.provenance import MODALITIES, UNKNOWN, Provenance, one_of
from fedclient.data.truths import covariates_of, has_truth, read_truth, vector_of
from fedclient.data.volume import check_resampled
from shared_models.errors import ImageUnreadable
from shared_models.files import canonical_json, replacing
from shared_models.parse import plain
from shared_models.preprocess import Geometry, geometry_from, preprocess
from shared_models.study import Study

FORMAT = 4  # raise it when readers or preprocessing change what they give, or the files what they hold
MOST_PLACES = 10_000  # of labelled voxels that are remembered, for each label
TYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "I64": np.int64}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a cache file tells beside pixels: where they lie on their own grid, and how the image was taken.

    Attributes:
        left_right_axis: 0 where rows run between the patient's left and right, 1 where columns do.
        labelled: how many places of labelled voxels are remembered, for each label of the study.
    """

    geometry: Geometry
    left_right_axis: int
    labelled: tuple[int, ...] = ()
    modality: str | None = None
    provenance: Provenance = UNKNOWN

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Stored:
    """One case as the cache holds it.

    Attributes:
        images: float16[N, C, *size], in memory or mapped; of the whole image, where patches are trained on; of a bag
            [1, 1, tiles, width]; of a table float32[1, covariates], as it is predicted on.
        masks: uint8[N, *size], uint8[N, labels] classes, float32[N, 2] follow-up, or float32[N, M, 1 + 2 D] lesions.
        labelled: int64[places], for each label of the study: flat indices in [N, *size] of voxels that have it (of the
            centres of its lesions), at most `MOST_PLACES`, evenly chosen; empty where patches are not wanted.
        native: on the image's own grid: uint8[I, J, K] where the study measures surfaces, float32[n, 7] lesions.
    """

    key: str
    images: NDArray[Any]
    masks: NDArray[Any]
    facts: Facts
    labelled: tuple[NDArray[np.int64], ...] = ()
    native: NDArray[Any] | None = None

    @property
    def geometry(self) -> Geometry:
        return self.facts.geometry

    @property
    def left_right_axis(self) -> int:
        return self.facts.left_right_axis


def plan_digest(study: Study) -> str:
    """Of all that a cached case depends on beside its files."""
    task = study.task
    truth: list[Any] = [task.kind, task.labels, task.exclusive, task.column, task.none, task.tolerance_mm is not None]
    truth += [task.time_column, task.event_column, plain(task)["covariates"], study.table_only]
    if study.of_bags:
        truth.append(study.model.features[0])
    if study.table_only:
        truth.append("float32")  # earlier versions kept rows as float16, which ends at 65504
    return sha256(canonical_json([FORMAT, plain(study.preprocess), study.channels, truth])).hexdigest()[:12]


def write_case(path: Path, case: Case, study: Study, make_room: Callable[[int], None]) -> None:
    """Reads, preprocesses and writes one case, whole or not at all; its bytes are told to `make_room` before.

    Raises:
        ImageUnreadable: image or labels that cannot be used.
        OSError: the disk.
    """
    if study.table_only:
        facts, tensors = _row(case, study)
    elif study.of_bags:
        facts, tensors = _bag(case, study)
    else:
        facts, tensors = _image(case, study)
    make_room(sum(tensor.nbytes for tensor in tensors.values()))
    _write(path, tensors, facts)


def _row(case: Case, study: Study) -> tuple[Facts, dict[str, NDArray[Any]]]:
    """A case of which the network sees the table alone: one example, one value for each column."""
    nowhere = Geometry((1, 1, 1), (1.0, 1.0, 1.0), (1,), (0.0,), (1.0,))
    return Facts(nowhere, 0), {
        "images": covariates_of(case, study.task)[None],
        "masks": vector_of(case, study.task)[None],
    }


def _bag(case: Case, study: Study) -> tuple[Facts, dict[str, NDArray[Any]]]:
    """A case that is a bag of feature vectors: one example, of one channel."""
    bag = read_bag(case, study.model.features[0])[None, None]
    nowhere = Geometry((bag.shape[2], bag.shape[3], 1), (1.0, 1.0, 1.0), bag.shape[2:], (0.0, 0.0), (1.0, 1.0))
    return Facts(nowhere, 0), {"images": bag, "masks": vector_of(case, study.task)[None]}


def _image(case: Case, study: Study) -> tuple[Facts, dict[str, NDArray[Any]]]:
    volume = read_case(case, study.channels)
    if study.preprocess.spacing_mm is not None and is_picture(case.channels[0].files[0]):
        raise ImageUnreadable("PNG and JPEG state no pixel size, so spacing_mm cannot be met. Use fit = letterbox")
    if study.preprocess.fit == "patches":
        check_resampled(volume, study.preprocess.spacing_mm)
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess, np.float16)
    tensors: dict[str, NDArray[Any]] = {"images": examples.images}
    if study.task.kind == "detection":
        tensors["native"] = lesions_of(case, volume, study.task)
        masks = of_examples(tensors["native"], examples.geometry)
    else:
        masks = read_truth(case, volume, examples.geometry, study.task)
    tensors["masks"] = masks
    places: list[NDArray[np.int64]] = []
    if study.preprocess.fit == "patches":
        places = _places(masks, len(study.task.labels), examples.geometry.size)
    facts = Facts(
        examples.geometry,
        volume.left_right_axis,
        tuple(len(of) for of in places),
        one_of(volume.modality or "", MODALITIES),
        volume.provenance,
    )
    if places:
        tensors["labelled"] = np.concatenate(places)
    if study.task.tolerance_mm is not None and has_truth(case, study.task):
        if is_picture(case.channels[0].files[0]):
            raise ImageUnreadable("PNG and JPEG state no pixel size, so tolerance_mm means nothing. Leave it out")
        tensors["native"] = read_case_labels(case, volume, study.task.labels)
    return facts, tensors


def open_case(path: Path, key: str) -> Stored | None:
    """The case mapped from its cache file; None if there is no such file, or no whole one."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
        (length,) = struct.unpack("<Q", content[:8].tobytes())
        header = json.loads(content[8 : 8 + length].tobytes())
        tensors = {name: _view(content[8 + length :], entry) for name, entry in header.items() if name[0] != "_"}
        facts = _facts(json.loads(header["__metadata__"]["case"]))
        places = tensors.get("labelled", np.empty(0, np.int64))
        labelled = tuple(np.split(places, np.cumsum(facts.labelled)[:-1])) if facts.labelled else ()
        return Stored(key, tensors["images"], tensors["masks"], facts, labelled, tensors.get("native"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def in_memory(case: Stored) -> Stored:
    labelled = tuple(np.array(places) for places in case.labelled)
    return Stored(case.key, np.array(case.images), np.array(case.masks), case.facts, labelled, case.native)


def _places(masks: NDArray[Any], labels: int, size: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Flat indices in [N, *size] of voxels that have each label, or in which its lesions have their centres."""
    if masks.dtype == np.float32:
        found = centres(masks, size, labels)
    else:
        found = [np.flatnonzero(masks == k + 1) for k in range(labels)]
    return [of[np.linspace(0, len(of) - 1, min(len(of), MOST_PLACES)).astype(np.intp)] for of in found]


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], facts: Facts) -> None:
    """A safetensors file; written here because the library would hold it twice."""
    names = {np.dtype(kind): name for name, kind in TYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # as the format wants them, aligned
    header: dict[str, Any] = {"__metadata__": {"case": canonical_json(facts.plain()).decode()}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor).data)


def _view(data: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    view: NDArray[Any] = data[begin:end].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return view


def _facts(given: dict[str, Any]) -> Facts:
    known = {f.name for f in fields(Facts)}
    if given.keys() != known:
        raise ValueError("facts of another version")
    return Facts(
        geometry_from(given["geometry"]),
        given["left_right_axis"],
        tuple(given["labelled"]),
        given["modality"],
        Provenance(**given["provenance"]),
    )
