"""The connections of clients, with limits for requests that never come, and errors in one form."""

import json
from asyncio import TimerHandle, Transport
from typing import Any

from resnet_bk.extras import extra
from resnet_bk.serve.requests import RequestError

with extra("serve"):
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT = 2**20  # bytes of a request line and its headers


class Connection(HttpToolsProtocol):
    """A connection that is closed if the head of a request is too large, or does not come within some seconds."""

    _timer: TimerHandle | None = None  # runs while a head is expected or incomplete
    _head = 0  # bytes received meanwhile

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._earlier: list[Any] = []  # cycles that had not ended when the client sent the next request
        self._expect_head()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    @property
    def _answers(self) -> bool:
        """True while an answer is being written; uvicorn may not read further requests meanwhile."""
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up(self) -> None:
        self._timer = None
        if self._answers:
            self._expect_head()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._answers:  # uvicorn has stopped its own timer, whatever came
            self._expect_head()
        if self._timer is not None:
            self._head += len(data)
            if self._head > HEAD_LIMIT and not self.transport.is_closing():
                self.send_400_response(f"HTTP: got more than {HEAD_LIMIT} bytes of headers, allowed at most that")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        if self._answers:
            self._earlier = [cycle for cycle in self._earlier if not cycle.response_complete] + [self.cycle]
        super().on_headers_complete()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._head = None, 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        for cycle in self._earlier:  # uvicorn tells only the last one that its client has left
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer with an error in the form of all others, and close the connection."""
        body = json.dumps(RequestError(msg).content()).encode()
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
