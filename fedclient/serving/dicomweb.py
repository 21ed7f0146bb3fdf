"""DICOMweb (PS3.18): STOW-RS takes images, QIDO-RS finds results, WADO-RS gives them. No image can be asked for."""

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fedclient.data.dicom_header import unbroken
from fedclient.data.result_header import FOUND_BY, found_by, header_json
from fedclient.serving.back import dicom_results
from fedclient.serving.intake import Intake
from fedclient.serving.jobs import Jobs, Overloaded, Room
from fedclient.serving.multipart import Part, parts_of
from shared_models.errors import ImageUnreadable

JSON = "application/dicom+json"
CANNOT_UNDERSTAND, NOT_AN_IMAGE, OUT_OF_RESOURCES = 0xC000, 0xA900, 0xA700
GONE = (ImageUnreadable, FileNotFoundError)  # a result that was deleted meanwhile, its time being over
BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Result:
    """One DICOM result."""

    path: Path
    study: str
    series: str
    instance: str
    modality: str


def router(jobs: Jobs, intake: Intake, room: Room, most_bytes: int) -> APIRouter:
    made = APIRouter(prefix="/dicom-web")

    @made.post("/studies", tags=["DICOMweb"])
    @made.post("/studies/{study}", tags=["DICOMweb"])
    async def store(request: Request, study: str | None = None) -> Response:
        """STOW-RS: images of any number of series; each is predicted on once nothing more comes of it."""
        kind = request.headers.get("content-type", "")
        parts = await parts_of(
            request.stream(), kind, "multipart/related", most_bytes, room, lambda number, name: intake.new_file(),
            lost=intake.lost,
        )  # fmt: skip
        stored, failed = await run_in_threadpool(_placed, parts, intake, room, study)
        answer: dict[str, Any] = {}
        if stored:
            answer["00081199"] = {"vr": "SQ", "Value": stored}
        if failed:
            answer["00081198"] = {"vr": "SQ", "Value": failed}
        if failed and not stored and all(each == _failure(OUT_OF_RESOURCES) for each in failed):
            return JSONResponse(answer, 503, {"retry-after": "30"}, media_type=JSON)
        status = 200 if not failed else 202 if stored else 409
        return JSONResponse(answer, status, media_type=JSON)

    @made.get("/studies", tags=["DICOMweb"])
    @made.get("/series", tags=["DICOMweb"])
    @made.get("/studies/{study}/series", tags=["DICOMweb"])
    @made.get("/instances", tags=["DICOMweb"])
    @made.get("/studies/{study}/instances", tags=["DICOMweb"])
    @made.get("/studies/{study}/series/{series}/instances", tags=["DICOMweb"])
    def search(request: Request, study: str | None = None, series: str | None = None) -> Response:
        """QIDO-RS over the results: by UIDs and Modality, in the path or as parameters; `limit` and `offset`."""
        level = request.url.path.rstrip("/").rsplit("/", 1)[-1]
        asked = dict(request.query_params)
        number = {key: _count(asked.pop(key, default)) for key, default in (("limit", "1000"), ("offset", "0"))}
        for ignored in ("includefield", "fuzzymatching"):
            asked.pop(ignored, None)
        path = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
        wanted = asked | {key: value for key, value in path.items() if value is not None}
        if strange := set(asked) - {*FOUND_BY}:
            raise HTTPException(400, f"{len(strange)} keys are not searched by; allowed: {', '.join(FOUND_BY)}.")
        rows: dict[str, dict[str, Any]] = {}
        for result in results_of(jobs):
            known = dict(zip(FOUND_BY, (result.study, result.series, result.instance, result.modality), strict=True))
            key = {"studies": result.study, "series": result.series}.get(level, result.instance)
            if key not in rows and all(known[name] == value.upper() for name, value in wanted.items()):
                with suppress(*GONE), unbroken():
                    rows[key] = header_json(result.path, level)
        listed = list(rows.values())[number["offset"] : number["offset"] + number["limit"]]
        return JSONResponse(listed, media_type=JSON)

    @made.get("/studies/{study}/metadata", tags=["DICOMweb"])
    @made.get("/studies/{study}/series/{series}/metadata", tags=["DICOMweb"])
    @made.get("/studies/{study}/series/{series}/instances/{instance}/metadata", tags=["DICOMweb"])
    def metadata(study: str, series: str | None = None, instance: str | None = None) -> Response:
        """WADO-RS: headers of results, without pixels."""
        found = _chosen(jobs, study, series, instance)
        told: list[dict[str, Any]] = []
        for each in found:
            with suppress(*GONE), unbroken():
                told.append(header_json(each.path, "all"))
        return JSONResponse(told, media_type=JSON)

    @made.get("/studies/{study}", tags=["DICOMweb"])
    @made.get("/studies/{study}/series/{series}", tags=["DICOMweb"])
    @made.get("/studies/{study}/series/{series}/instances/{instance}", tags=["DICOMweb"])
    def retrieve(study: str, series: str | None = None, instance: str | None = None) -> Response:
        """WADO-RS: results as they were made."""
        found = _chosen(jobs, study, series, instance)
        boundary = secrets.token_hex(16)
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        return StreamingResponse(_body([each.path for each in found], boundary), media_type=kind)

    return made


def _placed(
    parts: Sequence[Part], intake: Intake, room: Room, study: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What of a body was taken, and what was not, as STOW-RS tells it."""
    session = f"stow-{secrets.token_hex(8)}"
    stored: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    try:
        for part in parts:
            try:
                found = intake.place(part.path, "stow", session, study)
                stored.append(_reference(found.sop_class, found.sop_instance))
            except (ImageUnreadable, Overloaded, OSError) as error:
                room.give(part.size_bytes)
                part.path.unlink(missing_ok=True)
                failed.append(_failure(_reason(error)))
    finally:
        intake.closed(session)
    return stored, failed


def _reference(sop_class: str, sop_instance: str) -> dict[str, Any]:
    return {"00081150": {"vr": "UI", "Value": [sop_class]}, "00081155": {"vr": "UI", "Value": [sop_instance]}}


def _failure(reason: int) -> dict[str, Any]:
    return {"00081197": {"vr": "US", "Value": [reason]}}


def _reason(error: Exception) -> int:
    if isinstance(error, (Overloaded, OSError)):
        return OUT_OF_RESOURCES
    return NOT_AN_IMAGE if getattr(error, "code", "") == "MODALITY_MISMATCH" else CANNOT_UNDERSTAND


def _count(value: str) -> int:
    if not re.fullmatch(r"\d{1,6}", value):
        raise HTTPException(400, "limit and offset are whole numbers.")
    return int(value)


def results_of(jobs: Jobs) -> Iterator[Result]:
    """Every DICOM result that is kept, but of a part of a series."""
    for job in jobs.all():
        for path in dicom_results(jobs.place(job.id), job) if job.state == "done" and job.partial is None else ():
            with suppress(*GONE), unbroken():
                yield Result(path, *found_by(path))


def _chosen(jobs: Jobs, study: str, series: str | None, instance: str | None) -> list[Result]:
    found = [
        each
        for each in results_of(jobs)
        if each.study == study and series in (None, each.series) and instance in (None, each.instance)
    ]
    if not found:
        raise HTTPException(404, "no result of that study, series and instance is kept here.")
    return found


def _body(paths: list[Path], boundary: str) -> Iterator[bytes]:
    for path in paths:
        yield f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()
