"""What DICOM results say of who made them: this software, the release, and never a person."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import highdicom as hd
from pydicom.sr.codedict import codes

from fedclient.predict.model import Model
from shared_models.errors import ImageUnreadable

NOTICE = "not for diagnosis"
MAKER: dict[str, Any] = {
    "manufacturer": "fedimaging",
    "manufacturer_model_name": "fedclient predict",
    "software_versions": version("fedimaging"),
}


def algorithm(model: Model) -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(
        name=model.name[:64],
        family=codes.DCM.ArtificialIntelligence,
        version=model.version[:64],
        source="fedimaging",
        parameters={"release_sha256": model.digest, "engine": model.engine},
    )


@contextmanager
def made_by() -> Iterator[None]:
    """What highdicom finds wanting in the source's header, as one of our errors: it quotes values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (AttributeError, ValueError, TypeError, LookupError) as e:
            raise ImageUnreadable(
                f"DICOM: the header of the source does not bear a result ({type(e).__name__}). Ask for --format "
                f"nifti,json instead, or export the series again.",
                "DICOM_UNREADABLE",
            ) from None
