"""What a released MONAI bundle does around its network: from voxels to examples, and the answers back onto the voxels.

A copy of this file and of preprocess.py lies in the bundle's `scripts`, so that MONAI's runner needs MONAI, numpy and
scipy alone. Our own commands never run what lies in a release; they run what is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from .preprocess import Geometry, preprocess, restore

Data = dict[str, Any]
KINDS = ("nii", "mha", "mhd", "nrrd", "nhdr", "hdr", "img", "dcm", "png", "jpg", "jpeg", "bmp", "tif", "tiff")
REMEMBERED = 100_000  # names of images; what serves for years forgets the oldest


class Preprocessed:
    """`image` [C, I, J, K] (or [C, I, J], a picture) becomes its examples float32[N, C, *size], by the study's plan.

    `place` [6 + 3 * dims] keeps where they lie, `affine` and `source` what the image says of itself; with `by_folder` a
    case is called after the folder that its channels lie in.
    """

    def __init__(self, plan: Mapping[str, Any], by_folder: bool = False) -> None:
        self.by_folder = by_folder
        self.plan: Any = SimpleNamespace(**{k: tuple(v) if isinstance(v, list) else v for k, v in plan.items()})

    def __call__(self, data: Data) -> Data:
        image = data["image"]
        affine = np.asarray(getattr(image, "affine", np.eye(4)), dtype=np.float64)
        voxels = np.asarray(image, dtype=np.float32)
        voxels = voxels[..., None] if voxels.ndim == 3 else voxels
        mm = [float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)]
        examples = preprocess(voxels, (mm[0], mm[1], mm[2]), self.plan)
        at = examples.geometry
        place = [*at.shape, *at.spacing_mm, *at.size, *at.start, *at.step]
        source = Path(str(getattr(image, "meta", {}).get("filename_or_obj", "image")))
        named = f"{source.parent}.nii.gz" if self.by_folder else str(source)
        told = {"place": torch.tensor(place, dtype=torch.float64), "affine": torch.from_numpy(affine), "source": named}
        return {**data, "image": torch.from_numpy(examples.images), **told}


class ByCase:
    """Shows the network the examples of one case as a batch; `inner` is one of MONAI's inferers."""

    def __init__(self, inner: Callable[..., torch.Tensor]) -> None:
        self.inner = inner

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **words: Any) -> Any:
        return torch.stack([self.inner(case, network, *args, **words) for case in inputs])


class Tempered:
    """`pred`, logits [N, L], is divided by a temperature for each output, as the release has them fitted."""

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.temperatures = torch.tensor(list(temperatures), dtype=torch.float32)

    def __call__(self, data: Data) -> Data:
        return {**data, "pred": data["pred"] / self.temperatures.to(data["pred"])}


class Restored:
    """`pred`, probabilities [N, L, *size], comes onto the image's own grid: [L, I, J, K] with its affine and name."""

    def __init__(self) -> None:
        self.taken: dict[str, str] = {}

    def __call__(self, data: Data) -> Data:
        place = [float(number) for number in data["place"]]
        dims = (len(place) - 6) // 3
        sizes = [int(n) for n in place[:3]]
        at = Geometry(
            (sizes[0], sizes[1], sizes[2]),
            (place[3], place[4], place[5]),
            tuple(int(n) for n in place[6 : 6 + dims]),
            tuple(place[6 + dims : 6 + 2 * dims]),
            tuple(place[6 + 2 * dims :]),
        )
        native = restore(np.asarray(data["pred"].cpu(), dtype=np.float32), at)
        meta = {"filename_or_obj": f"{_case_name(data['source'], self.taken)}.nii.gz"}
        return {**data, "pred": MetaTensor(torch.from_numpy(native), affine=data["affine"], meta=meta)}


class Told:
    """Writes one answer for each case as OUT/NAME.json: the mean over its examples, by the names of the outputs.

    `survival`: `pred` are the hazards of intervals, and what is told is the chance to live past the end of each.
    """

    def __init__(self, out: str, names: Sequence[str], survival: bool = False) -> None:
        self.out, self.names, self.survival = Path(out), list(names), survival
        self.taken: dict[str, str] = {}

    def __call__(self, data: Data) -> Data:
        chances = np.asarray(data["pred"].cpu(), dtype=np.float64)
        chances = np.cumprod(1 - chances, axis=1, dtype=np.float64) if self.survival else chances
        self.out.mkdir(parents=True, exist_ok=True)
        name = _case_name(data["source"], self.taken)
        told = dict(zip(self.names, chances.mean(axis=0).tolist(), strict=True))
        (self.out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        return data


def _case_name(source: str, taken: dict[str, str]) -> str:
    """The name of a file without `.gz` and the suffix of an image, which joins `taken`: name -> source.

    Names hold dots: a UID has a dozen. The same image may come again, and its answer is written anew.

    Raises:
        ValueError: another image has it.
    """
    name = Path(source).name
    name = name[:-3] if name.lower().endswith(".gz") else name
    stem, _, kind = name.rpartition(".")
    name = stem if stem and kind.lower() in KINDS else name
    earlier = taken.setdefault(name, source)
    if earlier != source:
        apart = "lies in another folder" if Path(earlier).name == Path(source).name else "has another suffix"
        raise ValueError(
            f"{source}: an earlier image of the same name {apart}, and its answer would be overwritten. "
            "Rename one of the two, or run them apart, each with an output folder of its own."
        )
    if len(taken) > REMEMBERED:
        del taken[next(iter(taken))]
    return name
