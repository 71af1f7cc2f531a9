"""The voting page: two anonymous pictures, four answers, and nothing that names a model.

Rendered on the server, so that it works without a script; a small script adds keys, zoom and
flicker. Pictures are decoded and encoded again, pixels only, and go by names that are signatures of
battle and side. Votes come from forms of this page alone: the cookie of a voter is sent by no other
site, and the origin of a request is looked at besides. The page answers to addresses in numbers and
to names that it was given: any site can have its own name lead here. A voter is a random name in a
signed cookie.

It needs the extra `burnish[serve]`.
"""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image, ImageFilter

from burnish import html, images
from burnish.arena.ballots import RUINED, Ballots, Shown, VoteError
from burnish.arena.contest import Contest
from burnish.config import ConfigError
from burnish.types import Prompt

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, RedirectResponse
except ImportError:
    raise ConfigError(
        "need FastAPI and uvicorn to serve an arena, got none; pip install 'burnish[serve]'"
    ) from None

COOKIE = "voter"
MAX_BODY = 4096
"""Bytes of a form; a vote has two short fields."""
MAX_RATE = 60
"""Events of a voter in a minute."""
_SIDES = ("a", "b")
_WAIT = "That was very fast: wait a minute."


def app(
    contest: Contest,
    ballots: Ballots,
    *,
    title: str = "Which picture is better?",
    names: Collection[str] = (),
) -> FastAPI:
    """The application of one arena.

    Args:
        contest: its pictures.
        ballots: its votes.
        title: of the page.
        names: of hosts that it is reached by, beside `localhost` and addresses in numbers.
    """
    known = {"localhost", *map(_host_name, names)}
    service = _VotingService(contest, ballots, title)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    served.add_api_route("/", service.show, methods=["GET"], response_class=HTMLResponse)
    served.add_api_route("/picture/{name}", service.picture, methods=["GET"], response_model=None)
    served.add_api_route("/source/{name}", service.source, methods=["GET"], response_model=None)
    served.add_api_route("/vote", service.vote, methods=["POST"], response_model=None)
    served.add_api_route("/undo", service.undo, methods=["POST"], response_model=None)
    served.middleware("http")(partial(_guarded, known))
    return served


def _is_ours(host: str, known: Collection[str]) -> bool:
    """Whether a request was sent to an address in numbers, or to a name that is known.

    >>> [_is_ours(host, {"localhost"}) for host in ("127.0.0.1:80", "[::1]", "localhost", "x.org")]
    [True, True, True, False]
    """
    try:
        name = _host_name(host)
        return name in known or ipaddress.ip_address(name) is not None
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """Of a host as a header or a user writes it.

    >>> [_host_name(host) for host in ("Vote.example.org:443", "https://example.org/", "[::1]")]
    ['vote.example.org', 'example.org', '::1']
    """
    return (urlsplit(host if "//" in host else f"//{host}").hostname or "").rstrip(".")


async def _guarded(
    known: Collection[str], request: Request, answer: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Refuse foreign names of this host, large bodies and forms of other sites; tell browsers to
    fetch nothing else."""
    if not _is_ours(request.headers.get("host", ""), known):
        words = "This arena does not know that name of its host; add it with --public-host."
        return Response(words, status_code=421)
    if request.method == "POST":
        size = request.headers.get("content-length", "")
        if not size.isdigit() or int(size) > MAX_BODY:
            return Response("This form is too large.", status_code=413)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return Response("Votes are taken from this page only.", status_code=403)
    response = await answer(request)
    headers = {
        "Cache-Control": "no-store",
        # Not stricter: without any referrer browsers hide the origin of the page's own forms.
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    for name, value in headers.items():
        response.headers.setdefault(name, value)
    return response


class _VotingService:
    """The routes."""

    def __init__(self, contest: Contest, ballots: Ballots, title: str) -> None:
        self._contest, self._ballots, self._title = contest, ballots, title
        self._prompts: dict[str, Prompt] = {prompt.id: prompt for prompt in contest.prompts}
        self._template = html.template("vote.html.j2")

    def show(self, request: Request) -> Response:
        """The battle of this voter."""
        voter = self._voter(request)
        return self._page(voter, note="")

    def _page(self, voter: str, *, note: str, status: int = 200) -> Response:
        shown = self._ballots.show(voter)
        prompt = None if shown is None else self._prompts[shown.prompt]
        nonce = secrets.token_urlsafe(16)
        text = self._template.render(
            title=self._title,
            battle=shown,
            prompt=prompt,
            pictures=None if shown is None else [self._name(shown, side) for side in _SIDES],
            sources=shown and prompt and [self._name(shown, side) for side in _sources(prompt)],
            counted=self._ballots.counted(voter),
            newest=self._ballots.newest(voter),
            note=note,
            nonce=nonce,
        )
        response = HTMLResponse(text, status_code=status)
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; img-src 'self'; style-src 'nonce-{nonce}'; script-src "
            f"'nonce-{nonce}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        value = f"{voter}.{self._ballots.sign('voter', voter)}"
        response.set_cookie(COOKIE, value, max_age=365 * 86400, httponly=True, samesite="lax")
        return response

    def _voter(self, request: Request) -> str:
        """Who asks; a new name for whoever has none of ours."""
        name, _, signature = request.cookies.get(COOKIE, "").partition(".")
        known = name and self._ballots.is_signed(signature, "voter", name)
        return name if known else secrets.token_hex(8)

    def _name(self, shown: Shown, side: str) -> str:
        """A picture's name: it says which battle it belongs to, and no more."""
        return f"{shown.token}.{side}.{self._ballots.sign('picture', shown.token, side)}"

    def _found(self, request: Request, name: str) -> tuple[Any, str]:
        """Battle and side of a picture's name, if this voter was shown it."""
        token, side, signature = name.rsplit(".", 2) if name.count(".") == 3 else ("", "", "")
        if not self._ballots.is_signed(signature, "picture", token, side):
            raise VoteError("There is no such picture.")
        return self._ballots.battle(token, self._voter(request)), side

    def picture(self, request: Request, name: str) -> Response:
        """Pixels of one side, without anything else that the file held."""
        try:
            battle, side = self._found(request, name)
        except VoteError as error:
            return Response(str(error), status_code=404)
        if side not in _SIDES:
            return Response("There is no such picture.", status_code=404)
        model = battle[side]
        other = battle["b" if side == "a" else "a"]
        owner = other if model == RUINED else model
        picture = images.read(self._contest.pictures[owner][battle["prompt"]]).convert("RGB")
        return _pixels(_ruin(picture) if model == RUINED else picture)

    def source(self, request: Request, name: str) -> Response:
        """A picture that an edit was asked for."""
        try:
            battle, side = self._found(request, name)
        except VoteError as error:
            return Response(str(error), status_code=404)
        data = _sources(self._prompts[battle["prompt"]]).get(side)
        if data is None:
            return Response("There is no such picture.", status_code=404)
        return _pixels(images.decode(data, where="the source").convert("RGB"))

    async def vote(self, request: Request) -> Response:
        """Count a vote and show the next battle."""
        voter, form = self._voter(request), await _form(request)
        # The file waits for the disk, and for others who vote.
        return await run_in_threadpool(self._count, voter, form)

    def _count(self, voter: str, form: Mapping[str, str]) -> Response:
        if self._is_fast(voter):
            return self._page(voter, note=_WAIT, status=429)
        try:
            self._ballots.vote(form.get("token", ""), voter, form.get("winner", ""))
        except VoteError as error:
            return self._page(voter, note=str(error), status=409)
        return RedirectResponse("/", status_code=303)

    def _is_fast(self, voter: str) -> bool:
        return self._ballots.votes_since(voter, 60.0) >= MAX_RATE

    async def undo(self, request: Request) -> Response:
        """Take a vote back, once however often it is asked for, and show its battle again."""
        voter, form = self._voter(request), await _form(request)
        return await run_in_threadpool(self._take_back, voter, form)

    def _take_back(self, voter: str, form: Mapping[str, str]) -> Response:
        if self._is_fast(voter):
            return self._page(voter, note=_WAIT, status=429)
        try:
            self._ballots.undo(form.get("undo", ""), voter)
        except VoteError as error:
            return self._page(voter, note=str(error), status=409)
        return RedirectResponse("/", status_code=303)


def _sources(prompt: Prompt) -> dict[str, bytes]:
    """The sources of a prompt by what stands for a side in their names."""
    return {f"source-{number}": data for number, data in enumerate(prompt.sources)}


async def _form(request: Request) -> dict[str, str]:
    """Fields of a form that are given once."""
    text = (await request.body())[:MAX_BODY].decode("utf-8", errors="replace")
    return {name: values[0] for name, values in parse_qs(text).items() if len(values) == 1}


def _pixels(picture: Image.Image) -> Response:
    fresh = Image.frombytes("RGB", picture.size, picture.tobytes())
    return Response(images.encode_png(fresh), media_type="image/png")


def _ruin(picture: Image.Image) -> Image.Image:
    """A picture that nobody prefers who looks: of few pixels, blurred."""
    side = max(2, min(picture.size) // 12)
    small = picture.resize((side, side), Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
