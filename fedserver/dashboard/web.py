"""The coordinator's dashboard: read-only, on loopback, behind a login, live by server-sent events.

http://127.0.0.1:PORT/            how the federation stands, with the run that is carried out
http://127.0.0.1:PORT/runs/RUN    the same, with another run
http://127.0.0.1:PORT/events      what changes (server-sent events)
"""

import asyncio
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Route

from fedserver.dashboard import login as logins
from fedserver.dashboard.login import SESSION_S, Login
from fedserver.dashboard.look import Looker, looker, palette
from shared_models.errors import FederationError
from shared_models.live.feed import Feed
from shared_models.live.pages import Events, focus_of, listening, policy, serve_files
from shared_models.loopback import loopback_app, page_main

STATIC = Path(__file__).parent / "static"
FILES = ("dashboard.js", "login.js", "dashboard.css", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE")
MOST_BODY = 4096
BODY_S = 10.0  # for a token to arrive: who has none yet keeps no place for longer
WRONG_S = 0.5  # before a wrong token is answered


def dashboard_app(folder: Path) -> FastAPI:
    """The dashboard of a federation folder.

    Raises:
        StateInvalid: no federation, or one that is damaged or exposed.
    """
    return application(looker(folder), logins.login(folder))


def application(looks: Looker, sessions: Login, feed: Feed | None = None) -> FastAPI:
    """All pages, behind the login."""
    heard = feed or Feed(looks.sections)
    app = loopback_app("a coordinator's dashboard", policy("'self'"), ("/login", "/logout"), lifespan=listening(heard))
    _static(app)
    _login(app, looks, sessions)
    _pages(app, looks, sessions, heard)
    return app


def _static(app: FastAPI) -> None:
    @app.get("/static/palette.css")
    async def colours() -> Response:
        return Response(palette(), media_type="text/css")

    serve_files(app, {name: STATIC / name for name in FILES})


def _login(app: FastAPI, looks: Looker, sessions: Login) -> None:
    template = looks.pages.get_template("login.html")
    where = str(logins.token_path(looks.federation.folder))

    def asked(wrong: bool, status: int) -> Response:
        name = looks.federation.name
        return HTMLResponse(template.render(federation=name, where=where, wrong=wrong), status)

    @app.get("/login")
    async def form(request: Request) -> Response:
        if sessions.knows(request.cookies.get(sessions.name)):
            return RedirectResponse("/", 303)
        return asked(False, 200)

    @app.post("/login")
    async def enter(request: Request) -> Response:
        body = b""
        try:
            async with asyncio.timeout(BODY_S):
                async for block in request.stream():
                    body += block
                    if len(body) > MOST_BODY:
                        return PlainTextResponse("A token is shorter.\n", 413, {"connection": "close"})
        except TimeoutError:
            return PlainTextResponse("A token takes less long.\n", 408, {"connection": "close"})
        fields = parse_qs(body.decode("utf-8", "replace"))
        session = sessions.begin(fields.get("token", [""])[0])
        if session is None:
            await asyncio.sleep(WRONG_S)
            return asked(True, 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(sessions.name, session, max_age=int(SESSION_S), path="/", httponly=True, samesite="strict")
        return answer

    @app.post("/logout")
    async def leave(request: Request) -> Response:
        sessions.end(request.cookies.get(sessions.name))
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(sessions.name, path="/", httponly=True, samesite="strict")
        return answer


def _pages(app: FastAPI, looks: Looker, sessions: Login, feed: Feed) -> None:
    template = looks.pages.get_template("page.html")

    async def shown(focus: str | None) -> Response:
        try:
            seen = await feed.fresh(focus)
        except FederationError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return HTMLResponse(template.render(federation=looks.federation, seen=seen, focus=focus))

    def allowed(request: Request) -> bool:
        return sessions.knows(request.cookies.get(sessions.name))

    async def refused(request: Request) -> Response | None:
        if not allowed(request):
            return PlainTextResponse("Sign in first: /login.\n", 401)
        run = focus_of(request)
        return None if run is None else await _missing(looks, run)

    @app.get("/")
    async def page(request: Request) -> Response:
        return await shown(None) if allowed(request) else RedirectResponse("/login", 303)

    @app.get("/runs/{run}")
    async def page_of_run(request: Request, run: str) -> Response:
        if not allowed(request):
            return RedirectResponse("/login", 303)
        return await _missing(looks, run) or await shown(run)

    app.router.routes.append(Route("/events", Events(feed, refused, allowed)))


async def _missing(looks: Looker, run: str) -> Response | None:
    """The answer where there is no such run, or nobody can tell."""
    try:
        known = await asyncio.to_thread(looks.knows, run)
    except FederationError as error:
        return PlainTextResponse(f"{error}\n", 503)
    return None if known else PlainTextResponse("There is no such run.\n", 404)


if __name__ == "__main__":
    page_main("fedserver.dashboard.web", "A coordinator's dashboard on loopback.", dashboard_app)
