"""The command ``resnet-bk generate``: continue a prompt."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_bk.config import ConfigError, GenerateConfig, check_text, read_text, shown
from resnet_bk.engine.decoder import Decoder, decoder_of
from resnet_bk.engine.state import EngineState
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, quiet_transformers, text_stream
from resnet_bk.inference.decoding import choose
from resnet_bk.inference.loading import load
from resnet_bk.inference.speculation import speculate
from resnet_bk.model import LanguageModel
from resnet_bk.report.terminal import Console, show, show_piece

_LONGEST_PROMPT = 1 << 24  # bytes


def generate_text(
    model: ResNetBKForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: GenerateConfig,
    write: Callable[[str], None] | None = None,
) -> str:
    """Return the prompt and its continuation.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        prompt: text of one token or more.
        config: settings of sampling.
        write: called with each piece of the text, whole characters, as soon as it is there.

    Raises:
        ConfigError: the prompt has no token, or config.speculate is set and the model has no early exit.
    """
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)["input_ids"]
    if ids.numel() == 0:
        raise ConfigError(f"generate.prompt: got {shown(prompt)}, which has no token; give another text")
    write = write or (lambda piece: None)
    found, text = ids[0].tolist(), str(tokenizer.decode(ids[0], skip_special_tokens=True))
    write(text)
    completed = text_stream(tokenizer)
    for token in _tokens(model.model, ids, tokenizer.eos_token_id, config):
        found.append(token)
        if piece := completed(token):
            text += piece
            write(piece)
    whole = str(tokenizer.decode(found, skip_special_tokens=True))
    if whole.startswith(text) and whole != text:  # it ends within a character
        write(whole[len(text) :])
    return whole


def _tokens(model: LanguageModel, ids: Tensor, end: int | None, config: GenerateConfig) -> Iterator[int]:
    """Yield the tokens that follow ids (1, N), up to the end of the text.

    Raises:
        ConfigError: config.speculate is set and the model has no early exit, or config.weights is int8 and the engine
            cannot be used.
    """
    if config.speculate:
        try:
            drafts = speculate(model, ids, config.max_new_tokens, config.speculate)
        except ValueError as error:
            raise ConfigError(f"generate.speculate: {error}") from error
        found = drafts.tokens[0].tolist()
        yield from found[: found.index(end)] if end in found else found
        return
    torch.manual_seed(config.seed)
    with torch.no_grad():
        features = model.features(ids)
    logits = model.head(features.x[:, -1]).detach()
    decoder = decoder_of(model) if config.weights == "float32" else Decoder(model, int8=True)
    state: Sequence[Any] | EngineState = features.state
    for i in range(config.max_new_tokens):
        token = choose(logits, config.temperature, config.top_p)
        if token.item() == end:
            return
        yield int(token)
        if i + 1 < config.max_new_tokens:
            with torch.no_grad():
                logits, state = decoder.step(token.unsqueeze(1), state)
            if config.weights == "int8" and not isinstance(state, EngineState):
                raise ConfigError("generate.weights: got 'int8', allowed with the engine, which needs a CPU and numba")


def generate(config: GenerateConfig, console: Console) -> str:
    """Run the command: continue a prompt, print and return prompt and continuation.

    The text appears as it is made. Its speed goes to standard error.
    """
    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    pieces: list[tuple[float, int]] = []  # when each came, and its bytes

    def write(piece: str) -> None:
        pieces.append((time.perf_counter(), len(piece.encode())))
        show_piece(console, piece)

    text = generate_text(model, tokenizer, _read_prompt(config), config, write)
    show(console, "")
    if len(pieces) > 2 and not config.speculate:  # the first piece waits for compiled code, and drafts come at the end
        seconds, made = pieces[-1][0] - pieces[1][0], sum(size for _, size in pieces[2:])
        print(f"{made} bytes in {seconds:.3f} s, {made / seconds:,.0f} bytes/s", file=sys.stderr)
    return text


def _read_prompt(config: GenerateConfig) -> str:
    """Return the prompt, which may come from standard input."""
    if config.prompt != "-":
        return config.prompt
    prompt = read_text("generate.prompt", "-", _LONGEST_PROMPT + 4)  # a character may be cut
    if len(prompt.encode()) > _LONGEST_PROMPT:
        raise ConfigError(f"generate.prompt: got more than {_LONGEST_PROMPT} bytes, allowed at most that; give less")
    check_text("generate", prompt=prompt)
    return prompt
