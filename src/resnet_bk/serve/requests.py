"""Requests of clients: the fields of a completion request, and errors in the form of OpenAI's."""

from typing import Any

from resnet_bk.config import shown, unknown_field
from resnet_bk.extras import extra
from resnet_bk.inference.sampling import Sampling

with extra("serve"):
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MOST_STOPS, MOST_LOGPROBS, MOST_CHOICES = 4, 20, 128
# Fields of the API that this server does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, str]] = {
    "presence_penalty": (0, "0; repetition_penalty is similar"),
    "frequency_penalty": (0, "0; repetition_penalty is similar"),
    "logit_bias": ({}, "{}"),
    "suffix": ("", "'': the model only reads what comes before"),
}


class RequestError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: the error's name, if it has one.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def content(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a stream: its last chunk may tell the number of tokens."""

    include_usage: bool = False


class CompletionRequest(_Strict):
    """The body of ``POST /v1/completions``. A field that is null has its default.

    Beyond OpenAI's fields there are top_k, min_p, repetition_penalty, depth_threshold and `blocks`, which lists the
    blocks that ran for each token.
    """

    model: str
    prompt: list[str | list[int]]
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=1e-6, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    stop: list[str] = []
    seed: int | None = Field(None, ge=0, lt=2**63)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    depth_threshold: float | None = Field(None, ge=0, le=1)
    blocks: bool = False
    user: str | None = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    suffix: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        """Return a list of prompts: of one text, of several, of one list of ids, or of several."""
        prompts = [value] if isinstance(value, str) or _are_ids(value) else value
        if not (isinstance(prompts, list) and prompts):
            prompts = [None]
        if not (all(isinstance(x, str) for x in prompts) or all(map(_are_ids, prompts))):
            raise ValueError("allowed a text, a list of texts, a list of token ids, or a list of such lists")
        return prompts

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) > MOST_STOPS or not all(isinstance(x, str) and x for x in value):
            raise ValueError(f"allowed a text, or a list of at most {MOST_STOPS} texts, none of them empty")
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if 0 < value < 1e-6:  # logits divided by it could overflow
            raise ValueError("allowed 0, or 1e-06 to 100")
        return value

    @field_validator(*_NEUTRAL)
    @classmethod
    def _nothing(cls, value: Any, info: Any) -> None:
        neutral, allowed = _NEUTRAL[info.field_name]
        if value != neutral or isinstance(value, bool):
            raise ValueError(f"allowed {allowed}")

    @model_validator(mode="after")
    def _together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: got {self.best_of}, allowed the value of n, {self.n}; choose among n texts")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: got options without a stream, allowed with stream = true")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens: got 0, allowed 1 or more, or 0 with echo = true")
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def scores_prompt(self) -> bool:
        """True if the log-probabilities of the prompt's tokens are asked for."""
        return self.echo and self.logprobs is not None


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(x) is int for x in value)


def parsed(body: bytes) -> CompletionRequest:
    """Return the request in a body.

    Raises:
        RequestError: it cannot be read; the message names the first field that is wrong.
    """
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as errors:
        first: Any = errors.errors(include_url=False)[0]
        names = list(map(str, first["loc"]))
        line = _line(first, ".".join(names))
        raise RequestError(line, param=names[0] if names else line.partition(":")[0]) from errors


def _line(error: Any, field: str) -> str:
    """Return an error of pydantic as one line: the field, what it got, what is allowed."""
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"body: is not JSON ({message}); send an object as application/json"
    if kind == "missing":
        return f"{field}: is missing; give one"
    if kind == "extra_forbidden":
        known = [*CompletionRequest.model_fields] if "." not in field else [*StreamOptions.model_fields]
        where, _, name = f"completions.{field}".rpartition(".")
        return str(unknown_field(name, known, where))
    if not field:
        return message if kind == "value_error" else f"body: got {shown(error['input'])}, allowed a JSON object"
    return f"{field}: got {shown(error['input'])}, {message[:1].lower()}{message[1:]}"


def check_ids(prompt: list[int], vocabulary: int) -> None:
    """Raise RequestError unless all ids are in the vocabulary."""
    if prompt and not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = next(i for i in prompt if not 0 <= i < vocabulary)
        raise RequestError(f"prompt: got the token id {shown(wrong)}, allowed 0 to {vocabulary - 1}", param="prompt")
