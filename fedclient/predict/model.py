"""A released network, ready to answer: onnxruntime on a CPU, PyTorch on a GPU.

Without PyTorch a cold start takes two seconds instead of twelve: onnxruntime is imported in 0.5 s, PyTorch with MONAI
in 10.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shared_models.calibration import temperatures_of
from shared_models.errors import WeightsInvalid
from shared_models.study import Study

Engine = Literal["onnxruntime", "torch"]
Through = Callable[[NDArray[Any]], NDArray[np.float32]]


class Released(Protocol):
    """What is needed of a release; `shared_models.release.Release` has it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def study(self) -> Study: ...
    @property
    def weights(self) -> Path: ...
    @property
    def onnx(self) -> Path: ...
    @property
    def fingerprint(self) -> dict[str, Any] | None: ...
    @property
    def calibration(self) -> dict[str, Any] | None: ...
    def content(self, name: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Model:
    """A network that answers, and which one it is.

    Attributes:
        digest: SHA-256 of the release's manifest.
        through: examples [N, C, *size] -> logits float32[N, L, *size].
        engine: what computes it, in words.
        planes: how many 2-D examples it takes at once.
        temperatures: what logits are divided by before they are told as probabilities, one for each output.
    """

    name: str
    version: str
    digest: str
    study: Study
    through: Through = field(repr=False)
    engine: str
    planes: int
    temperatures: NDArray[np.float32] | None = field(repr=False, default=None)
    fingerprint: Mapping[str, Any] | None = field(repr=False, default=None)

    @property
    def stamp(self) -> str:
        """Name, version and the beginning of the digest, for results."""
        return f"{self.name} {self.version} ({self.digest[:12]})"


def load_model(release: Released, device: str = "cpu", threads: int = 0, engine: Engine | None = None) -> Model:
    """The network of a release whose files have been compared with their digests.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.
        threads: of the CPU; 0 for as many as this process may use.
        engine: onnxruntime on a CPU and PyTorch on a GPU, where nothing is said.

    Raises:
        WeightsInvalid: a network that is not the study's, or a device that is not there.
    """
    count = threads or len(os.sched_getaffinity(0))
    chosen: Engine = engine or ("onnxruntime" if device == "cpu" else "torch")
    if chosen == "onnxruntime":
        if device != "cpu":
            raise WeightsInvalid(f"{device}: onnxruntime computes on the CPU here. Leave the engine out for a GPU.")
        through, words = _onnxruntime(release.content(release.onnx.name), count)
        planes = 1  # convolutions of one plane stay in the processor's cache: 10 % faster than 4 at once
    else:
        from fedclient.predict.torch_network import network_on  # 4 to 12 s of imports, for GPUs alone

        through, words = network_on(release.study, release.content(release.weights.name), device, count)
        planes = 1 if device == "cpu" else 16
    return Model(
        name=release.name,
        version=release.version,
        digest=release.digest,
        study=release.study,
        through=through,
        engine=words,
        planes=planes,
        temperatures=temperatures_of(release.study, release.calibration),
        fingerprint=release.fingerprint,
    )


def _onnxruntime(network: bytes, threads: int) -> tuple[Through, str]:
    """From the bytes that were compared: whoever changes the file meanwhile changes nothing."""
    import onnxruntime  # 0.5 s, which a GPU does not need

    from shared_models.onnx_session import cpu_session

    try:
        session = cpu_session(network, threads)
    except Exception as e:  # its own tree of errors, none of them public
        raise WeightsInvalid(f"model.onnx of the release: onnxruntime refuses it ({type(e).__name__}).") from None
    name = session.get_inputs()[0].name  # `image`, or `table` where none is seen

    def through(images: NDArray[Any]) -> NDArray[np.float32]:
        try:
            (found,) = session.run(["logits"], {name: np.ascontiguousarray(images, dtype=np.float32)})
        except Exception as e:
            raise WeightsInvalid(f"model.onnx of the release: it cannot be run ({type(e).__name__}).") from None
        answer: NDArray[np.float32] = found
        return answer

    return through, f"onnxruntime {onnxruntime.__version__}, CPU, {threads} threads"
