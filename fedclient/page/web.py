"""A site's page on loopback: read-only, live by server-sent events, nothing from elsewhere; and figures for Prometheus.

http://127.0.0.1:PORT/           how the site stands
http://127.0.0.1:PORT/events     what changes (server-sent events)
http://127.0.0.1:PORT/metrics    figures for Prometheus
"""

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import Route

from fedclient.gauges import exposition
from fedclient.page.look import Looker, looker
from fedclient.site import read_site_file
from shared_models.errors import FederationError
from shared_models.live.feed import Feed
from shared_models.live.pages import Events, listening, policy, serve_files
from shared_models.loopback import loopback_app, page_main

LOOK_S = 2.0  # a node at work needs its cores itself


def page_app(folder: Path) -> FastAPI:
    """The page of the site in `folder`."""
    return application(looker(folder))


def application(looks: Looker, feed: Feed | None = None) -> FastAPI:
    heard = feed or Feed(looks.sections, look_s=LOOK_S)
    app = loopback_app("a site's page", policy(), lifespan=listening(heard))
    template = looks.pages.get_template("page.html")
    serve_files(app, {})

    @app.get("/")
    async def page() -> Response:
        try:
            file, seen = read_site_file(looks.folder), await heard.fresh()
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return HTMLResponse(template.render(site=file, seen=seen))

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            return Response(exposition(looks.folder), media_type=CONTENT_TYPE_LATEST)
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", 503)

    app.router.routes.append(Route("/events", Events(heard)))
    return app


if __name__ == "__main__":
    page_main("fedclient.page.web", "A site's page on loopback.", page_app)
