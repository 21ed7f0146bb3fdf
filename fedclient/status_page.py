"""A site's page on loopback: read-only, without scripts, nothing from elsewhere; and figures for Prometheus.

http://127.0.0.1:PORT/           how the site stands
http://127.0.0.1:PORT/metrics    figures for Prometheus
"""

import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from prometheus_client import CONTENT_TYPE_LATEST

from fedclient import egress
from fedclient.consent import list_asked
from fedclient.doctor import nvidia
from fedclient.gauges import exposition
from fedclient.overview import card, overview
from fedclient.policy import in_words
from fedclient.site import open_site, read_site_file
from shared_models.doctor import gib, memory_bytes
from shared_models.errors import FederationError
from shared_models.expiry import date_text, span_text
from shared_models.loopback import loopback_app, page_main

MOST_SENT = 20
REFRESH_S = 10


def page_app(folder: Path) -> FastAPI:
    app = loopback_app("a site's page")

    @app.get("/")
    def page() -> Response:
        try:
            return HTMLResponse(rendered(folder))
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            return Response(exposition(folder), media_type=CONTENT_TYPE_LATEST)
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)

    return app


def rendered(folder: Path, now_s: float | None = None) -> str:
    """The page as HTML; everything in it is read anew."""
    now = time.time() if now_s is None else now_s
    file, facts = read_site_file(folder), overview(folder)
    environment = Environment(
        loader=PackageLoader("fedclient"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"gib": gib, "day": date_text}
    return environment.get_template("site.html").render(
        facts=facts,
        refresh_s=REFRESH_S,
        made_at=now,
        machine=_machine(file.compute.device),
        card=card(folder),
        policy=in_words(file.policy),
        privacy=file.privacy,
        studies=[_study(asked, now) for asked in list_asked(open_site({"site-dir": str(folder)}))],
        sent=egress.sent(folder)[-MOST_SENT:][::-1],
        heard=_heard(facts["connection"]["heard_at"], now),
    )


def _machine(device: str) -> dict[str, Any]:
    total, free = memory_bytes()
    return {"device": device, "gpus": nvidia(), "cores": len(os.sched_getaffinity(0)), "memory": total, "free": free}


def _study(asked: Any, now: float) -> dict[str, Any]:
    until = asked.decision.until_s if asked.decision else None
    return {
        "name": asked.study.name,
        "digest": asked.sha256[:12],
        "state": asked.state,
        "until": None if until is None else span_text(max(0.0, until - now)),
    }


def _heard(at: float | None, now: float) -> str:
    return "never" if at is None else f"{span_text(max(0.0, now - at))} ago"


if __name__ == "__main__":
    page_main("fedclient.status_page", "A site's page on loopback.", page_app)
