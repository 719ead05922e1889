"""Checks of settings and of the YAML files that hold them. A failed check is an error message of one line."""

import codecs
import difflib
import sys
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of the command line; it refuses a little more
_UNIONS = (types.UnionType, Union)  # of int | None, and of Literal[...] | None
_LARGEST_YAML, _DEEPEST_YAML = 1 << 16, 10  # bytes, levels

# Control characters and overrides of the text direction, which a terminal obeys; surrogates, which UTF-8 cannot encode.
_INVISIBLE = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_VISIBLE = {code: f"\\u{code:04x}" for code in _INVISIBLE} | {code: chr(0x2400 + code) for code in range(0x20)}
_VISIBLE |= {0x7F: "\N{SYMBOL FOR DELETE}", ord("\n"): "\n", ord("\t"): "\t"}


class ConfigError(ValueError):
    """A setting that cannot be used. The message names it, its value and the values allowed."""


def shown(value: object) -> str:
    """Return a value as an error message quotes it: on one line, at most 80 characters.

    No more than those are formatted, so a giant value costs neither time nor memory.
    """
    text = ""
    try:
        for piece in _repr(value):
            text += piece
            if len(text) > 80:
                return text[:77] + "..."
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "an integer too long to print"
    return text


def visible(text: str) -> str:
    """Return a text in which each character that a terminal would obey is a symbol or an escape.

    Line ends and tabs stay.
    """
    return text.translate(_VISIBLE)


def _repr(value: object) -> Iterator[str]:
    """Yield in pieces the repr of a value that a file can hold; of a long text only the beginning."""
    if type(value) is dict:
        yield "{"
        for i, (name, inner) in enumerate(value.items()):
            yield ", " * (i > 0)
            yield from _repr(name)
            yield ": "
            yield from _repr(inner)
        yield "}"
    elif type(value) is list:
        yield "["
        for i, inner in enumerate(value):
            yield ", " * (i > 0)
            yield from _repr(inner)
        yield "]"
    else:
        yield repr(value[:80] if isinstance(value, str | bytes) else value)


def unknown_field(name: object, known: list[str], where: str) -> ConfigError:
    """Return the error for a field that is not `known`; it suggests the most similar name."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(known))}"
    return ConfigError(f"{where}: unknown field {shown(name)}; {hint}")


def check_range(where: str, low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed {low} to {high}")


def check_integer(where: str, low: int, high: int, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed an integer from {low} to {high}")


def integers(where: str, name: str, values: Any, low: int, high: int) -> tuple[int, ...]:
    """Return a list of integers from low to high as a tuple."""
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where}.{name}: got {shown(values)}, allowed a list of integers")
    check_integer(where, low, high, **{f"{name}[{i}]": value for i, value in enumerate(values)})
    return tuple(values)


def check_choice(where: str, allowed: tuple[str, ...], **values: str) -> None:
    for name, value in values.items():
        if value not in allowed:
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed {', '.join(map(repr, allowed))}")


def check_choices(where: str, settings: Any) -> None:
    """Check the fields of a dataclass whose type lists texts to choose from, or is bool."""
    for f in fields(settings):
        kinds, value = (f.type, *get_args(f.type)), getattr(settings, f.name)
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        if choices and isinstance(choices[0], str) and not (value is None and type(None) in kinds):
            check_choice(where, choices, **{f.name: value})
        if f.type is bool and type(value) is not bool:
            raise ConfigError(f"{where}.{f.name}: got {shown(value)}, allowed true or false")


def check_text(where: str, **values: str) -> None:
    """Raise ConfigError unless each value is a non-empty text that UTF-8 can encode, without NUL characters."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed text")
        if not value:
            raise ConfigError(f"{where}.{name}: is empty; give at least one character")
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed UTF-8 text without NUL characters")


def check_fields(where: str, kind: type, values: Any) -> None:
    """Raise ConfigError unless `values` is a mapping whose keys are fields of the dataclass `kind`, nested ones too."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: got {shown(values)}, allowed a mapping of fields to values")
    known = {f.name: f.type for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise unknown_field(name, list(known), where)
        inner = known[name]
        if isinstance(inner, type) and is_dataclass(inner) and not isinstance(value, inner):
            check_fields(f"{where}.{name}", inner, value)
        if get_origin(inner) is list and not isinstance(value, list):
            raise ConfigError(f"{where}.{name}: got {shown(value)}, allowed {in_words(inner)}")


def read_limited(where: str, path: Path, limit: int) -> str:
    """Return the text of a file.

    Args:
        where: the setting that names the file, for messages.
        path: the file.
        limit: bytes allowed.

    Raises:
        ConfigError: the file has more bytes, or it is not UTF-8.
    """
    size, data = path.stat().st_size, b""
    if size <= limit:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # it may have grown, and some files of the system have the size 0
    if max(size, len(data)) > limit:
        raise ConfigError(f"{where}: {path} has {max(size, len(data))} bytes, allowed at most {limit}")
    return _decoded(where, str(path), data)


def read_text(where: str, name: str, limit: int) -> str:
    """Return the beginning of a text: of a file, or of standard input if the name is "-".

    Args:
        where: the setting that names the file, for messages.
        name: the file.
        limit: bytes to read at most. A character that they cut is left out.

    Raises:
        ConfigError: there is no such file, or the text is not UTF-8.
    """
    if name == "-":
        name = "standard input"
        try:
            data = sys.stdin.buffer.read(limit)
        except OSError as error:
            raise ConfigError(f"{where}: {name} cannot be read ({error.strerror}); name a file instead") from error
    elif Path(name).is_file():
        with Path(name).open("rb") as file:
            data = file.read(limit)
    else:
        raise ConfigError(f"{where}: {name} is not a file; give a text file, or '-'")
    return _decoded(where, name, data, is_whole=len(data) < limit)


def _decoded(where: str, name: str, data: bytes, is_whole: bool = True) -> str:
    """Decode UTF-8. is_whole: False if the data may end within a character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, is_whole)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def read_yaml(where: str, name: str | Path, wanted: str = "a YAML file") -> Any:
    """Return the content of a YAML file. Its size, its depth and its aliases are limited, so no file fills the memory.

    Args:
        where: the setting that names the file, for messages.
        name: the file.
        wanted: the kind of file to ask for when there is none.

    Raises:
        ConfigError: the file is missing, is not plain YAML, or exceeds a limit.
    """
    try:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{where}: {shown(str(name))} is not a file; give {wanted}")
        text = read_limited(where, path, _LARGEST_YAML)
        check_yaml(f"{where}: {name}", text)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: {name} is not plain YAML{at}: {problem}; correct it there") from error
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:  # '!!int ""' is an IndexError
        raise ConfigError(f"{where}: {shown(str(name))} cannot be read as YAML ({error})") from error


def check_yaml(where: str, text: str) -> None:
    """Raise ConfigError if loading a YAML text could fill the memory, or would leave a value out.

    Args:
        where: the place of the text, for messages.
        text: the text.

    Raises:
        ConfigError: the text has an alias or a key twice, or nests too deep.
        YAMLError: the text is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):  # a few lines of aliases can expand to gigabytes
            raise ConfigError(f"{where} has a YAML alias (*name), not allowed; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ConfigError(f"{where} nests deeper than the {_DEEPEST_YAML} levels allowed")
    _check_keys(where, yaml.compose(text, _Loader))


def _check_keys(where: str, node: yaml.Node | None) -> None:
    """Raise ConfigError if a mapping has a key twice: YAML would take the last value."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(where, item)
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            name = (key.tag, str(key.value))
            if name in keys:
                line = key.start_mark.line + 1
                raise ConfigError(f"{where} has {shown(name[1])} a second time, at line {line}; keep one of them")
            keys.add(name)
            _check_keys(where, value)


def is_section(kind: Any) -> bool:
    """Return True if a setting of this type is a mapping of settings."""
    return isinstance(kind, type) and is_dataclass(kind)


def all_fields(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the types of all settings by dotted name, of sections as well as of the settings in them."""
    found: dict[str, Any] = {}
    for f in fields(kind):
        found[prefix + f.name] = f.type
        if is_section(f.type):
            found |= all_fields(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return found


def in_words(kind: Any) -> str:
    """Return a description of the values that a setting of this type allows."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of texts" if str in get_args(kind) else "a list of integers, such as [4] or [2, 2]"
    if get_origin(kind) is list:
        return f"a list, each {in_words(*get_args(kind))}"
    if get_origin(kind) is dict:
        if float in get_args(kind):
            return "a mapping of sources to weights, such as {stdlib: 0.7, docs: 0.3}"
        if Any in get_args(kind):
            return "a mapping of settings to values, such as {depth: {policy: exit}}"
        return "a mapping of settings to [low, high], such as {learning_rate: [0.001, 0.01]}"
    if get_origin(kind) in _UNIONS:
        return " or ".join(map(in_words, get_args(kind)))
    named = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return named.get(kind, "a mapping of its fields")


def number_kind(kind: Any) -> type | None:
    """Return int or float if a setting of this type is a number (or null), else None."""
    kinds = set(get_args(kind) if get_origin(kind) in _UNIONS else (kind,)) - {type(None)}
    return float if kinds == {float} else int if kinds == {int} else None
