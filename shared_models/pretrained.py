"""Weights from elsewhere as a run's first ones: a local file, pinned by its digest, under torchvision's names.

The file lies at the coordinator, which makes the first weights; no site needs it, and nothing is ever downloaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from shared_models import nets
from shared_models.errors import StudyInvalid
from shared_models.files import file_sha256
from shared_models.study import Study
from shared_models.weights import Array, Arrays

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NAMES = (  # torchvision's DenseNet -> MONAI's
    (re.compile(r"(denselayer\d+)\.(norm|conv)"), r"\1.layers.\2"),
    (re.compile(r"^classifier\."), "class_layers.out."),
)


@dataclass(frozen=True, slots=True)
class Adoption:
    """What became of a file's tensors.

    Attributes:
        weights: of the study's network; where the file has nothing that fits, as its seed has them.
        loaded, missing, mismatched: tensors of the network that the file has, has not, has in another shape.
        strange: tensors of the file that the network has not; its batch statistics are not among them.
    """

    weights: Arrays
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    strange: tuple[str, ...]

    def in_words(self) -> str:
        return (
            f"pretrained weights: {len(self.loaded)} of {len(self.weights)} tensors loaded; "
            f"missing: {_some(self.missing)}; of another shape: {_some(self.mismatched)}; "
            f"not in this network: {_some(self.strange)}"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def first_weights(study: Study, file: Path | None) -> tuple[Arrays, str]:
    """The weights that a run begins with, and a sentence on where they are from (empty: from the seed).

    Raises:
        StudyInvalid: a study that wants a file and none is given, the other way round, another file than it names,
            one that cannot be read, or one that has nothing of the network.
    """
    wanted = study.transfer.sha256
    if not wanted:
        if file is not None:
            raise StudyInvalid(f"{file}: study {study.name!r} starts from its seed. Pin the file in transfer.sha256.")
        return nets.initial_weights(study), ""
    if file is None:
        raise StudyInvalid(f"study {study.name!r}: starts from a weights file. Give its path with --weights.")
    if not file.is_file():
        raise StudyInvalid(f"{file}: there is no such file. Check the path of --weights.")
    if (found := file_sha256(file)) != wanted:
        raise StudyInvalid(f"{file}: its SHA-256 is {found}, the study wants {wanted}. Give the file that it names.")
    tensors, initial = read_tensors(file), nets.initial_weights(study)
    if study.transfer.fresh_head:
        head = nets.head_names(nets.network(study))
        tensors = {name: array for name, array in tensors.items() if _name(name, initial) not in head}
    adopted = adopt(tensors, initial)
    if not adopted.loaded:
        raise StudyInvalid(f"{file}: holds no tensor of {study.model.name}. Choose the network that it was made for.")
    return adopted.weights, adopted.in_words()


def read_tensors(file: Path) -> dict[str, Array]:
    """Named arrays of a safetensors file, or of a PyTorch file of tensors alone.

    Raises:
        StudyInvalid: a file that is neither, or holds more than tensors.
    """
    try:
        held: Any
        if file.suffix == ".safetensors":
            held = load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle, zip and safetensors raise what they like
        raise StudyInvalid(
            f"{file}: is no file of tensors alone ({type(e).__name__}). Save a state_dict, or use safetensors."
        ) from None
    held = held.get("state_dict", held) if isinstance(held, Mapping) else held
    if not isinstance(held, Mapping) or not all(isinstance(t, torch.Tensor) for t in held.values()):
        raise StudyInvalid(f"{file}: is no state_dict. Save `net.state_dict()`.")
    # NumPy has no bf16
    numbers = {name: t.float() if t.is_floating_point() else t for name, t in held.items()}
    return {str(name).removeprefix("module."): t.detach().numpy() for name, t in numbers.items()}


def adopt(found: Mapping[str, Array], initial: Arrays) -> Adoption:
    """`initial` with every tensor of `found` that it has under the same name and in the same shape.

    The first convolution is fitted to another number of channels, so that an image repeated in all of them is answered
    alike: 3 to 1 by the sum, 3 to n by the sum over n.
    """
    renamed = {_name(name, initial): array for name, array in found.items() if not name.endswith(STATISTICS)}
    weights, loaded, mismatched = dict(initial), [], []
    for name, array in initial.items():
        if name not in renamed:
            continue
        fitted = _fitted(renamed[name], array)
        if fitted is None or not np.isfinite(fitted).all():
            mismatched.append(name)
        else:
            weights[name] = fitted.astype(array.dtype)
            loaded.append(name)
    missing = tuple(name for name in initial if name not in renamed)
    return Adoption(weights, tuple(loaded), missing, tuple(mismatched), tuple(sorted(renamed.keys() - initial.keys())))


def _name(name: str, initial: Arrays) -> str:
    if name in initial:
        return name
    for pattern, to in NAMES:
        name = pattern.sub(to, name)
    return name


def _fitted(array: Array, like: Array) -> Array | None:
    if array.shape == like.shape:
        return array
    if array.ndim == like.ndim >= 4 and array.shape[1] == 3 and array.shape[2:] == like.shape[2:]:
        channels = like.shape[1]
        if array.shape[0] == like.shape[0]:
            return np.repeat(array.sum(axis=1, keepdims=True) / channels, channels, axis=1)
    return None
