"""The command ``resnet-bk serve``: load a model, listen, and stop when a signal comes."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError, ServeConfig, read_limited
from resnet_bk.data.byte_text import ByteText
from resnet_bk.engine import asked
from resnet_bk.extras import extra
from resnet_bk.folders import MODEL, model_folder, warn
from resnet_bk.inference import engine_files
from resnet_bk.inference.continuation import TextIds
from resnet_bk.report.terminal import Console, say
from resnet_bk.serve.app import Served, create_app
from resnet_bk.serve.connections import Connection
from resnet_bk.serve.metrics import Metrics
from resnet_bk.serve.scheduler import Scheduler

with extra("serve"):
    import uvicorn

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine

KEY = "RESNET_BK_API_KEY"
_LATE = 2.0  # seconds after `grace` in which answers that have ended are sent
_IDLE = 30  # seconds after which a connection without a request is closed


class _Server(uvicorn.Server):
    """A server that a signal ends as one that has done its work. A second signal does not wait for texts."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float):
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.stop(0 if self.force_exit else self._grace)
        asyncio.get_running_loop().call_later(self._grace + _LATE, self._leave)
        await super().shutdown(sockets)

    def _leave(self) -> None:
        """Leave the clients that do not read their answers."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(config: ServeConfig, console: Console) -> None:
    """Run the command. It returns after SIGINT or SIGTERM.

    Raises:
        ConfigError: the engine cannot decode the model here, or the address cannot be used.
    """
    key = _key(config)
    listening = _socket(config)
    try:
        served = load(config)
        host, port = listening.getsockname()[:2]
        if key is None and config.host not in ("127.0.0.1", "::1", "localhost"):
            warn(f"whoever reaches {host}:{port} may use this server; set {KEY} to a key that clients must give")
        app = create_app(served, config, key)
        settings = uvicorn.Config(
            app,
            http=Connection,
            access_log=False,
            log_level="warning",
            server_header=False,
            ws="none",
            timeout_keep_alive=_IDLE,
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(console, f"{served.name} at http://{address}/ and http://{address}/v1; Ctrl-C ends it")
        _Server(settings, served.scheduler, config.grace).run([listening])
    finally:
        listening.close()


def load(config: ServeConfig) -> Served:
    """Return the model of the settings with a scheduler, which is not started.

    Raises:
        ConfigError: the engine cannot decode the model here.
    """
    if asked() is False:
        raise ConfigError("RESNET_BK_ENGINE: got '0', allowed 1 for serve, which decodes by the engine; unset it")
    engine, ids = _compiled(config)
    engine.step((0,), engine.start())  # numba compiles now, not while a client waits
    engine.read([(0,), (0,)], engine.start(2))
    thresholds = engine.code.thresholds
    threads = config.threads or max(1, (os.cpu_count() or 1) - 1)
    return Served(
        name=config.name or _name(config.checkpoint),
        ids=ids,
        vocabulary=engine.code.vocabulary,
        blocks=engine.code.blocks,
        threshold=min(1.0, thresholds[0].first) if thresholds else None,
        scheduler=Scheduler(engine, config.rows, config.queue, threads, Metrics()),
    )


def _compiled(config: ServeConfig) -> tuple["Engine", TextIds]:
    """Return the engine of a model, from the cache if it is there, and its texts as ids."""
    messages: list[str] = []
    place = stored = None
    with contextlib.suppress(CheckpointError):  # `load_model` says what is wrong
        place = engine_files.place(
            model_folder(config.checkpoint, messages.append), config.weights, config.depth_threshold
        )
    if place is not None:
        stored = engine_files.stored(place)
    if stored is not None:
        for message in messages:
            warn(message)
        return stored, ByteText()
    import torch

    from resnet_bk.hf import quiet_transformers, text_ids
    from resnet_bk.inference.loading import load as load_model

    try:
        from resnet_bk.engine.compiler import engine_of
    except ImportError as error:
        raise ConfigError(f"serve: the engine needs numba ({error}); run: pip install 'resnet-bk[cpu-fast]'") from error
    quiet_transformers()
    whole, tokenizer = load_model(config.checkpoint, config.depth_threshold)
    if engine_files.place(Path(str(whole.name_or_path)), config.weights, config.depth_threshold) != place:
        place = None  # another model has been saved meanwhile
    model, ids = whole.model.to("cpu", torch.float32), text_ids(tokenizer)
    if not model.config.causal:
        raise ConfigError(f"serve.checkpoint: {config.checkpoint} is bidirectional, allowed causal models")
    with torch.no_grad():
        engine = engine_of(model, config.weights == "int8")
    if place is not None and isinstance(ids, ByteText):
        engine_files.store(engine, place)
    return engine, ids


def _name(checkpoint: str) -> str:
    folder = Path(checkpoint).resolve()
    return (folder.parent if folder.name == MODEL else folder).name or "model"


def _key(config: ServeConfig) -> str | None:
    """Return the key that clients must give, from a file or from the environment."""
    if config.api_key_file is None:
        key, where = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        where = "serve.api_key_file"
        if not Path(config.api_key_file).is_file():
            raise ConfigError(f"{where}: {config.api_key_file} is not a file; give one with a key in it")
        key = read_limited(where, Path(config.api_key_file), 1024).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{where}: allowed one line of printable ASCII characters as a key; write one")
    return key


def _socket(config: ServeConfig) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        ConfigError: the address cannot be used.
    """
    where = f"{config.host} port {config.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be the name of a host
        why = str(getattr(error, "strerror", "not a name")).partition(" (while")[0]
        hint = "choose another port, or 0 for any free one"
        raise ConfigError(f"serve.host, serve.port: cannot listen on {where} ({why}); {hint}") from error
