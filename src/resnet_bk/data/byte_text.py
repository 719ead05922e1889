"""Texts as byte ids, without torch and tokenizers: byte b has the id b + 3."""

import codecs

from resnet_bk.config import BYTE_OFFSET, END_OF_DOCUMENT


def _bytes(token: int) -> bytes:
    """Return the byte of an id, nothing for special ids and for those beyond the bytes."""
    byte = token - BYTE_OFFSET
    return bytes([byte]) if 0 <= byte < 256 else b""


class ByteText:
    """The byte tokenizer, as far as generation needs it.

    Attributes:
        end: the id that ends a text.
    """

    end = END_OF_DOCUMENT

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [byte + BYTE_OFFSET for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids. Ids that are no byte are left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(_bytes, ids)).decode(errors="replace")

    def stream(self, prompt: list[int]) -> "ByteStream":
        """Return the stream of the text that follows a prompt, whole characters."""
        return ByteStream()


class ByteStream:
    """The text of one id after the other, in whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the text that an id completes."""
        return self._decoder.decode(_bytes(token))

    def finish(self) -> str:
        """Return what is left where the ids end within a character."""
        return self._decoder.decode(b"", final=True)
