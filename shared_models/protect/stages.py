"""What is done to every update on its way out of a site and undone on its way in: clip, compress, mask; in that order.

    delta + what the last rounds left over -> clip to a length -> compress -> wire -> dense again -> mean
    delta -> clip to a length -> mask (shared_models/protect/ring.py)      -> wire -> sum

No stage after the clip lengthens an update: rounding is towards zero. What compression cuts off is no part of the model
yet, so the site remembers it and adds it to its next update (error feedback: Seide et al. 2014, section 3.1; Stich et
al. 2018, Algorithm 1). No part of this is a privacy guarantee: clips and compression hide nobody.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from shared_models.errors import UpdateRejected
from shared_models.weights import BLOCK, Array, Arrays, Schema, Spec, Tensors, difference, one

if TYPE_CHECKING:
    from shared_models.protect.privacy import Protect
    from shared_models.study import Study

Compression: TypeAlias = Literal["none", "fp16", "int8", "top_k"]
RESIDUAL = "residual/"  # what a site remembers of a tensor, by its name
VALUES, SCALE, PLACES = "v/", "s/", "i/"  # parts of a compressed tensor, before its name
SHARE = 0.01  # of a tensor's elements, where top_k is not given
LEVELS = 127  # of int8, on each side of 0
LARGEST = 2.0**15  # to which, or up to twice that, the largest element of a tensor is scaled for fp16
MOST = 65504.0  # of fp16
SMALLEST = 2.0**-126  # scale that float32 holds in full; what is below it stays with the residual


def check_stages(study: "Study") -> None:
    """Raises ValueError, naming the reason, for stages that are not sound together."""
    protect = study.protect
    if protect.top_k is not None and protect.compression != "top_k":
        raise ValueError(f'protect.top_k is for compression = "top_k", which is "{protect.compression}"')
    squeezed = protect.compression != "none"
    for broken, words in (
        (
            squeezed and protect.secure_aggregation is not None,
            f'protect.compression = "{protect.compression}" with secure_aggregation: a masked vector is as long as its '
            f"ring and shows no zeros, or the masks would not cancel; secure_aggregation.ring_bits = 24 sends less",
        ),
        (
            squeezed and study.train.scaffold,
            "protect.compression with train.scaffold: what is cut off a control variate would be corrected for twice",
        ),
        (
            squeezed and study.rounds.late == "next",
            f'protect.compression = "{protect.compression}" with rounds.late = "next": an update that is counted late '
            f"and the one after it both hold what was cut off before them, which would count twice",
        ),
        (
            protect.compression == "top_k" and study.strategy.robust not in ("none", "norm_bound"),
            f'protect.compression = "top_k" with strategy.robust = "{study.strategy.robust}": of each weight most '
            f"sites send nothing, which the rule would take for their word",
        ),
        (
            protect.clip_norm is not None and protect.privacy is not None,
            "protect.clip_norm with protect.privacy: each patient is clipped before the noise, clipping an update "
            "after it would only bias it",
        ),
        (
            protect.clip_norm is not None and study.train.scaffold,
            "protect.clip_norm with train.scaffold: the control variates travel with the update, and one length "
            "bounds both",
        ),
    ):
        if broken:
            raise ValueError(words)


def outgoing(protect: "Protect", delta: Arrays, residual: Arrays) -> tuple[Arrays, dict[str, Array]]:
    """An update as it leaves, and what the site remembers of it, both by their names on the wire and on disk.

    Args:
        residual: what was remembered of the last update that was counted; empty where none was.
    """
    compress = protect.compression != "none"
    if compress:
        delta = {name: _with(a, residual.get(RESIDUAL + name)) for name, a in delta.items()}
    if protect.clip_norm is not None:
        delta = clipped(delta, protect.clip_norm)
    if not compress:
        return delta, {}
    sent, left = {}, {}
    for name, array in delta.items():
        if array.dtype.kind != "f":
            sent[VALUES + name] = array
            continue
        parts, dense = _squeezed(array, protect)
        sent |= {kind + name: part for kind, part in parts.items()}
        left[RESIDUAL + name] = array - dense
    return sent, left


def _with(array: Array, residual: Array | None) -> Array:
    return array if residual is None or array.dtype.kind != "f" else array + residual


def clipped(delta: Arrays, norm: float) -> dict[str, Array]:
    """All float tensors shortened together to a Euclidean length of `norm`, where they are longer."""
    parts = [a.astype(np.float64).reshape(-1) for a in delta.values() if a.dtype.kind == "f"]
    length = float(np.sqrt(sum(float(p @ p) for p in parts)))
    if length <= norm:
        return dict(delta)
    shorter = norm / length * (1 - 2.0**-20)  # what rounding to float32 may add
    return {n: (a * shorter).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in delta.items()}


def _squeezed(array: Array, protect: "Protect") -> tuple[dict[str, Array], Array]:
    """The parts of a compressed tensor, and what they are dense again."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if protect.compression == "top_k":
        kept = kept_of(flat.size, protect)
        places = np.sort(np.argpartition(np.abs(flat), flat.size - kept)[flat.size - kept :]) if flat.size else flat
        values, dense = flat[places.astype(np.int64)].astype(np.float32), np.zeros_like(flat)
        dense[places.astype(np.int64)] = values
        return {VALUES: values, PLACES: places.astype(np.int32)}, dense.reshape(array.shape)
    largest = float(np.abs(flat).max(initial=0.0))
    if protect.compression == "int8":
        scale = np.float32(max(largest / LEVELS, SMALLEST)) if largest else np.float32(1)
        values = np.clip(np.trunc(flat / scale), -LEVELS, LEVELS).astype(np.int8)
    else:
        scale = np.float32(max(2.0 ** np.floor(np.log2(largest / LARGEST)), SMALLEST)) if largest else np.float32(1)
        values = towards_zero(flat / scale)
    dense = (values.astype(np.float32) * scale).astype(array.dtype)
    return {VALUES: values.reshape(array.shape), SCALE: np.array([scale], np.float32)}, dense.reshape(array.shape)


def towards_zero(numbers: Array) -> Array:
    """float16, none of them further from zero than it was."""
    halves = np.clip(numbers, -MOST, MOST).astype(np.float16)
    longer = np.abs(halves.astype(np.float64)) > np.abs(numbers.astype(np.float64))
    return np.where(longer, np.nextafter(halves, np.float16(0)), halves).astype(np.float16)


def kept_of(size: int, protect: "Protect") -> int:
    """How many elements of a tensor travel."""
    return min(size, max(1, ceil(size * (SHARE if protect.top_k is None else protect.top_k))))


def on_the_wire(protect: "Protect", schema: Schema) -> Schema:
    """Names, shapes and dtypes of what `outgoing` gives for an update of `schema`."""
    if protect.compression == "none":
        return schema
    found: dict[str, Spec] = {}
    for name, spec in schema.items():
        if spec.dtype.kind != "f":
            found[VALUES + name] = spec
        elif protect.compression == "top_k":
            kept = kept_of(prod(spec.shape), protect)
            found |= {VALUES + name: Spec((kept,), np.dtype(np.float32))}
            found |= {PLACES + name: Spec((kept,), np.dtype(np.int32))}
        else:
            values = np.dtype(np.int8 if protect.compression == "int8" else np.float16)
            found |= {VALUES + name: Spec(spec.shape, values), SCALE + name: Spec((1,), np.dtype(np.float32))}
    return found


def incoming(protect: "Protect", sent: Tensors, schema: Schema, where: str) -> Tensors:
    """An update as it arrived, as tensors of `schema` that are made dense block by block.

    Raises:
        UpdateRejected: `UPDATE_SCHEMA`, other names, shapes or dtypes than such an update has; or `UPDATE_RANGE`,
            places or a scale that are none.
    """
    if protect.compression == "none":
        return sent
    if problem := difference(on_the_wire(protect, schema), sent.schema):
        raise UpdateRejected(
            "UPDATE_SCHEMA", f"{where}: {problem}. Site and coordinator must run the same released version."
        )
    return Dense(sent, schema, where)


@dataclass(frozen=True, slots=True)
class Dense:
    """A compressed update as `Tensors`."""

    sent: Tensors
    schema: Schema
    where: str

    def blocks(self, name: str) -> Iterator[Array]:
        spec = self.schema[name]
        if spec.dtype.kind != "f":
            yield from self.sent.blocks(VALUES + name)
        elif PLACES + name in self.sent.schema:
            yield from self._sparse(name, prod(spec.shape))
        else:
            scale = float(one(self.sent, SCALE + name)[0])
            if not 0 < scale < 1e30:
                raise UpdateRejected("UPDATE_RANGE", f"{self.where}: the scale of {name!r} is {scale:g}.")
            for block in self.sent.blocks(VALUES + name):
                yield (block.astype(np.float32) * np.float32(scale)).astype(spec.dtype)

    def _sparse(self, name: str, size: int) -> Iterator[Array]:
        places, values = one(self.sent, PLACES + name).astype(np.int64), one(self.sent, VALUES + name)
        if places.size and (places[0] < 0 or places[-1] >= size or (np.diff(places) <= 0).any()):
            raise UpdateRejected("UPDATE_RANGE", f"{self.where}: places of {name!r} do not rise within the tensor.")
        for at in range(0, size, BLOCK):
            block = np.zeros(min(BLOCK, size - at), self.schema[name].dtype)
            low, high = np.searchsorted(places, [at, at + block.size])
            block[places[low:high] - at] = values[low:high]
            yield block
