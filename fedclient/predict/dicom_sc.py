"""The overlay as a DICOM secondary capture, in a series of its own in the study of its source."""

import highdicom as hd
import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from fedclient.data.dicom_header import text
from fedclient.data.provenance import MEASURED
from fedclient.data.volume import LPS_TO_RAS
from fedclient.predict.case import Prediction
from fedclient.predict.headers import Headers
from fedclient.predict.maker import MAKER, NOTICE, made_by
from shared_models.errors import ImageUnreadable

SERIES = 9103
AXIAL = ("L", "P")
TOWARDS = (("L", "R"), ("P", "A"), ("H", "F"))  # growing and falling along x, y, z of LPS


def capture(prediction: Prediction, headers: Headers, picture: NDArray[np.uint8]) -> Dataset:
    """From uint8[rows, columns, 3]; it refers to the slice that it shows."""
    with made_by():
        made: Dataset = SCImage.from_ref_dataset(
            ref_dataset=headers.first,
            pixel_array=picture,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=AXIAL,
            series_instance_uid=hd.UID(),
            series_number=SERIES,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            series_description=f"AI result, {NOTICE}",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **MAKER,
        )
        made.PatientOrientation = list(orientation(prediction, headers))
        if known := burnt_in(headers):
            made.BurnedInAnnotation = known
        made.Laterality = ""  # type 2C: asked for where no body part is said
        made.DerivationDescription = f"overlay by {prediction.model.stamp}, {NOTICE}"
        shown = _shown(prediction, headers)
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = shown.SOPClassUID, shown.SOPInstanceUID
        made.SourceImageSequence = [reference]
    return made


def burnt_in(headers: Headers) -> str:
    """Whether names stand in the pixels, which the picture repeats: what the source says; our own words name nobody.

    Of a source that does not say, `NO` for kinds of images that bear no writing; and nothing for the others, among them
    ultrasound and screenshots.
    """
    stated = text(headers.first, "BurnedInAnnotation")
    if stated in ("YES", "NO"):
        return stated
    return "NO" if text(headers.first, "Modality") in MEASURED else ""


def orientation(prediction: Prediction, headers: Headers) -> tuple[str, ...]:
    """Where columns and rows of the picture run to in the patient, as viewers write it at its edges.

    That of the slice as it was stored; of planes that were turned, as `views.shown` turns them; of a radiograph what
    its header says, and nothing where it says nothing.
    """
    grid = prediction.grid
    if not grid.measured or grid.voxel_of_pixel is None:
        stated = tuple(headers.first.get("PatientOrientation") or ())
        return stated if len(stated) == 2 else ()
    if not grid.slices_along_k:
        return AXIAL
    lps = LPS_TO_RAS @ grid.affine_ras @ grid.voxel_of_pixel
    nearest = [int(np.abs(lps[:3, n]).argmax()) for n in (0, 1)]
    return tuple(TOWARDS[axis][int(lps[axis, n] < 0)] for n, axis in enumerate(nearest))


def _shown(prediction: Prediction, headers: Headers) -> Dataset:
    grid = prediction.grid
    if len(headers.slices) == grid.shape[2] and grid.slices_along_k and grid.voxel_of_pixel is not None:
        k = prediction.key.k
        return headers.slices[k if grid.voxel_of_pixel[2, 2] > 0 else len(headers.slices) - 1 - k]
    if not headers.slices:
        raise ImageUnreadable("DICOM: a source without slices.", "DICOM_UNREADABLE")
    return headers.slices[0]
