"""DICOM files for tests, written by pydicom (and recoded by gdcm), and a second opinion on what they hold."""

import struct
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fedclient.data.volume import LPS_TO_RAS, Volume

ROWS, COLUMNS, SLICES = 10, 8, 6
SPACING_MM = (0.7, 0.8)  # between rows, between columns
STEP_MM = 2.5
ORIGIN_MM = (-30.5, -20.25, 100.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
NAME = "Doe^Jane^MRN4711"  # stands in every file made here, and must get out of none
Edit = Callable[[int, Dataset], object]


def stored_pixels(k: int, rows: int = ROWS, columns: int = COLUMNS) -> NDArray[np.int16]:
    """Different everywhere, and asymmetric, between 0 and 4095."""
    grid = np.arange(rows * columns).reshape(rows, columns) * 47 + k * 131
    return (grid % 4096).astype(np.int16)


def slice_of(k: int, cosines: Sequence[float] = AXIAL, position_mm: Sequence[float] | None = None) -> Dataset:
    """Slice `k` of a CT series, unsigned 12 bits, little endian; at its place along the normal if no other is given."""
    normal = np.cross(cosines[:3], cosines[3:])
    where = np.array(ORIGIN_MM) + normal * STEP_MM * k if position_mm is None else np.array(position_mm)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = UID(f"1.2.826.0.1.3680043.9.1.{k + 1}")
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Modality, data.PatientName, data.PatientID = "CT", NAME, "MRN4711"
    data.Manufacturer, data.ManufacturerModelName = "SIEMENS", "SOMATOM Force of Dr. Doe"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.826.0.1.3680043.9.2", "1.2.826.0.1.3680043.9.3"
    data.FrameOfReferenceUID = "1.2.826.0.1.3680043.9.4"
    data.SliceThickness, data.KVP, data.ConvolutionKernel = "3", "120", ["Br40d", "3"]
    data.BodyPartExamined, data.PatientPosition, data.GantryDetectorTilt = "CHEST", "HFS", "0"
    data.InstanceNumber, data.AcquisitionNumber = str(100 - k), "1"
    data.ImagePositionPatient = [f"{mm:.10g}" for mm in where]
    data.ImageOrientationPatient = [f"{cosine:.10g}" for cosine in cosines]
    data.PixelSpacing = list(SPACING_MM)
    data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
    set_pixels(data, stored_pixels(k).astype(np.uint16), bits=12)
    return data


def set_pixels(data: Dataset, values: NDArray[Any], bits: int) -> Dataset:
    """[rows, columns] or [frames, rows, columns]."""
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = values.itemsize * 8, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    data["PixelData"].VR = "OB" if values.itemsize == 1 else "OW"
    return data


def with_empty_items(path: Path, count: int, group: int = 8) -> Path:
    """A slice with a sequence of no stated length, and so many items, at the begin of a group."""
    content = write(path, slice_of(0)).read_bytes()
    at = content.index(b"\x02\0\x02\0UI" if group == 2 else b"\x08\0\x08\0CS")
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * count + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    sequence = struct.pack("<HH2sHL", group, 1 if group == 2 else 6, b"SQ", 0, 0xFFFFFFFF)
    path.write_bytes(content[:at] + sequence + items + content[at:])
    return path


def write(path: Path, data: Dataset, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """Uncompressed, deflated or big-endian; `data` is always given in little endian."""
    data.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian and data.BitsAllocated == 16:
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
    data.save_as(
        path,
        enforce_file_format=True,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
    )
    return path


def write_series(
    folder: Path, slices: int = SLICES, *, edit: Edit | None = None, cosines: Sequence[float] = AXIAL
) -> list[Path]:
    """A series under names that sort in no sensible order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(slices):
        data = slice_of(k, cosines)
        if edit is not None:
            edit(k, data)
        paths.append(write(folder / f"{(k * 7) % 11:02d}-{k}", data))
    return paths


def putting(keyword: str, value: object, slices: Container[int] = range(99)) -> Edit:
    """Sets an element of some slices."""

    def edit(k: int, data: Dataset) -> None:
        if k in slices:
            setattr(data, keyword, value)

    return edit


def without(keyword: str, slices: Container[int] = range(99)) -> Edit:
    """Takes an element out of some slices."""

    def edit(k: int, data: Dataset) -> None:
        if k in slices:
            delattr(data, keyword)

    return edit


def recode(path: Path, syntax: UID) -> Path:
    """The file in another transfer syntax, by gdcm, in place; all that is not pixels stays as pydicom wrote it."""
    import gdcm  # has no types

    coded = path.with_name("coded")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(coded))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    data, pixels = dcmread(path), dcmread(coded)
    data["PixelData"] = pixels["PixelData"]
    if "LossyImageCompression" in pixels:
        data.LossyImageCompression = pixels.LossyImageCompression
    coded.unlink()
    return write(path, data, syntax)


def item(**elements: object) -> Items:
    data = Dataset()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return Items([data])


def second_opinion(paths: Sequence[Path]) -> SimpleITK.Image:
    """What ITK makes of slices in the given order, or of one file."""
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK.ReadImage([str(path) for path in paths] if len(paths) > 1 else str(paths[0]))


def assert_same_image(ours: Volume, theirs: SimpleITK.Image, *, atol: float = 1e-4) -> None:
    """Every voxel of ITK's image lies, with its value, at the same place of the patient in ours."""
    if 1 in theirs.GetSize():  # ITK does not know how thick a lone slice is
        thick_mm = ours.spacing_mm[ours.voxels.shape[1:].index(1)]
        theirs.SetSpacing((*theirs.GetSpacing()[:2], thick_mm))
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.array(theirs.GetDirection()).reshape(3, 3) * theirs.GetSpacing()
    affine_lps[:3, 3] = theirs.GetOrigin()
    values = SimpleITK.GetArrayViewFromImage(theirs).T
    assert_same_grid(ours, values, LPS_TO_RAS @ affine_lps, atol=atol)


def assert_same_grid(ours: Volume, values: NDArray[Any], affine_ras: NDArray[np.float64], *, atol: float) -> None:
    """The same for values [i, j, k] of an independent reader and their affine."""
    to_ours = np.linalg.inv(ours.affine_ras) @ affine_ras
    whole = to_ours.round()
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*values.shape, 1]
    apart_mm = np.abs(corners @ (affine_ras - ours.affine_ras @ whole).T).max()
    assert apart_mm < 1e-4 * max(values.shape)
    axes = np.abs(whole[:3, :3]).argmax(axis=1)
    turned = values.transpose(axes)
    turned = np.flip(turned, tuple(to for to in range(3) if whole[to, axes[to]] < 0))
    assert turned.shape == ours.voxels.shape[1:]
    np.testing.assert_allclose(ours.voxels[0], turned, rtol=1e-6, atol=atol)
