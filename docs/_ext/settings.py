"""Directives that write the settings of the commands and of the models from the dataclasses of `resnet_bk.config`.

``{command} train`` writes a command's usage, and its settings without those of the sections in them.
``{settings} multiscale`` writes those of a section of TrainConfig, named as on the command line: `model`, `data`,
`model.multiscale`. Each setting is an option of Sphinx, so that the search finds it, and can be linked to.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

import docstring_parser
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from resnet_bk import cli
from resnet_bk.config import TrainConfig, all_fields, in_words, is_section


def default(field: Field) -> str:
    """Return the default of a setting as YAML writes it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "required"
    return f"default `{value if isinstance(value, str) else json.dumps(value)}`"


def markdown(text: str) -> str:
    """Return a help text as Markdown: what is between backticks is a literal, nothing else has a meaning."""
    parts = text.split("`")
    return "`".join(x if i % 2 else re.sub(r"([\\*_<\[\]])", r"\\\1", x) for i, x in enumerate(parts))


def option(name: str, field: Field, text: str) -> Iterator[str]:
    """Yield the lines of one setting: name, allowed values, default, and help text."""
    given = default(field)
    allowed = re.sub("'([^']*)'", r"`\1`", in_words(field.type))
    yield f"```{{option}} {name.upper() if given == 'required' else f'--{name}'}"
    yield f"{markdown(allowed)}; {given}"
    yield ""
    yield markdown(text)
    yield "```"
    yield ""


def section(kind: type, prefix: str = "") -> list[str]:
    """Return the lines of all settings of a dataclass, without those of sections in it."""
    texts = {found.arg_name: found.description or "" for found in docstring_parser.parse_from_object(kind).params}
    inner = [f for f in fields(kind) if is_section(f.type)]
    lines = [line for f in fields(kind) if f not in inner for line in option(prefix + f.name, f, texts[f.name])]
    names = ", ".join(f"`--{prefix}{f.name}.…`" for f in inner)
    return [*([f"Further settings, each with a section of its own: {names}.", ""] if inner else []), *lines]


class _Generated(SphinxDirective):
    required_arguments = 1

    def lines(self, name: str) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(self.lines(self.arguments[0])))


class Command(_Generated):
    """A command: what it does, its usage line, its settings."""

    def lines(self, name: str) -> list[str]:
        kind, text = cli.COMMANDS[name]
        usage = " ".join(["resnet-bk", name, *cli._positional(name).values(), "[--config FILE] [--SETTING VALUE ...]"])
        return [text, "", "```text", usage, "```", "", f"```{{program}} resnet-bk {name}", "```", "", *section(kind)]


class Settings(_Generated):
    """The settings of a section of a training."""

    def lines(self, name: str) -> list[str]:
        kind: Any = all_fields(TrainConfig)[name]
        return [kind.__doc__ or "", "", "```{program} resnet-bk train", "```", "", *section(kind, f"{name}.")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("command", Command)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "version": "1"}
