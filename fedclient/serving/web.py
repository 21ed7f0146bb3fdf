"""The pages and the REST interface of `fedclient serve-model`; `/api/openapi.json` describes it, `/` is for people."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from fedclient.serving import dicomweb
from fedclient.serving.guard import Asgi, guarded
from fedclient.serving.intake import REPLACED, Intake
from fedclient.serving.jobs import Job, Jobs, Overloaded, Room
from fedclient.serving.multipart import BodyRefused, parts_of
from fedclient.serving.warm import Warm

PAGE = Path(__file__).parent / "page"
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
KEPT_NAMES = (".mhd", ".raw", ".zraw", ".nhdr")  # whose headers name other files
TYPES = {".png": "image/png", ".dcm": "application/dicom", ".json": "application/json", ".gz": "application/gzip"}
NOTICE = "not for diagnosis"
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


@dataclass
class Told:
    """A job as it is told.

    Attributes:
        state: waiting, running, done or failed.
        images: of each image its answers, doubts and files; a file is had from `/api/jobs/ID/files/NAME`.
        unread: what could not be predicted on, each with a code and why.
        error: of a job that failed.
        returned: to PACS: off, waiting, sent, failed, or withheld because it is partial.
        partial: code and why, where it is of a part of a series, or a later job is of more of it.
    """

    id: str
    state: str
    returned: str
    notice: str = NOTICE
    ahead: int = 0
    images: list[dict[str, Any]] = field(default_factory=list)
    unread: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, str] | None = None
    partial: dict[str, str] | None = None


@dataclass
class Health:
    """Whether the service works, what model it has, and how busy it is.

    Attributes:
        partial: cases that are of a part of their series, and of which nobody has sent the whole.
        not_returned: cases whose results were given up: PACS has not taken them.
    """

    model: dict[str, Any]
    waiting: int
    most_waiting: int
    restarts: int
    most_mib: float
    token: bool
    returns: bool
    partial: int
    not_returned: int
    notice: str = NOTICE


@dataclass(frozen=True, slots=True)
class Parts:
    """What the pages need of the service."""

    jobs: Jobs
    intake: Intake
    room: Room
    warm: Warm
    most_bytes: int
    token: str | None
    local: bool
    returns: bool
    public_origin: str = ""


def application(parts: Parts) -> Asgi:
    """The whole web side, behind its guard."""
    app = FastAPI(
        title="fedclient serve-model",
        version=str(parts.warm.model.get("version", "0")),
        description=f"Predictions of one released model inside the hospital: {NOTICE}. Nothing received is trained on.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, Overloaded):
            return JSONResponse({"detail": str(error)}, 503, {"retry-after": "30"})
        status = error.status if isinstance(error, BodyRefused) else 500
        return JSONResponse({"detail": str(error)}, status, {"connection": "close"})

    app.add_exception_handler(Overloaded, refused)
    app.add_exception_handler(BodyRefused, refused)
    _pages(app)
    _rest(app, parts)
    app.include_router(dicomweb.router(parts.jobs, parts.intake, parts.room, parts.most_bytes))
    return guarded(
        app, token=parts.token, local=parts.local, most_bytes=parts.most_bytes, public_origin=parts.public_origin
    )


def _pages(app: FastAPI) -> None:
    def page_at(path: str) -> None:
        name, kind = PAGES[path]

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return FileResponse(PAGE / name, media_type=kind)

    for path in PAGES:
        page_at(path)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _rest(app: FastAPI, parts: Parts) -> None:
    jobs = parts.jobs

    @app.get("/api/health")
    async def health() -> Health:
        """Whether the service works, and what model it has."""
        return Health(
            dict(parts.warm.model), jobs.waiting, jobs.most, parts.warm.restarts, parts.most_bytes / 2**20,
            parts.token is not None, parts.returns,
            sum(job.partial is not None and job.partial[0] != REPLACED for job in jobs.all()),
            sum(job.returned == "failed" for job in jobs.all()),
        )  # fmt: skip

    @app.post("/api/jobs", status_code=202, openapi_extra=UPLOAD, responses={503: {"description": "try again later"}})
    async def upload(request: Request) -> Told:
        """Takes the files of one image, or of several: a DICOM series, NIfTI, MetaImage, NRRD, PNG, JPEG or TIFF."""
        job = jobs.begin("page")
        into = jobs.place(job.id) / "in"
        try:
            await parts_of(
                request.stream(), request.headers.get("content-type", ""), "multipart/form-data", parts.most_bytes,
                parts.room, lambda number, name: into / safe_name(number, name),
            )  # fmt: skip
            jobs.submit(job)
        except BaseException:
            jobs.forget(job.id)
            raise
        return told(jobs, _found(jobs, job.id))

    @app.get("/api/jobs/{job_id}")
    async def state(job_id: str) -> Told:
        """Where a job stands, and its results."""
        return told(jobs, _found(jobs, job_id))

    @app.get("/api/jobs/{job_id}/files/{name:path}", response_class=FileResponse)
    async def file(job_id: str, name: str) -> Response:
        """One file of the results."""
        job = _found(jobs, job_id)
        if name not in files_of(job):
            raise HTTPException(404, "the job has no such file.")
        path = jobs.place(job.id) / "out" / name
        return FileResponse(path, media_type=TYPES.get(path.suffix, "application/octet-stream"))

    @app.delete("/api/jobs/{job_id}", status_code=204)
    async def forget(job_id: str) -> Response:
        """Deletes a job and all its files."""
        if not jobs.forget(_found(jobs, job_id).id):
            raise HTTPException(409, "the job is being worked on. Try again when it is done.")
        return Response(status_code=204)


def _found(jobs: Jobs, job_id: str) -> Job:
    job = jobs.find(job_id)
    if job is None:
        raise HTTPException(404, "there is no such job, or no longer.")
    return job


def told(jobs: Jobs, job: Job) -> Told:
    answer = job.answer or {}
    return Told(
        id=job.id,
        state=job.state,
        returned=job.returned,
        ahead=jobs.ahead(job.id),
        images=list(answer.get("images", [])),
        unread=list(answer.get("unread", [])),
        error=_words(job.error),
        partial=_words(job.partial),
    )


def _words(said: tuple[str, str] | None) -> dict[str, str] | None:
    return None if said is None else {"code": said[0], "why": said[1]}


def files_of(job: Job) -> set[str]:
    """The files that may be had of a job."""
    found: set[str] = set()
    for image in (job.answer or {}).get("images", []):
        found |= {each["file"] for each in image["files"]}
        found |= {plane[key] for plane in image.get("planes", []) for key in ("image", "marks") if key in plane}
    return found


def safe_name(number: int, name: str) -> str:
    """What an uploaded file is called here: a number and its suffix; its own name only where another file names it."""
    base = re.split(r"[/\\]", name)[-1]
    ending = re.search(r"(\.nii\.gz|\.[A-Za-z0-9]{1,5})$", base)
    suffix = ending[1].lower() if ending else ""
    if suffix in KEPT_NAMES and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", base):
        return base
    return f"{number:06d}{suffix}"
