"""DICOM: each voxel keeps its place and its value in every syntax, as a second reader finds them."""

import base64
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import highdicom
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    NuclearMedicineImageStorage,
    RLELossless,
)

from fedclient.data.dicom import read_series
from fedclient.data.images import read_image, read_labels
from fedclient.data.volume import FRONTAL_RAS
from tests.dicoms import (
    AXIAL,
    COLUMNS,
    NAME,
    ORIGIN_MM,
    ROWS,
    SLICES,
    SPACING_MM,
    STEP_MM,
    assert_same_grid,
    assert_same_image,
    item,
    recode,
    second_opinion,
    set_pixels,
    slice_of,
    stored_pixels,
    write,
    write_series,
)

# 10 x 8 pixels of (53 n) mod 4096, coded by OpenJPH: no encoder of HTJ2K is installed here
HTJ2K_FRAME = base64.b85decode(
    "|4;u>04YEK000080000A0000000000000080000A0000000000009pH0sl|{2mk^A000U9QUDA90ssL30R#j<0smY82Ox-uh=~7W02crOPjF>!N>E5"
    "3R%LP^FfKASE;BCwkN^q*00000Y5)QMlfVEj!2f?=`78em@mK!ads;u){wx1rz8=4{zKGwcQ{ai|Rr2fcfVd+4KXdh$LI5$j0Kfn%U;q`600}@Si"
    "lY9b@vvd~aDsOLPCM;%Uh(L10lu~X{_%u#0RPz"
)
ORIENTATIONS = {
    "axial": AXIAL,
    "feet first": (1, 0, 0, 0, -1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.9733204842, 0, 0.229449749, 0, 1, 0),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_series_lies_where_itk_finds_it_whatever_the_orientation(name: str, tmp_path: Path) -> None:
    paths = write_series(tmp_path, cosines=ORIENTATIONS[name])
    volume = read_series(paths[::-1])
    assert_same_image(volume, second_opinion(paths))
    assert (np.diag(volume.affine_ras[:3, :3]) > 0).all()
    assert volume.modality == "CT"
    assert volume.voxels.flags.c_contiguous


def test_a_folder_is_read_as_its_series_and_a_file_as_its_slice(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    assert_same_image(read_image(tmp_path), second_opinion(paths))
    assert_same_image(read_image(paths[2]), second_opinion(paths[2:3]))
    assert read_image(paths[2]).spacing_mm == pytest.approx((0.8, 0.7, 3.0))  # alone it is as thick as it says


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(SLICES)))
def test_the_order_of_files_does_not_matter(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    paths = write_series(tmp_path_factory.getbasetemp() / "order")
    assert (read_series([paths[n] for n in order]).voxels == read_series(paths).voxels).all()


def test_a_pixel_is_found_by_its_column_row_and_slice(tmp_path: Path) -> None:
    volume = read_series(write_series(tmp_path))
    assert volume.voxel_of_pixel is not None
    for column, row, k in ((0, 0, 0), (3, 7, 4), (COLUMNS - 1, ROWS - 1, SLICES - 1)):
        i, j, n, _ = (volume.voxel_of_pixel @ [column, row, k, 1]).astype(int)
        assert volume.voxels[0, i, j, n] == stored_pixels(k)[row, column] - 1024
        where = np.add(ORIGIN_MM, (column * SPACING_MM[1], row * SPACING_MM[0], k * STEP_MM))
        assert volume.affine_ras @ [i, j, n, 1] == pytest.approx([-where[0], -where[1], where[2], 1])


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_syntaxes_read_alike(syntax: UID, tmp_path: Path) -> None:
    path = write(tmp_path / "slice.dcm", slice_of(0), syntax)
    volume = read_image(path)
    assert_same_image(volume, second_opinion([path]))
    assert volume.provenance.transfer_syntax == syntax.keyword
    assert not volume.provenance.lossy


@pytest.mark.parametrize(
    "syntax",
    [RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000],
)
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_syntaxes_read_alike(syntax: UID, signed: bool, tmp_path: Path) -> None:
    pixels = stored_pixels(1, 32, 24)
    data = set_pixels(slice_of(0), pixels - 1024 if signed else pixels.astype(np.uint16), bits=16 if signed else 12)
    path = recode(write(tmp_path / "slice.dcm", data), syntax)
    volume = read_image(path)
    assert_same_image(volume, second_opinion([path]))
    assert volume.provenance.lossy == (syntax == JPEGLSNearLossless)  # all of it reversible, but that one may blur
    assert volume.provenance.transfer_syntax == syntax.keyword


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit])
def test_eight_bit_jpeg_reads_to_a_grey_level(syntax: UID, tmp_path: Path) -> None:
    y, x = np.mgrid[:32, :24]
    path = write(tmp_path / "slice.dcm", set_pixels(slice_of(0), (3 * x + 4 * y).astype(np.uint8), bits=8))
    volume = read_image(recode(path, syntax))
    assert_same_image(volume, second_opinion([path]), atol=1)
    assert volume.provenance.lossy


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_twelve_bit_jpeg_reads_as_itk_reads_it(name: str, tmp_path: Path) -> None:
    path = Path(str(get_testdata_file(name, download=False)))
    theirs = dcmread(path)
    data = set_pixels(slice_of(0), np.zeros((theirs.Rows, theirs.Columns), np.uint16), bits=12)
    data["PixelData"] = theirs["PixelData"]
    data.LossyImageCompression = "01"
    volume = read_image(write(tmp_path / "slice.dcm", data, JPEGExtended12Bit))
    # in a process of its own: ITK decodes 12 bits wrongly once certain other libraries are loaded beside it
    ask = "import SimpleITK as s, sys; i = s.ReadImage(sys.argv[1]); s.WriteImage(i, sys.argv[2])"
    subprocess.run([sys.executable, "-c", ask, str(path), str(tmp_path / "itk.mha")], check=True, capture_output=True)
    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "itk.mha")))[0]
    assert (values.astype(float) - 1024 == volume.voxels[0, ::-1, ::-1, 0].T).all()
    assert volume.provenance.lossy


@pytest.mark.parametrize("syntax", [HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL])
def test_high_throughput_jpeg_2000_reads_as_it_was_coded(syntax: UID, tmp_path: Path) -> None:
    data = slice_of(0)
    data.PixelData = encapsulate([HTJ2K_FRAME])
    data["PixelData"].VR = "OB"
    volume = read_image(write(tmp_path / "slice.dcm", data, syntax))
    expected = (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 53) % 4096 - 1024
    assert (volume.voxels[0, :, :, 0].T[::-1, ::-1] == expected).all()


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm",
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "J2K_pixelrep_mismatch.dcm",
    ],
)  # fmt: skip
def test_files_of_other_makers_read_as_itk_reads_them(name: str) -> None:
    path = Path(str(get_testdata_file(name, download=False)))
    assert_same_image(read_image(path), second_opinion([path]))


@pytest.mark.parametrize("implicit", [True, False])
def test_a_bare_data_set_without_preamble_reads_like_a_whole_file(implicit: bool, tmp_path: Path) -> None:
    data = slice_of(3)
    del data.file_meta
    data.save_as(tmp_path / "bare", implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "bare").read_bytes()[:4] == b"\x08\0\x08\0"
    assert (read_image(tmp_path / "bare").voxels == read_image(write(tmp_path / "whole", slice_of(3))).voxels).all()


def test_slope_and_intercept_are_those_of_each_slice(tmp_path: Path) -> None:
    def scale(k: int, data: Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = str(1.29035409 + k / 10), str(-1000 - k)

    volume = read_series(write_series(tmp_path, edit=scale))
    for k in range(SLICES):
        expected = stored_pixels(k) * (1.29035409 + k / 10) - 1000 - k
        np.testing.assert_allclose(volume.voxels[0, ::-1, ::-1, k].T, expected, rtol=1e-6)


def test_bits_above_the_stored_ones_are_no_part_of_a_pixel(tmp_path: Path) -> None:
    noisy = stored_pixels(0).astype(np.uint16) | 0xA000  # an overlay in the four bits above
    path = write(tmp_path / "slice.dcm", set_pixels(slice_of(0), noisy, bits=12))
    assert read_image(path).voxels.max() < 4096 - 1024
    signed = (stored_pixels(0) - 2048).astype(np.int16)
    packed = set_pixels(slice_of(0), (signed.view(np.uint16) & 0x0FFF).view(np.int16), bits=12)
    assert read_image(write(tmp_path / "s.dcm", packed)).voxels.min() == signed.min() - 1024


@pytest.mark.parametrize(("value", "limit"), [(-2000, None), (63536, None), (-2000, -1900)])
def test_padding_of_ct_becomes_air_even_if_its_sign_is_written_wrong(
    value: int, limit: int | None, tmp_path: Path
) -> None:
    pixels = stored_pixels(0).astype(np.int16)
    pixels[0, :3] = (-2000, -2000, -1950)
    data = set_pixels(slice_of(0), pixels, bits=16)
    data.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    if limit is not None:
        data.add_new("PixelPaddingRangeLimit", "SS", limit)
    values = read_image(write(tmp_path / "slice.dcm", data)).voxels[0, ::-1, ::-1, 0].T
    assert values[0, :3].tolist() == [-1000, -1000, -1000 if limit else -1950 - 1024]
    assert (values[1:] == pixels[1:].astype(float) - 1024).all()


def test_padding_that_may_be_tissue_stays(tmp_path: Path) -> None:
    data = slice_of(0)
    data.add_new("PixelPaddingValue", "US", int(stored_pixels(0)[3, 3]))  # 27 HU
    plain = read_image(write(tmp_path / "plain.dcm", slice_of(0)))
    assert (read_image(write(tmp_path / "slice.dcm", data)).voxels == plain.voxels).all()


def radiograph(**elements: object) -> Dataset:
    data = slice_of(0)
    data.SOPClassUID, data.Modality = ComputedRadiographyImageStorage, "CR"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(data, keyword)
    del data.PixelSpacing
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


def test_a_radiograph_is_read_as_it_is_displayed(tmp_path: Path) -> None:
    volume = read_image(write(tmp_path / "film.dcm", radiograph(ImagerPixelSpacing=[0.2, 0.1])))
    assert (volume.voxels[0, :, :, 0] == stored_pixels(0)).all()
    assert volume.modality == "CR"
    assert volume.spacing_mm == pytest.approx((0.2, 0.1, 1))
    assert volume.left_right_axis == 1
    assert (read_image(write(tmp_path / "bare.dcm", radiograph())).affine_ras == FRONTAL_RAS).all()


def test_a_mirrored_or_sideways_radiograph_says_so_in_its_affine(tmp_path: Path) -> None:
    mirrored = read_image(write(tmp_path / "m.dcm", radiograph(PatientOrientation=["R", "F"])))
    sideways = read_image(write(tmp_path / "s.dcm", radiograph(PatientOrientation=["F", "L"])))
    assert mirrored.affine_ras[:3, 1].tolist() == [1, 0, 0]
    assert sideways.affine_ras[:3, 1].tolist() == [0, 0, -1]
    assert sideways.left_right_axis == 0
    assert np.linalg.det(mirrored.affine_ras) != 0


@pytest.mark.parametrize("towards", ["A", "P"])
def test_a_film_taken_from_the_side_is_mirrored_and_shown_by_its_columns(tmp_path: Path, towards: str) -> None:
    film = read_image(write(tmp_path / "side.dcm", radiograph(PatientOrientation=[towards, "F"])))
    assert film.affine_ras[0, :2].tolist() == [0, 0]  # neither axis runs between left and right
    assert film.left_right_axis == 1  # rows run from head to feet: mirrored across them it would stand on its head


def test_monochrome1_films_are_inverted_and_ct_is_not(tmp_path: Path) -> None:
    film = read_image(write(tmp_path / "f.dcm", radiograph(PhotometricInterpretation="MONOCHROME1")))
    assert (film.voxels[0, :, :, 0] == 4095 - stored_pixels(0)).all()
    assert film.provenance.inverted
    assert film.provenance.photometric == "MONOCHROME1"
    data = slice_of(0)
    data.PhotometricInterpretation = "MONOCHROME1"
    ct = read_image(write(tmp_path / "ct.dcm", data))
    assert (ct.voxels == read_image(write(tmp_path / "two.dcm", slice_of(0))).voxels).all()
    assert not ct.provenance.inverted


def test_padding_of_a_film_is_as_dark_as_its_darkest_pixel(tmp_path: Path) -> None:
    data = radiograph(PhotometricInterpretation="MONOCHROME1")
    data.add_new("PixelPaddingValue", "US", 0)
    assert (stored_pixels(0) == 0).sum() == 1
    film = read_image(write(tmp_path / "f.dcm", data)).voxels[0, :, :, 0]
    assert film[0, 0] == film[1:].min() == 4095 - stored_pixels(0).max()


def test_a_mask_drawn_as_a_picture_fits_the_slice_as_displayed(tmp_path: Path) -> None:
    from PIL import Image

    drawn = (stored_pixels(2) > 2000).astype(np.uint8)
    Image.fromarray(drawn * 255).save(tmp_path / "mask.png")
    for data in (slice_of(2), radiograph(PixelSpacing=[0.2, 0.2])):
        volume = read_image(write(tmp_path / "slice.dcm", data))
        labels = read_labels(tmp_path / "mask.png", like=volume)
        assert labels.shape == volume.voxels.shape[1:]
    volume = read_image(write(tmp_path / "slice.dcm", slice_of(2)))
    assert ((volume.voxels[0] > 2000 - 1024) == read_labels(tmp_path / "mask.png", like=volume)).all()


def enhanced(slices: int = SLICES, edit: Callable[[int, Dataset], object] | None = None) -> Dataset:
    """An enhanced CT whose frames are stored in no order, each with a slope of its own."""
    data = slice_of(0)
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
        "SliceThickness", "KVP", "ConvolutionKernel",
    ):  # fmt: skip
        delattr(data, keyword)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = EnhancedCTImageStorage
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.DimensionOrganizationSequence = item(DimensionOrganizationUID="1.2.826.0.1.3680043.9.9")
    data.DimensionIndexSequence = item(
        DimensionOrganizationUID="1.2.826.0.1.3680043.9.9", DimensionIndexPointer=0x00209057,
        FunctionalGroupPointer=0x00209111,
    )  # fmt: skip
    shared = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=list(AXIAL)),
        PixelMeasuresSequence=item(PixelSpacing=list(SPACING_MM), SliceThickness=3, SpacingBetweenSlices=STEP_MM),
        CTXRayDetailsSequence=item(KVP=100),
        CTReconstructionSequence=item(ConvolutionKernel="LUNG"),
    )
    data.SharedFunctionalGroupsSequence = shared
    frames, pixels = [], []
    for n in range(slices):
        k = (n * 5) % slices
        (frame,) = item(
            PlanePositionSequence=item(ImagePositionPatient=[*ORIGIN_MM[:2], ORIGIN_MM[2] + STEP_MM * k]),
            PixelValueTransformationSequence=item(RescaleSlope=1 + k, RescaleIntercept=-1024 - k, RescaleType="HU"),
            FrameContentSequence=item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[k + 1]),
        )
        if edit is not None:
            edit(k, frame)
        frames.append(frame)
        pixels.append(stored_pixels(k).astype(np.uint16))
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    data.NumberOfFrames = slices
    return set_pixels(data, np.stack(pixels), bits=12)


@pytest.mark.parametrize("syntax", [None, JPEGLosslessSV1, JPEG2000Lossless, RLELossless])
def test_an_enhanced_image_reads_as_highdicom_reads_it(syntax: UID | None, tmp_path: Path) -> None:
    path = write(tmp_path / "enhanced.dcm", enhanced())
    theirs = highdicom.imread(path).get_volume(apply_real_world_transform=False, dtype=np.float64)
    if syntax is not None:
        recode(path, syntax)
    volume = read_series([path])
    affine_ras = np.diag([-1, -1, 1, 1]) @ theirs.affine
    assert_same_grid(volume, theirs.array, affine_ras, atol=1e-2)  # 4095 * 6 in float32
    assert (read_image(path).voxels == volume.voxels).all()
    assert volume.provenance.slices == SLICES
    assert volume.provenance.tube_kv == 100
    assert volume.provenance.kernel == "LUNG"


@pytest.mark.parametrize("by_frame", [False, True])
def test_a_lone_frame_is_as_thick_as_it_says_itself_or_for_all_frames(by_frame: bool, tmp_path: Path) -> None:
    data = enhanced(1)
    (shared,), (frame,) = data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence
    if by_frame:
        frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
        del shared.PixelMeasuresSequence
    volume = read_series([write(tmp_path / "lone.dcm", data)])
    assert volume.spacing_mm == pytest.approx((0.8, 0.7, STEP_MM))
    assert volume.provenance.slice_thickness_mm == 3


def test_frames_of_nuclear_medicine_read_by_their_distance(tmp_path: Path) -> None:
    data = slice_of(0)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = NuclearMedicineImageStorage
    data.Modality, data.NumberOfFrames, data.SpacingBetweenSlices = "NM", SLICES, STEP_MM
    set_pixels(data, np.stack([stored_pixels(k) for k in range(SLICES)]).astype(np.uint16), bits=12)
    data.DetectorInformationSequence = item(
        ImagePositionPatient=data.ImagePositionPatient, ImageOrientationPatient=data.ImageOrientationPatient
    )
    del data.ImagePositionPatient, data.ImageOrientationPatient
    volume = read_image(write(tmp_path / "nm.dcm", data))
    single = read_series(write_series(tmp_path / "single"))
    assert volume.affine_ras == pytest.approx(single.affine_ras)
    assert (volume.voxels == single.voxels).all()


def test_provenance_keeps_numbers_and_known_words_only(tmp_path: Path) -> None:
    facts = read_series(write_series(tmp_path)).provenance
    assert (facts.manufacturer, facts.model, facts.kernel) == ("SIEMENS", "SOMATOM FORCE", "BR40D 3")
    assert (facts.body_part, facts.patient_position, facts.tube_kv) == ("CHEST", "HFS", 120)
    assert (facts.rows, facts.columns, facts.slices, facts.slice_thickness_mm) == (ROWS, COLUMNS, SLICES, 3)

    def leak(_: int, data: Dataset) -> None:
        for keyword in (
            "Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "BodyPartExamined", "PatientPosition",
        ):  # fmt: skip
            setattr(data, keyword, NAME[:16])
        data.KVP, data.Modality = "19700101", "MR"

    volume = read_series(write_series(tmp_path / "leak", edit=leak))
    told = [getattr(volume.provenance, each.name) for each in fields(volume.provenance)]
    assert not any("DOE" in str(value).upper() or "4711" in str(value) for value in told)
    assert volume.provenance.tube_kv is None
