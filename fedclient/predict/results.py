"""Results that are no DICOM: masks as NIfTI or PNG on the source's own grid, facts as JSON, rows of a table."""

import gzip
import io
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedclient.data.nifti import stored_grid
from fedclient.data.volume import turn_to_ras
from fedclient.predict.case import Answer, Prediction, painting_order
from fedclient.predict.maker import NOTICE
from shared_models.files import replacing, write_atomic

LISTED = 100  # parts of an answer in JSON


def write_mask(prediction: Prediction, path: Path) -> None:
    """uint8 labels, 0 and n + 1 for answer n, on the grid of the source; a picture's as PNG, a volume's as .nii.gz."""
    marks = prediction.marks
    assert marks is not None
    order = painting_order(prediction.model.study)
    if prediction.grid.picture:
        write_png(path, marks.label_plane(0, order))
    else:
        _nifti(prediction, path, (marks.label_plane(k, order) for k in range(len(marks))), 1.0)


def write_map(prediction: Prediction, path: Path) -> None:
    """The map of uncertainty: bytes that the header scales to 0 to 1; a picture's as PNG of 0 to 255."""
    found = prediction.uncertainty
    assert found is not None
    assert found.planes is not None
    if prediction.grid.picture:
        write_png(path, found.planes[0])
    else:
        _nifti(prediction, path, (found.planes[k] for k in range(len(found.planes))), 1 / 255)


def facts(prediction: Prediction) -> dict[str, Any]:
    """For JSON: all that is told of a case; no name of a patient or a file."""
    model, grid, unsure = prediction.model, prediction.grid, prediction.uncertainty
    source = prediction.source
    return {
        "notice": NOTICE,
        "release": {"name": model.name, "version": model.version, "sha256": model.digest},
        "engine": model.engine,
        "study": model.study.name,
        "task": model.study.task.kind,
        "case": None if source is None else source.name,
        "series_uid": source.series.uid if source is not None and source.series is not None else None,
        "shape": list(grid.shape),
        "spacing_mm": None if not grid.measured else list(grid.spacing_mm),
        "affine_ras": None if grid.picture else grid.affine_ras.tolist(),
        "labels": {str(n): name for n, name in enumerate(model.study.task.answers, start=1)}
        if prediction.marks is not None
        else None,
        "answers": [_told(each, grid.measured) for each in prediction.answers],
        "calibrated": model.temperatures is not None,
        "doubts": [asdict(each) for each in prediction.doubts],
        "uncertainty": None
        if unsure is None
        else {
            "method": "test-time augmentation: entropy of the mean answer to changed pictures; 0 is sure, 1 is not",
            "changes": list(unsure.variants),
            "mean": unsure.mean,
            "mean_inside": unsure.inside,
        },
        "seconds": round(prediction.seconds, 3),
    }


def rows(prediction: Prediction) -> list[dict[str, Any]]:
    """A row of the table for each answer."""
    unsure = prediction.uncertainty
    shared = {
        "status": "ok",
        "doubts": " ".join(each.code for each in prediction.doubts),
        "uncertainty": "" if unsure is None else f"{unsure.mean:.6f}",
        "release": prediction.model.stamp,
        "seconds": f"{prediction.seconds:.3f}",
    }
    return [shared | _row(each, prediction.grid.measured) for each in prediction.answers]


def _row(answer: Answer, measured: bool) -> dict[str, Any]:
    sized = answer.volume_mm3 is not None and measured
    return {
        "answer": answer.name,
        "called": int(answer.called),
        "chance": f"{answer.chance:.6f}",
        "volume_ml": f"{(answer.volume_mm3 or 0.0) / 1000:.6f}" if sized else "",
        "longest_axial_mm": f"{answer.longest_mm:.3f}" if sized and answer.longest_mm is not None else "",
        "parts": len(answer.parts) if answer.volume_mm3 is not None else "",
    }


def _told(answer: Answer, measured: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"name": answer.name, "called": answer.called, "chance": answer.chance}
    if answer.by_day:
        told["by_day"] = {f"{day:g}": chance for day, chance in answer.by_day.items()}
    if answer.volume_mm3 is None:
        return told
    if not measured:  # a picture or a radiograph, of which nobody knows how large a pixel is
        return told | {"pixels": sum(part.voxels for part in answer.parts), "parts": len(answer.parts)}
    told |= {"volume_mm3": answer.volume_mm3, "longest_axial_mm": answer.longest_mm, "parts": len(answer.parts)}
    told["largest"] = [
        {"volume_mm3": part.volume_mm3, "longest_axial_mm": part.longest_mm, "planes": [part.first, part.last]}
        for part in answer.parts[:LISTED]
    ]
    return told


def write_png(path: Path, plane: NDArray[np.uint8]) -> None:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(plane)).save(content, "PNG")
    write_atomic(path, content.getvalue())


def _nifti(prediction: Prediction, path: Path, planes: Iterable[NDArray[np.uint8]], slope: float) -> None:
    """Plane by plane, in RAS+; from a NIfTI file turned back to how it lies there."""
    grid, source = prediction.grid, prediction.source
    shape, affine = grid.shape, grid.affine_ras
    if source is not None and source.kind == "nifti":
        stored, affine = stored_grid(source.files[0])
        turn = turn_to_ras(affine, stored)
        whole = np.stack(list(planes), axis=2).transpose(np.argsort(turn.axes))
        whole = whole[tuple(slice(None, None, flip) for flip in turn.flips)]
        shape = (whole.shape[0], whole.shape[1], whole.shape[2])
        planes = (whole[:, :, k] for k in range(shape[2]))
    make: Any = nibabel.Nifti1Header  # has no types
    header = make()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["descrip"] = f"{prediction.model.name} {prediction.model.version}, {NOTICE}"[:79].encode()
    header["magic"], header["vox_offset"] = b"n+1\0", 352
    with replacing(path) as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write(header.binaryblock + bytes(4))
        for plane in planes:
            packed.write(np.ascontiguousarray(plane.T).tobytes())
