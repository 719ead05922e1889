"""Answers to clients: the JSON of completions, whole and as chunks of a stream, as OpenAI's clients read it."""

import json
import time
import uuid
from typing import Any

from resnet_bk.config import BYTE_OFFSET
from resnet_bk.data.byte_text import ByteText
from resnet_bk.inference.continuation import TextIds
from resnet_bk.serve.requests import CompletionRequest
from resnet_bk.serve.texts import Piece, Text, Token

DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Answer:
    """The answer to one request, made of the pieces of its texts. Text i of n to prompt p has the index n p + i."""

    def __init__(self, asked: CompletionRequest, ids: TextIds, texts: list[Text]):
        self._asked, self._ids, self._texts = asked, ids, texts
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = asked.model
        self._offsets = [0] * len(texts)  # characters of each choice so far

    def echoes(self) -> list[tuple[int, Piece]]:
        """Return pieces with the prompts, if the client wants them back."""
        if not self._asked.echo:
            return []
        return [(i, Piece(self._ids.decode(text.prompt), [])) for i, text in enumerate(self._texts)]

    def chunk(self, pieces: list[tuple[int, Piece]]) -> bytes:
        """Return events for pieces, with the index of each one's text."""
        more = {"usage": None} if self._includes_usage else {}
        return b"".join(event(self._head | {"choices": [self._choice(i, piece)]} | more) for i, piece in pieces)

    def end(self) -> bytes:
        """Return the events at the end of a stream."""
        return (event(self._head | {"choices": [], "usage": self.usage()}) if self._includes_usage else b"") + DONE

    def whole(self, pieces: list[tuple[int, Piece]]) -> dict[str, Any]:
        """Return the answer that is no stream, given all pieces."""
        choices = []
        for i in range(len(self._texts)):
            own = [piece for at, piece in pieces if at == i]
            tokens = [token for piece in own for token in piece.tokens]
            choices.append(self._choice(i, Piece("".join(piece.text for piece in own), tokens, own[-1].finished)))
        return self._head | {"choices": choices, "usage": self.usage()}

    @property
    def _includes_usage(self) -> bool:
        return self._asked.stream_options is not None and self._asked.stream_options.include_usage

    def usage(self) -> dict[str, int]:
        read = sum(len(text.prompt) for text in self._texts[:: self._asked.n])
        made = sum(len(text.continuation.tokens) for text in self._texts)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": piece.text, "index": index, "logprobs": None}
        choice["finish_reason"] = piece.finished
        if self._asked.logprobs is not None and piece.tokens:
            choice["logprobs"] = self._logprobs(index, piece.tokens)
        if self._asked.blocks:
            choice["blocks"] = [[token.text, token.blocks] for token in piece.tokens]
        return choice

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        top = [{self._name(i): x for i, x in token.top.items()} if token.top else None for token in tokens]
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if self._asked.logprobs else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """Return a token as a text. Bytes that are no characters, and special tokens, have names."""
        text = self._ids.decode([token])
        if text == "\ufffd" and isinstance(self._ids, ByteText):
            return f"bytes:\\x{token - BYTE_OFFSET:02x}"
        return text or f"<{token}>"
