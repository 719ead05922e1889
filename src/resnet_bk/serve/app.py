"""The addresses of the server, and who may use them."""

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_bk.config import ServeConfig, shown
from resnet_bk.extras import extra
from resnet_bk.inference.continuation import TextIds
from resnet_bk.serve.answers import DONE, Answer, event
from resnet_bk.serve.metrics import Metrics
from resnet_bk.serve.page import headers, page
from resnet_bk.serve.requests import CompletionRequest, RequestError, check_ids, parsed
from resnet_bk.serve.scheduler import BusyError, Scheduler, StoppingError
from resnet_bk.serve.texts import Piece, Text, Wanted

with extra("serve"):
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

_BODY_SECONDS = 30.0  # in which a client sends a body
_LATE = 10.0  # seconds after the limit of a request in which a client reads the rest of its stream
Pieces = AsyncIterator[list[tuple[int, Piece]]]


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: of the model.
        ids: its texts as ids.
        vocabulary, blocks: numbers of its logits and blocks.
        threshold: of adaptive depth; None without it.
        scheduler: decodes its texts.
    """

    name: str
    ids: TextIds
    vocabulary: int
    blocks: int
    threshold: float | None
    scheduler: Scheduler


def create_app(served: Served, config: ServeConfig, key: str | None) -> FastAPI:
    """Return the application. key: that clients must give, if any."""
    scheduler, metrics = served.scheduler, served.scheduler.metrics

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        scheduler.start(lambda texts: _wake(loop, texts))
        yield
        scheduler.stop(0)
        await asyncio.to_thread(scheduler.join)

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(given, key.encode()):
            message = "Authorization: got no valid key; send 'Bearer KEY' with the key of this server"
            raise RequestError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_middleware(_Counted, metrics=metrics)
    started = int(time.time())
    checked = [Depends(authorized)]
    _answer_errors(app)

    @app.post("/v1/completions", dependencies=checked)
    async def completions(request: Request) -> Response:
        asked = parsed(await _body(request, config.max_body_bytes))
        arrived = asyncio.Event()
        texts = _texts(asked, served, config, arrived.set)
        _submit(scheduler, texts)
        answer, pieces = Answer(asked, served.ids, texts), _arrivals(texts, arrived, config.timeout)
        if asked.stream:
            return _Stream(answer, pieces, scheduler, texts, config.timeout + _LATE)
        try:
            found = await _unless_gone(request, _all(pieces))
        finally:
            scheduler.cancel(texts)
        return JSONResponse(answer.whole(answer.echoes() + found))

    @app.get("/v1/models", dependencies=checked)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, started)]}

    @app.get("/v1/models/{name:path}", dependencies=checked)
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, served)
        return _model(served, started)

    @app.get("/metrics", dependencies=checked)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        return PlainTextResponse("ok\n")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page(served.name, served.blocks, served.threshold, config.max_tokens), headers=headers())

    return app


# --------------------------------------------------------------------------------------------- texts


def _texts(asked: CompletionRequest, served: Served, config: ServeConfig, wake: Callable[[], None]) -> list[Text]:
    """Return the texts that a request asks for; n of each prompt, with consecutive seeds.

    Raises:
        RequestError: they are beyond a limit, or the model cannot continue them.
    """
    _check_model(asked.model, served)
    most = config.rows + config.queue
    if len(asked.prompt) * asked.n > most:
        message = f"prompt: got {len(asked.prompt)} prompts with n = {asked.n}, allowed at most {most} texts"
        raise RequestError(message, param="prompt")
    if asked.max_tokens > config.max_tokens:
        message = f"max_tokens: got {asked.max_tokens}, allowed at most {config.max_tokens}"
        raise RequestError(message, param="max_tokens")
    if asked.depth_threshold is not None and served.threshold is None:
        message = f"depth_threshold: got {asked.depth_threshold}, but {served.name} has no adaptive depth; leave it out"
        raise RequestError(message, param="depth_threshold")
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    wanted = [
        Wanted(
            sampling=asked.sampling,
            limit=asked.max_tokens,
            stop=tuple(asked.stop),
            seed=seed + i,
            threshold=asked.depth_threshold,
            logprobs=asked.logprobs,
            scores_prompt=asked.scores_prompt,
            blocks=asked.blocks,
        )
        for i in range(asked.n)
    ]
    prompts = [_ids(prompt, served, config.max_prompt_tokens) for prompt in asked.prompt]
    listed = asked.n * sum(asked.max_tokens + asked.scores_prompt * len(ids) for ids in prompts)
    name = "blocks" if asked.logprobs is None else "logprobs"
    if (asked.logprobs is not None or asked.blocks) and listed > (
        limit := config.max_prompt_tokens + config.max_tokens
    ):
        raise RequestError(f"{name}: got {listed} tokens to list in all texts, allowed at most {limit}", param=name)
    return [Text(served.ids, ids, served.vocabulary, want, wake) for ids in prompts for want in wanted]


def _ids(prompt: str | list[int], served: Served, most: int) -> list[int]:
    ids = served.ids.encode(prompt) if isinstance(prompt, str) else prompt
    check_ids(ids, served.vocabulary)
    if not ids:
        raise RequestError("prompt: got one without a token; give another text", param="prompt")
    if len(ids) > most:
        message = f"prompt: got {len(ids)} tokens, allowed at most {most}"
        raise RequestError(message, param="prompt", code="context_length_exceeded")
    return ids


def _submit(scheduler: Scheduler, texts: Sequence[Text]) -> None:
    try:
        scheduler.submit(texts)
    except BusyError as error:
        message = "the server is busy; send the request again after the seconds in Retry-After"
        raise RequestError(message, 429, code="server_busy", headers={"Retry-After": "1"}) from error
    except StoppingError as error:
        raise RequestError(str(error), 503, headers={"Retry-After": "5"}) from error


async def _arrivals(texts: Sequence[Text], arrived: asyncio.Event, seconds: float) -> Pieces:
    """Yield the pieces of texts as they come, each with the index of its text.

    Raises:
        RequestError: a text ended with an error, or not within some seconds.
    """
    deadline, left = time.monotonic() + seconds, len(texts)
    while left:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await arrived.wait()
        except TimeoutError as error:
            raise RequestError(f"the text took longer than the {seconds:g} s allowed", 504, code="timeout") from error
        arrived.clear()
        found = []
        for i, text in enumerate(texts):
            while text.news:
                piece = text.news.popleft()
                if piece.error is not None:
                    raise RequestError(piece.error, 503)
                left -= piece.finished is not None
                found.append((i, piece))
        yield found


async def _all(pieces: Pieces) -> list[tuple[int, Piece]]:
    return [piece async for some in pieces for piece in some]


async def _unless_gone(request: Request, found: Awaitable[Any]) -> Any:
    """Return what is found, and stop looking if the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    looking, leaving = asyncio.ensure_future(found), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((looking, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not looking.done():
            raise ClientDisconnect
        return looking.result()
    finally:
        looking.cancel()
        leaving.cancel()


class _Stream(StreamingResponse):
    """An answer as server-sent events. Its texts are cancelled if it does not reach its end."""

    def __init__(self, answer: Answer, pieces: Pieces, scheduler: Scheduler, texts: Sequence[Text], seconds: float):
        """Create an answer. seconds: after which a client that does not read it is left."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(answer, pieces), headers=headers, media_type="text/event-stream")
        self._scheduler, self._texts, self._seconds = scheduler, texts, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with contextlib.suppress(TimeoutError):  # uvicorn then closes the connection
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, send)
        finally:
            self._scheduler.cancel(self._texts)

    async def _events(self, answer: Answer, pieces: Pieces) -> AsyncIterator[bytes]:
        try:
            if echoes := answer.echoes():
                yield answer.chunk(echoes)
            async for some in pieces:
                yield answer.chunk(some)
            yield answer.end()
        except RequestError as error:
            yield event(error.content()) + DONE


def _wake(loop: asyncio.AbstractEventLoop, texts: Sequence[Text]) -> None:
    """Wake the tasks that wait for texts. It is called in the scheduler's thread."""

    def wake() -> None:
        for text in texts:
            text.wake()

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(wake)


# -------------------------------------------------------------------------------------- requests, errors


async def _body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: it is not announced as JSON, too long, or does not come.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # no other site's page may send this type without asking first
        got = request.headers.get("content-type", "")
        raise RequestError(f"Content-Type: got {shown(got)}, allowed 'application/json'", 415)
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise RequestError(f"body: got more than {most} bytes, allowed at most that", 413)
    except TimeoutError as error:
        message = f"body: did not come within {_BODY_SECONDS:g} s; send the request again"
        raise RequestError(message, 408, headers={"Connection": "close"}) from error
    return body


def _model(served: Served, created: int) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": created, "owned_by": "resnet-bk"}


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        message = f"model: got {name[:80]!r}, allowed {served.name!r}"
        raise RequestError(message, 404, param="model", code="model_not_found")


class _Counted:
    """Counts the answers of an application."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _answer_errors(app: FastAPI) -> None:
    """Give all errors the same form."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.content(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /v1/models and /v1/completions"
        headers = dict(error.headers) if error.headers else None
        return JSONResponse(RequestError(message, error.status_code).content(), error.status_code, headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # which nobody receives

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(RequestError("the server failed; its log says why", 500).content(), 500)
