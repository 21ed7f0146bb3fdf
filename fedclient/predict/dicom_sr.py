"""A structured report (DICOM PS3.16, TID 1500): volumes and longest diameters of what is marked, or probabilities."""

from collections.abc import Sequence

import highdicom as hd
from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    SourceImageForMeasurementGroup,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from fedclient.predict.case import Answer, Prediction
from fedclient.predict.codes import finding_of
from fedclient.predict.headers import Headers
from fedclient.predict.maker import MAKER, NOTICE, made_by
from fedclient.predict.segments import Segment

SERIES = 9102
LONGEST = codes.SCT.LongAxis
PROBABILITY = codes.DCM.Probability
PROCEDURES = {
    "CT": Code("25045-6", "LN", "CT unspecified body region"),
    "MR": Code("25056-3", "LN", "MR unspecified body region"),
}
IMAGING = codes.SCT.ImagingProcedure
ONE = codes.UCUM.NoUnits


def report(
    prediction: Prediction, headers: Headers, segments: Sequence[Segment], segmentation: Dataset | None
) -> Comprehensive3DSR:
    """A measurement group for each segment, or where nothing is marked for each answer.

    Args:
        segmentation: what the groups refer to; None where there is none.
    """
    model = prediction.model
    made = AlgorithmIdentification(
        name=model.name, version=model.version, parameters=[f"release_sha256={model.digest}"],
        family=codes.DCM.ArtificialIntelligence,
    )  # fmt: skip
    observer = ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name="fedclient predict", manufacturer_name="fedimaging", model_name=model.stamp[:64]
        ),
    )
    with made_by():
        groups = _groups(prediction, headers, segments, segmentation, made)
        content = MeasurementReport(
            observation_context=ObservationContext(observer_device_context=observer),
            procedure_reported=PROCEDURES.get(str(headers.first.Modality), IMAGING),
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        made_report = Comprehensive3DSR(
            evidence=[headers.first, *headers.slices[1:], *([] if segmentation is None else [segmentation])],
            content=content[0],
            series_instance_uid=hd.UID(),
            series_number=SERIES,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            series_description=f"AI measurements, {NOTICE}",
            **MAKER,
        )
    return made_report


def _groups(
    prediction: Prediction,
    headers: Headers,
    segments: Sequence[Segment],
    segmentation: Dataset | None,
    made: AlgorithmIdentification,
) -> list[VolumetricROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations]:
    if segmentation is None and prediction.marks is None:
        return [_chances(each, headers, made) for each in prediction.answers]
    if segmentation is None:
        return [
            MeasurementsAndQualitativeEvaluations(
                tracking_identifier=TrackingIdentifier(hd.UID(), each.label),
                finding_type=finding_of(each.name),
                algorithm_id=made,
                measurements=_sizes(each) if prediction.grid.measured else None,
                source_images=[_image(headers)],
            )
            for each in segments
        ]
    series = SourceSeriesForSegmentation(headers.first.SeriesInstanceUID)
    tracked = [(item.TrackingUID, item.TrackingID) for item in segmentation.SegmentSequence]
    return [
        VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(*tracked[n - 1]),
            referenced_segment=ReferencedSegment(
                segmentation.SOPClassUID, segmentation.SOPInstanceUID, n, source_series=series
            ),
            finding_type=finding_of(each.name),
            algorithm_id=made,
            measurements=_sizes(each),
        )
        for n, each in enumerate(segments, start=1)
    ]


def _sizes(segment: Segment) -> list[Measurement]:
    found = [Measurement(codes.SCT.Volume, round(segment.volume_mm3, 3), codes.UCUM.CubicMillimeter)]
    if segment.longest_mm is not None:
        found.append(Measurement(LONGEST, round(segment.longest_mm, 3), codes.UCUM.Millimeter))
    return found


def _chances(answer: Answer, headers: Headers, made: AlgorithmIdentification) -> MeasurementsAndQualitativeEvaluations:
    told = {f"{answer.name} by day {day:g}": came for day, came in answer.by_day.items()} or {
        answer.name: answer.chance
    }
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(hd.UID(), answer.name),
        finding_type=finding_of(answer.name),
        algorithm_id=made,
        measurements=[
            Measurement(PROBABILITY, round(chance, 6), ONE, tracking_identifier=TrackingIdentifier(hd.UID(), name))
            for name, chance in told.items()
        ],
        source_images=[_image(headers)],
    )


def _image(headers: Headers) -> SourceImageForMeasurementGroup:
    middle = headers.slices[len(headers.slices) // 2]
    return SourceImageForMeasurementGroup(middle.SOPClassUID, middle.SOPInstanceUID)
