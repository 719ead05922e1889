"""The command line, ``resnet-bk COMMAND``. Heavy packages are imported only when a command runs."""

import difflib
import functools
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

from yaml import YAMLError

from resnet_bk import __version__
from resnet_bk.config import (
    PRESETS,
    AblateConfig,
    AdaptConfig,
    ConfigError,
    EvalConfig,
    GenerateConfig,
    InspectConfig,
    ReportConfig,
    SealConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
    all_fields,
    check_fields,
    check_yaml,
    in_words,
    is_section,
    preset_file,
    read_yaml,
    shown,
    visible,
)
from resnet_bk.extras import MissingExtraError, extra

with extra("train"):
    import docstring_parser
    from jsonargparse import (
        ArgumentError,
        ArgumentParser,
        _loaders_dumpers,
        get_loader,
        set_loader,
        set_parsing_settings,
    )

_load_yaml = get_loader("yaml")

# name: its configuration, a line of help
COMMANDS = {
    "train": (TrainConfig, "Train a model, score it on held-out text, measure its speed, write a report."),
    "adapt": (AdaptConfig, "Give a trained model techniques, and compare it with itself at several thresholds."),
    "eval": (EvalConfig, "Score a checkpoint: bits per byte and perplexities."),
    "generate": (GenerateConfig, "Continue a prompt."),
    "serve": (ServeConfig, "Serve a checkpoint over HTTP, with OpenAI's completions API and a page for browsers."),
    "inspect": (InspectConfig, "Show the FLOPs that a checkpoint uses for each byte of a text, as colors."),
    "report": (ReportConfig, "Compare finished runs on one page: table, curves, Pareto fronts, texts in colors."),
    "tune": (TuneConfig, "Search settings for the trade-off between held-out bits per byte and measured time."),
    "ablate": (AblateConfig, "Train every combination of a recipe's techniques; measure what each saves and costs."),
    "seal": (SealConfig, "Write a new manifest for a model folder whose files were changed on purpose."),
}
# Imported when the command runs. Arguments: its settings, those of a run (if it has a setting `base`), and a console.
_FUNCTIONS = {
    "train": "resnet_bk.study.run:train",
    "adapt": "resnet_bk.study.adapt:adapt",
    "eval": "resnet_bk.study.evaluation:evaluate_checkpoint",
    "generate": "resnet_bk.inference.generation:generate",
    "serve": "resnet_bk.serve.command:serve",
    "inspect": "resnet_bk.study.inspection:inspect",
    "report": "resnet_bk.study.comparison:report",
    "tune": "resnet_bk.study.tune:tune",
    "ablate": "resnet_bk.study.ablate:ablate",
    "seal": "resnet_bk.study.sealing:seal",
}


@functools.cache
def _parser() -> ArgumentParser:
    # Without subclasses: no value may name a class, which the parser would import.
    set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_disabled=[is_dataclass])
    set_loader("yaml", _load_value, (YAMLError,))
    _loaders_dumpers.yaml_load = _load_value  # which settings of some types use instead
    parser = ArgumentParser(
        prog="resnet-bk",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
        description="Language models that spend compute where the text is hard.",
    )
    commands = parser.add_subcommands(dest="command")
    for name, (config, text) in COMMANDS.items():
        command = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=text)
        preset = f", or a model to start from: {', '.join(PRESETS)}" if config is TrainConfig else ""
        command.add_argument("--config", action="config", help=f"YAML file with any of the settings below{preset}.")
        lists = {setting: usage for setting, usage in _positional(name).items() if usage.endswith("...")}
        command.add_class_arguments(config, as_positional=True, fail_untyped=True, skip=set(lists))
        for setting in docstring_parser.parse_from_object(config).params:
            if usage := lists.get(setting.arg_name):  # the parser itself would take a list as one word, '[a, b]'
                metavar = usage.removesuffix("...")
                command.add_argument(setting.arg_name, nargs="+", type=str, metavar=metavar, help=setting.description)
        commands.add_subcommand(name, command, help=text)
    return parser


def _load_value(text: str) -> Any:
    """Load a value of the command line, with the limits that a configuration file has."""
    try:
        check_yaml("value", text)
        return _load_yaml(text)
    except (ValueError, LookupError, AttributeError, RecursionError) as error:  # '!!int ""' is an IndexError
        raise YAMLError(str(error)) from error


def _positional(command: str | None) -> dict[str, str]:
    """Map each setting without a default to its text in the usage line; RUN... stands for a list of runs."""
    every = fields(COMMANDS[command][0]) if command else ()
    names = {f.name: get_origin(f.type) is list for f in every if f.default is f.default_factory is MISSING}
    return {name: f"{name.removesuffix('s').upper()}..." if many else name.upper() for name, many in names.items()}


# -------------------------------------------------------------------------------- configuration files


def _config_files(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield where each configuration file is named: index of the argument, text before the name in it, and name."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            if equals:
                yield i, "--config=", value
            elif i + 1 < len(arguments):
                yield i + 1, "", arguments[i + 1]


def _with_presets(arguments: Sequence[str], presets: Sequence[str]) -> list[str]:
    """Replace the names of presets by their files, unless a file has the name."""
    found = list(arguments)
    for i, before, name in _config_files(arguments):
        if name in presets and not Path(name).is_file():
            found[i] = f"{before}{preset_file(name)}"
    return found


def _check_config_file(name: str, kind: type, given_as: str, presets: Sequence[str]) -> None:
    """Raise ConfigError if a configuration file cannot be read or has unknown fields. Values are checked later.

    Args:
        name: the file.
        kind: class of its settings.
        given_as: the setting or option that names it.
        presets: names that could be given instead.
    """
    wanted = "a YAML file" + (f", or one of {', '.join(presets)}" if presets else "")
    values = read_yaml(given_as, name, wanted)
    if values is None:
        hint = "write settings as 'name: value'" + (", or leave --config out" if given_as == "--config" else "")
        raise ConfigError(f"{given_as}: {name} is empty; {hint}")
    check_fields(name, kind, values)


def _check_no_whole_section(arguments: Sequence[str], kind: type) -> None:
    """Refuse ``--model X``: the parser would take X for a file or a class, and import the module that it names."""
    settings = all_fields(kind)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and is_section(settings.get(name)):
            raise ConfigError(f"{name}: give its fields one by one, as --{name}.FIELD VALUE, or in a --config file")


# ------------------------------------------------------------------------------------------ messages


def _settings(command: str | None) -> dict[str, str]:
    """Map the dotted name of each setting of a command to what it allows, in words."""
    return {name: in_words(kind) for name, kind in all_fields(COMMANDS[command][0]).items()} if command else {}


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else ""


def _explain(error: Exception, command: str | None) -> str:
    """Rewrite an error of the parser as one line: which setting, what it got, what is allowed.

    The errors of jsonargparse and argparse carry no data, so their English text is matched. A text that does not match
    is returned as it is.
    """
    text, allowed = str(error), _settings(command)
    where, usage = f"{command}." if command else "", " ".join(_positional(command).values())
    if match := re.search(r"invalid choice: '(.*)' \(choose from", text, re.DOTALL):
        near = _nearest(match[1], list(COMMANDS))
        return f"unknown command {shown(match[1])}; {near or 'commands: ' + ', '.join(COMMANDS)}"
    if 'expected "command"' in text:
        return f"no command; commands: {', '.join(COMMANDS)}"
    if match := re.search(r"[Uu]nrecognized arguments: ([^\s=]*)", text):
        name = match[1].lstrip("-")
        if name in allowed:
            return f"{command}: {name} is given without its name: resnet-bk {command} {usage}"
        if not match[1].startswith("-"):
            got = f"{command or 'command line'}: unexpected argument {shown(match[1])}"
            if usage.endswith("..."):
                return f"{got}; give all of {usage} in one place: resnet-bk {command} {usage} --name value"
            return f"{got}; settings are given as --name value"
        near = _nearest(name, [*allowed, "config", "help"] if command else ["help", "version"], "--")
        see_help = f"see resnet-bk {command} --help" if command else "see resnet-bk --help"
        return f"{command or 'command line'}: unknown option {shown(match[1])}; {near or see_help}"
    if match := re.search(r"does not accept option '([^']*)'", text):
        near = _nearest(match[1], list(allowed))
        return f"{command}: unknown setting {shown(match[1])}; {near or f'see resnet-bk {command} --help'}"
    if match := re.search(r"arguments are required: ([\w.]+)", text):
        return f"{match[1]}: missing; usage: resnet-bk {command} {usage}"
    if match := re.search(r"NestedArg\(key='([^']*)'", text):
        name = text.partition('"')[2].partition('"')[0]
        return f"{command}: unknown option {shown(f'--{name}.{match[1]}')}; {name} has no fields"
    if (match := re.search(r"argument --([\w.]+)\S*: expected one argument", text)) and match[1] in allowed:
        name = match[1] if "." in match[1] else f"{where}{match[1]}"
        return f"{name}: got nothing, allowed {allowed[match[1]]}"
    if match := re.match(r'Parser key "([\w.]+)"(?: element \d+)?:\s*(.*)', text, re.DOTALL):
        name = match[1] if "." in match[1] else f"{where}{match[1]}"
        if match[1] not in allowed:
            return f"{name}: {match[2]}"
        for marker in ("Given value: ", "Got value: "):
            if marker in match[2]:
                return f"{name}: got {shown(match[2].split(marker)[-1])}, allowed {allowed[match[1]]}"
        return f"{name}: {match[2]}; allowed {allowed[match[1]]}"
    return text


def _one_line(error: Exception | str) -> str:
    text = " ".join(visible(str(error)).split())
    return text if len(text) <= 1000 else text[:997] + "..."


def _is_one_of_many() -> bool:
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _is_rank_0() -> bool:
    rank = os.environ["RANK"] if _is_one_of_many() else "0"
    return not rank.isdecimal() or int(rank) == 0


def _fail(message: Exception | str, code: int, once: bool = False) -> int:
    """Print an error and return its exit code. once: all processes of a run fail in the same way, and rank 0 prints."""
    if not once or _is_rank_0():
        print(f"resnet-bk: error: {_one_line(message)}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------- commands


def _parse(arguments: Sequence[str], given_as: str = "--config") -> tuple[str, Any]:
    """Return the command and its settings. given_as: name of the option --config in messages.

    Raises:
        ConfigError: anything is wrong with the arguments or with a configuration file.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = command if command in COMMANDS else None
    try:
        if command:
            config, _ = COMMANDS[command]
            _check_no_whole_section(arguments, config)
            # a preset has no budget, so it cannot be the recipe of another command
            presets = PRESETS if command == "train" and given_as == "--config" else ()
            arguments = _with_presets(arguments, presets)
            for _, _, name in _config_files(arguments):
                _check_config_file(name, config, given_as, presets)
        parser = _parser()
        parsed = parser.parse_args(arguments)
        values = dict(vars(parser.instantiate(parsed)[parsed.command]))
        values.pop("config", None)
        return parsed.command, COMMANDS[parsed.command][0](**values)
    except ConfigError:
        raise
    # of the parser and its loaders
    except (ArgumentError, ValueError, TypeError, ArithmeticError, OSError, RecursionError) as error:
        raise ConfigError(_explain(error, command)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Bad input gives one line on standard error and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(*_parse(arguments))
    except (ConfigError, MissingExtraError) as error:
        return _fail(_agreed(error) if _is_one_of_many() and "train" in arguments[:1] else error, 2, once=True)


def _agreed(error: Exception) -> Exception | str:
    """Return what rank 0 prints if this process of a training cannot start. The other ranks exit."""
    from resnet_bk.training.ranks import fail_together

    try:
        return fail_together(str(error))
    except (ConfigError, RuntimeError):  # the processes cannot meet, or another one has ended
        return error


def _run(command: str, config: Any) -> int:
    """Run a command and return its exit code. Errors of the input and of the machine give one line."""
    with extra("train"):
        from resnet_bk.checkpoint import CheckpointError
        from resnet_bk.report.terminal import console
        from resnet_bk.training.errors import LeakError, NonFiniteError, StoppedError
        from resnet_bk.training.launcher import world_size

    if command != "train" and (count := world_size()) > 1:
        message = f"{command}: got {count} processes, allowed 1: only train can share its work; start one process"
        return _fail(message, 2, once=True)
    try:
        settings = [config]
        if hasattr(config, "base"):
            settings.append(_parse(["train", f"--config={config.base}"], f"{command}.base")[1])
        pkgutil.resolve_name(_FUNCTIONS[command])(*settings, console())
    except StoppedError as stopped:
        if _is_rank_0():
            print(f"resnet-bk: {_one_line(stopped)}", file=sys.stderr)
        return stopped.exit_code
    except NonFiniteError as error:
        return _fail(error, 1, once=True)
    except UnicodeDecodeError as error:
        return _fail(f"{command}: the input is not UTF-8 at byte {error.start}", 2)
    except (ConfigError, CheckpointError) as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, 1)
    except LeakError as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if re.search(r"Connection (closed|reset) by peer|Connection refused|Broken pipe", str(error)):
            return _fail(f"{command}: another process of this run has ended; its own message says why", 1)
        if "more positions selected than capacity" in str(error):
            return _fail(f"{command}: model.TECHNIQUE.bound: {error}", 1)
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        sizes = "batch_size, model.n_seq, model.d_model, model.memory.rows or model.memory.recent_rows"
        return _fail(f"{command}: out of memory; lower {'rows' if command == 'serve' else sizes} ({error})", 1)
    return 0
