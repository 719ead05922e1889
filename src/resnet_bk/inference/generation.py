"""The command ``resnet-bk generate``: continue a prompt.

torch and transformers are imported only where a model is not in the cache of :mod:`.engine_files`.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError, GenerateConfig, check_text, read_text, shown
from resnet_bk.data.byte_text import ByteText
from resnet_bk.folders import model_folder, warn
from resnet_bk.inference import engine_files
from resnet_bk.inference.continuation import Continuation, TextIds
from resnet_bk.inference.readers import EngineReader, ModelReader, Reader
from resnet_bk.inference.sampling import Sampling
from resnet_bk.report.terminal import Console, show, show_piece

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine
    from resnet_bk.hf import Tokenizer
    from resnet_bk.model import LanguageModel

_LONGEST_PROMPT = 1 << 24  # bytes
_SHORT_PROMPT = 1 << 15  # bytes that the engine reads, one at a time, sooner than torch is imported
_UNTIMED = 2  # tokens of a continuation before its clock starts: the prompt is read then, and code is compiled
_PAUSE = 0.02  # seconds between pieces of text on a terminal

Write = Callable[[str], None]


class Session:
    """A text that grows by prompts and continuations.

    Attributes:
        made, seconds: tokens generated after the first ones of each continuation, and the time that they took.
    """

    def __init__(self, reader: Reader, ids: TextIds, config: GenerateConfig, write: Write):
        """Begin an empty text. write: called with each piece of the text, whole characters, as soon as it is there."""
        self._reader, self._ids, self._config, self._write = reader, ids, config, write
        self._settings = Sampling(
            repetition_penalty=config.repetition_penalty,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        self._tokens: list[int] = []  # of the whole text
        self._read, self._turns = 0, 0  # number of tokens that the model has read; of continuations
        self.made, self.seconds = 0, 0.0

    @property
    def share(self) -> float | None:
        """Share of the blocks that ran for the generated tokens; None if it is not known."""
        return self._reader.share

    @property
    def new_engine(self) -> "Engine | None":
        """The engine that was compiled for this text, if it is of bytes and has the model's own settings."""
        return self._reader.new_engine if isinstance(self._ids, ByteText) and not self._config.speculate else None

    def extend(self, prompt: str) -> str:
        """Add a prompt and its continuation to the text, and return both.

        Raises:
            ConfigError: the text still has no token.
        """
        added = self._ids.encode(prompt) if self._tokens else _encoded(self._ids, prompt)
        self._tokens += added
        pieces = [self._ids.decode(added)]
        self._write(pieces[0])
        for piece in self._continue():
            pieces.append(piece)
            self._write(piece)
        return "".join(pieces)

    def _continue(self) -> Iterator[str]:
        """Yield the pieces of the next continuation."""
        text = Continuation(
            self._ids,
            self._tokens,
            self._reader.vocabulary,
            self._settings,
            limit=self._config.max_new_tokens,
            stop=self._config.stop,
            seed=self._config.seed + self._turns,
        )
        started, untimed, count = 0.0, 0, 1
        unread = self._tokens[self._read :]  # none where a text has ended and the next prompt has no token
        try:
            while text.finished is None:
                before = time.perf_counter()
                if not started and len(text.tokens) >= _UNTIMED:
                    started, untimed = before, len(text.tokens)
                chosen = self._write_some(text, unread, count)
                self._read += len(unread) + len(chosen) - 1
                unread = chosen[-1:]
                # as many at a time as take half of the pause between pieces
                each = (time.perf_counter() - before) / len(chosen)
                count = max(1, min(2 * count, int(_PAUSE / 2 / each)))
                yield text.take()
        finally:  # also after Ctrl-C
            if started:
                self.seconds += time.perf_counter() - started
                self.made += len(text.tokens) - untimed
        self._tokens += text.tokens
        self._turns += 1

    def _write_some(self, text: Continuation, unread: list[int], count: int) -> list[int]:
        """Read tokens, add up to `count` chosen ones to a text, and return these. All but the last one are read."""
        try:
            if not text.is_plain:
                return [text.add(self._reader.read(unread))]
            count = min(count, text.limit - len(text.tokens))
            chosen = self._reader.write(unread, text.sampler, count, text.end)
        except ValueError as error:
            raise CheckpointError(f"{self._config.checkpoint}: {error}") from error
        for token in chosen:
            text.accept(token)
        return chosen


class DraftSession:
    """A text by self-speculative decoding, for machines without the engine; see :class:`Session`."""

    made, seconds, share, new_engine = 0, 0.0, None, None  # not known: the whole text comes at the end

    def __init__(self, model: "LanguageModel", ids: TextIds, config: GenerateConfig, write: Write):
        self._model, self._ids, self._config, self._write = model, ids, config, write

    def extend(self, prompt: str) -> str:
        """Return a prompt and its continuation."""
        import torch

        from resnet_bk.inference.speculation import speculate

        tokens = _encoded(self._ids, prompt)
        drafts = speculate(self._model, torch.tensor([tokens]), self._config.max_new_tokens, self._config.speculate)
        found = drafts.tokens[0].tolist()
        text = self._ids.decode(tokens + (found[: found.index(self._ids.end)] if self._ids.end in found else found))
        self._write(text)
        return text


def _encoded(ids: TextIds, prompt: str) -> list[int]:
    tokens = ids.encode(prompt)
    if not tokens:
        raise ConfigError(f"generate.prompt: got {shown(prompt)}, which has no token; give another text")
    return tokens


def generate_text(
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    prompt: str,
    config: GenerateConfig,
    write: Write = lambda piece: None,
) -> str:
    """Return the prompt and its continuation by a model in evaluation mode; arguments as for :class:`Session`.

    Raises:
        ConfigError: the prompt has no token; config.speculate is set and the model has no early exit; or config.weights
            is int8 and the engine cannot be used.
    """
    return session(model, tokenizer, config, write).extend(prompt)


def session(
    model: "LanguageModel", tokenizer: "Tokenizer", config: GenerateConfig, write: Write
) -> Session | DraftSession:
    """Return a session with a model; errors as for :func:`generate_text`.

    With config.speculate and the engine, the model's exits are closed for good: their threshold becomes 1.
    """
    from resnet_bk.engine.decoder import decoder_of
    from resnet_bk.hf import text_ids
    from resnet_bk.inference.speculation import exits

    decoder = decoder_of(model)
    if config.weights == "int8" and not decoder.uses_engine():
        raise ConfigError("generate.weights: got 'int8', allowed with the engine, which needs a CPU and numba")
    if config.speculate:
        try:
            layer = exits(model)
        except ValueError as error:
            raise ConfigError(f"generate.speculate: {error}") from error
        if not decoder.uses_engine():
            return DraftSession(model, text_ids(tokenizer), config, write)
        layer.threshold = 1.0  # all blocks, as the text of drafts is verified by
    reader: Reader = ModelReader(model, decoder)
    if config.weights == "int8":
        from resnet_bk.engine.compiler import engine_of

        reader = EngineReader(engine_of(model, int8=True), is_new=True)
    return Session(reader, text_ids(tokenizer), config, write)


def keep_engine(model: "LanguageModel", tokenizer: "Tokenizer", folder: Path) -> None:
    """Put the engine of a model, if it has decoded, into the cache for a model folder; with the byte tokenizer only."""
    from resnet_bk.engine.decoder import decoder_of
    from resnet_bk.hf import text_ids

    engine, place = decoder_of(model).engine, engine_files.place(folder, "float32", None)
    if engine is not None and place is not None and isinstance(text_ids(tokenizer), ByteText):
        engine_files.store(engine, place)


class _Screen:
    """Prints pieces of a text, several at a time where they come faster than anybody reads."""

    def __init__(self, console: Console):
        self._console, self._pieces, self._shown = console, [""], 0.0

    def write(self, piece: str) -> None:
        self._pieces.append(piece)
        if time.perf_counter() - self._shown > _PAUSE:
            self.flush()

    def flush(self) -> None:
        show_piece(self._console, "".join(self._pieces))
        self._pieces, self._shown = [], time.perf_counter()


def generate(config: GenerateConfig, console: Console) -> None:
    """Run the command: continue a prompt, and lines of standard input if asked to.

    The text appears as it is made. Its speed, and the share of the blocks that ran, go to standard error.
    """
    prompt, screen = _read_prompt(config), _Screen(console)
    messages: list[str] = []
    folder = engine = None
    with contextlib.suppress(CheckpointError):  # the model is being replaced, or `_load` says what is wrong with it
        path = model_folder(config.checkpoint, messages.append)
        folder = engine_files.place(path, config.weights, config.depth_threshold)
    if folder is not None and len(prompt.encode()) <= _SHORT_PROMPT and not config.speculate:
        engine = engine_files.stored(folder)
    if engine is None:
        text, path = _load(config, screen.write)  # which has the same messages
        if engine_files.place(path, config.weights, config.depth_threshold) != folder:
            folder = None  # another model has been saved meanwhile
    else:
        for message in messages:
            warn(message)
        text = Session(EngineReader(engine), ByteText(), config, screen.write)
    try:
        _write_text(text, prompt, config, screen)
    finally:  # also after Ctrl-C
        screen.flush()
        show(console, "")
        if text.seconds:
            share = f", {text.share:.0%} of the blocks" if text.share is not None else ""
            speed = f"{text.made:,} tokens in {text.seconds:.3f} s, {text.made / text.seconds:,.0f} a second"
            print(speed + share, file=sys.stderr)
    if folder is not None and text.new_engine is not None:
        engine_files.store(text.new_engine, folder)


def _load(config: GenerateConfig, write: Write) -> tuple[Session | DraftSession, Path]:
    """Return a session with a loaded model, and the folder of the model."""
    from resnet_bk.hf import quiet_transformers
    from resnet_bk.inference.loading import load

    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    return session(model.model, tokenizer, config, write), Path(str(model.name_or_path))


def _write_text(text: Session | DraftSession, prompt: str, config: GenerateConfig, screen: _Screen) -> None:
    text.extend(prompt)
    while config.interactive:
        screen.flush()
        print("\n> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            break
        check_text("generate", prompt=line)
        text.extend(line)


def _read_prompt(config: GenerateConfig) -> str:
    """Return the prompt, which may come from standard input."""
    if config.prompt != "-":
        return config.prompt
    prompt = read_text("generate.prompt", "-", _LONGEST_PROMPT + 4)  # a character may be cut
    if len(prompt.encode()) > _LONGEST_PROMPT:
        raise ConfigError(f"generate.prompt: got more than {_LONGEST_PROMPT} bytes, allowed at most that; give less")
    check_text("generate", prompt=prompt)
    return prompt
