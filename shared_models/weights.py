"""Weights as named arrays: what they must look like, and safetensors files written and read in flat memory.

The safetensors library holds the whole file twice while saving (237 MiB more for 124 MiB of weights) and maps it whole
while loading. The coordinator folds files of many sites in the memory of one, so the few lines of the format are here:
8 bytes little-endian header length, JSON header, then the tensors without holes. Files are the library's, bit for bit
readable both ways (tests/test_weights.py).
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import WeightsInvalid
from shared_models.files import canonical_json, file_sha256, replacing

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]

NO_WEIGHTS = "0" * 64  # in place of a digest while there are none: a federated plan is made before the network
BLOCK = 1 << 20  # elements handled at once: 4 MiB of float32 stays in the cache
_CODES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
_NAMES = {np.dtype(code): name for name, code in _CODES.items()}
_MOST_HEADER = 8 << 20


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Schema: TypeAlias = Mapping[str, Spec]


class Tensors(Protocol):
    """Named tensors that can be read in blocks, wherever they are."""

    @property
    def schema(self) -> Schema: ...

    def blocks(self, name: str) -> Iterator[Array]:
        """The elements of one tensor in C order, as one-dimensional arrays of at most `BLOCK` elements."""
        ...


def schema_of(arrays: Arrays) -> Schema:
    return {name: Spec(a.shape, a.dtype) for name, a in arrays.items()}


def schema_sha256(schema: Schema) -> str:
    """One digest for names, shapes and dtypes; two sides with the same digest run the same architecture."""
    listed = [[name, list(spec.shape), spec.dtype.str] for name, spec in sorted(schema.items())]
    return hashlib.sha256(canonical_json(listed)).hexdigest()


def size_bytes(schema: Schema) -> int:
    return sum(spec.size_bytes for spec in schema.values())


def difference(expected: Schema, found: Schema) -> str | None:
    """What is wrong with `found`, naming the first tensor, or None."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"tensor {name!r} is missing"
        if name not in expected:
            return f"tensor {name!r} is not in the model"
        want, have = expected[name], found[name]
        if want.shape != have.shape:
            return f"{name!r} has shape {list(have.shape)}, the model has {list(want.shape)}"
        if want.dtype != have.dtype:
            return f"{name!r} is {have.dtype}, the model has {want.dtype}"
    return None


@dataclass(frozen=True, slots=True)
class InMemory:
    """Arrays as `Tensors`."""

    arrays: Arrays

    @property
    def schema(self) -> Schema:
        return schema_of(self.arrays)

    def blocks(self, name: str) -> Iterator[Array]:
        flat = np.ascontiguousarray(self.arrays[name]).reshape(-1)
        for start in range(0, flat.size, BLOCK):
            yield flat[start : start + BLOCK]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A safetensors file as `Tensors`: header read and doubted, tensors left on disk."""

    path: Path
    schema: Schema
    offsets: Mapping[str, int]  # of each tensor from the start of the file, bytes

    def blocks(self, name: str) -> Iterator[Array]:
        left = int(np.prod(self.schema[name].shape, dtype=np.int64))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offsets[name])
            while left:
                block = self._next(file, name, min(left, BLOCK))
                left -= block.size
                yield block

    def part(self, name: str, start: int, count: int) -> Array:
        """Elements `start` to `start + count` of one tensor in C order; fewer where it ends before."""
        spec = self.schema[name]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offsets[name] + start * spec.dtype.itemsize)
            return self._next(file, name, max(0, min(count, prod(spec.shape) - start)))

    def _next(self, file: IO[bytes], name: str, count: int) -> Array:
        block = np.empty(count, self.schema[name].dtype)
        view = block.data.cast("B")
        while view:  # a read may come short
            got = file.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise WeightsInvalid(f"{self.path.name}: ends within {name!r}. The file was cut: fetch it again.")
            view = view[got:]
        return block


def open_tensors(path: Path, where: str) -> OnDisk:
    """Opens a safetensors file without loading it.

    Raises:
        WeightsInvalid: not such a file, unknown dtype, holes, overlaps, or another length than its header says.
    """
    with path.open("rb") as file:
        schema, offsets = _read_header(file, os.fstat(file.fileno()).st_size, where)
    return OnDisk(path, schema, offsets)


def _read_header(file: IO[bytes], length: int, where: str) -> tuple[Schema, Mapping[str, int]]:
    """What tensors a safetensors file of `length` bytes holds, and where each begins.

    Raises:
        WeightsInvalid: as `open_tensors`.
    """
    refuse = f"{where}: not a sound safetensors file"
    head = int.from_bytes(file.read(8), "little")
    if length < 8 or not 2 <= head <= min(_MOST_HEADER, length - 8):
        raise WeightsInvalid(f"{refuse}: its header length is {head} of {length} bytes.")
    try:
        header: dict[str, Any] = json.loads(file.read(head))
        header.pop("__metadata__", None)
        entries: list[tuple[int, int, str, str, tuple[int, ...]]] = sorted(
            (
                _sizes(e["data_offsets"], 2, 2)[0],
                _sizes(e["data_offsets"], 2, 2)[1],
                n,
                _CODES[e["dtype"]],
                _sizes(e["shape"], 0, 16),
            )
            for n, e in header.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsInvalid(f"{refuse}: its header cannot be read, or names a dtype that is not allowed.") from None
    schema, offsets, at = {}, {}, 0
    for begin, end, name, code, shape in entries:
        spec = Spec(shape, np.dtype(code))
        if begin != at or min(shape, default=1) < 0 or end - begin != spec.size_bytes:
            raise WeightsInvalid(f"{refuse}: {name!r} overlaps another tensor, leaves a hole or has the wrong length.")
        schema[name], offsets[name], at = spec, 8 + head + begin, end
    if 8 + head + at != length:
        raise WeightsInvalid(f"{refuse}: it holds {length} bytes, its header accounts for {8 + head + at}.")
    return schema, offsets


def _sizes(numbers: Any, fewest: int, most: int) -> tuple[int, ...]:
    """Whole numbers from a header as they are: a float, a bool, a text or 2**70 is no size."""
    if not isinstance(numbers, list) or not fewest <= len(numbers) <= most:
        raise ValueError("not a list of sizes")
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError("not a size")
    return tuple(numbers)


def load(path: Path, where: str | None = None) -> dict[str, Array]:
    """All tensors of a file in memory, by name."""
    tensors = open_tensors(path, where or path.name)
    return {name: one(tensors, name) for name in tensors.schema}


def loaded(content: bytes, where: str) -> dict[str, Array]:
    """All tensors of a safetensors file whose bytes are in memory already, as copies that may be changed.

    Raises:
        WeightsInvalid: as `open_tensors`.
    """
    schema, offsets = _read_header(io.BytesIO(content), len(content), where)
    return {n: np.frombuffer(content, s.dtype, prod(s.shape), offsets[n]).reshape(s.shape).copy()
            for n, s in schema.items()}  # fmt: skip


def mapped(path: Path, where: str | None = None) -> dict[str, Array]:
    """All tensors of a file as views of it, read when they are touched; a change to them stays in memory.

    Half the time of `load` and no memory of its own. For a file that nobody writes to while the arrays live; it may be
    removed or replaced.
    """
    tensors = open_tensors(path, where or path.name)
    content = np.memmap(path, np.uint8, mode="c")
    views = {n: np.ndarray(s.shape, s.dtype, content, tensors.offsets[n]) for n, s in tensors.schema.items()}
    return {name: view if view.flags.aligned else view.copy() for name, view in views.items()}


def one(tensors: Tensors, name: str) -> Array:
    """One tensor, whole."""
    spec = tensors.schema[name]
    whole = np.empty(spec.shape, spec.dtype)
    flat, at = whole.reshape(-1), 0
    for block in tensors.blocks(name):
        flat[at : at + block.size] = block
        at += block.size
    return whole


def save(path: Path, schema: Schema, arrays: Iterator[tuple[str, Array]], synced: bool = True) -> str:
    """Writes a safetensors file, one tensor in memory at a time, and returns its SHA-256.

    Args:
        arrays: (name, array) of every tensor of `schema`, in any order; equal content has equal bytes whatever the
            order, because the file is laid out by name.
        synced: waits for the disk. Without it a power cut may leave the file torn under its own name: for a file whose
            digest is compared before it is used again.

    Raises:
        WeightsInvalid: a tensor that is not as `schema` says, or missing.
    """
    header, at = {}, 0
    starts: dict[str, int] = {}
    for name in sorted(schema):
        spec = schema[name]
        header[name] = {
            "dtype": _NAMES[spec.dtype.newbyteorder("<")],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.size_bytes],
        }
        starts[name], at = at, at + spec.size_bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the library aligns the tensors to 8 bytes
    digest = hashlib.sha256()
    with replacing(path, synced) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        base, in_order, written = file.tell(), True, 0
        digest.update(len(head).to_bytes(8, "little") + head)
        missing = set(schema)
        for name, array in arrays:
            if problem := difference({name: schema[name]} if name in schema else {}, schema_of({name: array})):
                raise WeightsInvalid(f"{path.name}: {problem}. Both sides must run the same version.")
            raw = np.ascontiguousarray(array).reshape(-1).data.cast("B") if array.size else memoryview(b"")
            in_order = in_order and starts[name] == written
            file.seek(base + starts[name])
            file.write(raw)
            if in_order:
                digest.update(raw)
            written += len(raw)
            missing.discard(name)
            del array, raw  # the next one is made before these names would be given to it
        if missing:
            raise WeightsInvalid(f"{path.name}: {sorted(missing)[:3]} were not given. Nothing was written.")
    return digest.hexdigest() if in_order else file_sha256(path)


def save_arrays(path: Path, arrays: Arrays, synced: bool = True) -> str:
    """`save` of arrays that are in memory anyway."""
    return save(path, schema_of(arrays), iter(sorted(arrays.items())), synced)
