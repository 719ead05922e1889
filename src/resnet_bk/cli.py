"""The command line, ``resnet-bk COMMAND``. Heavy imports wait until a command runs."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_origin

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from resnet_bk import __version__
from resnet_bk.config import (
    PRESETS,
    AblateConfig,
    ConfigError,
    EvalConfig,
    GenerateConfig,
    InspectConfig,
    ReportConfig,
    TrainConfig,
    TuneConfig,
    all_fields,
    check_fields,
    in_words,
    is_section,
    preset_file,
    read_yaml,
    shown,
)
from resnet_bk.extras import MissingExtraError

_COMMANDS = {
    "train": (TrainConfig, "Train a model, score it on held-out text, measure its speed, write a report."),
    "eval": (EvalConfig, "Score a checkpoint: bits per byte and perplexities."),
    "generate": (GenerateConfig, "Continue a prompt."),
    "inspect": (InspectConfig, "Show what a checkpoint spends on a text, byte by byte, as colors."),
    "report": (ReportConfig, "Compare finished runs on one page: table, curves, Pareto fronts, texts in colors."),
    "tune": (TuneConfig, "Search settings for the trade between held-out bits per byte and measured time."),
    "ablate": (AblateConfig, "Train every combination of a recipe's techniques; measure what each one buys."),
}


@functools.cache
def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="resnet-bk",
        version=__version__,
        exit_on_error=False,
        description="Language models that spend compute where the text is hard.",
    )
    commands = parser.add_subcommands(dest="command")
    for name, (config, text) in _COMMANDS.items():
        command = ArgumentParser(exit_on_error=False, description=text)
        preset = f", or a model to start from: {', '.join(PRESETS)}" if config is TrainConfig else ""
        command.add_argument("--config", action="config", help=f"YAML file with any of the settings below{preset}.")
        lists = {setting: usage for setting, usage in _positional(name).items() if usage.endswith("...")}
        command.add_class_arguments(config, as_positional=True, fail_untyped=True, skip=set(lists))
        for setting in docstring_parser.parse_from_object(config).params:
            if usage := lists.get(setting.arg_name):  # the parser's own way is one word, '[a, b]'
                metavar = usage.removesuffix("...")
                command.add_argument(setting.arg_name, nargs="+", type=str, metavar=metavar, help=setting.description)
        commands.add_subcommand(name, command, help=text)
    return parser


def _positional(command: str | None) -> dict[str, str]:
    """Settings without a default -> how the usage line shows them; a list as RUN... of its items."""
    every = fields(_COMMANDS[command][0]) if command else ()
    names = {f.name: get_origin(f.type) is list for f in every if f.default is f.default_factory is MISSING}
    return {name: f"{name.removesuffix('s').upper()}..." if many else name.upper() for name, many in names.items()}


# -------------------------------------------------------------------------------- configuration files


def _config_files(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Where each configuration file is named: the argument's index, what stands before the name in it, the name."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if len(option) > 2 and "--config".startswith(option):
            if equals:
                yield i, f"{option}=", value
            elif i + 1 < len(arguments):
                yield i + 1, "", arguments[i + 1]


def _with_presets(arguments: Sequence[str], presets: Sequence[str]) -> list[str]:
    """The names of presets, where no file has such a name, as their files."""
    found = list(arguments)
    for i, before, name in _config_files(arguments):
        if name in presets and not Path(name).is_file():
            found[i] = f"{before}{preset_file(name)}"
    return found


def _check_config_file(name: str, kind: type, given_as: str, presets: Sequence[str]) -> None:
    """One clear line for whatever can be wrong with a configuration file as such; values are checked later."""
    wanted = "a YAML file" + (f", or one of {', '.join(presets)}" if presets else "")
    values = read_yaml(given_as, name, wanted)
    if values is None:
        hint = "write settings as 'name: value'" + (", or leave --config out" if given_as == "--config" else "")
        raise ConfigError(f"{given_as}: {name} is empty; {hint}")
    check_fields(name, kind, values)


def _check_no_whole_section(arguments: Sequence[str], kind: type) -> None:
    """``--model X`` is refused: the parser would take X for a file or a class, and import the module it names."""
    settings = all_fields(kind)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and is_section(settings.get(name)):
            raise ConfigError(f"{name}: give its fields one by one, as --{name}.FIELD VALUE, or in a --config file")


# ------------------------------------------------------------------------------------------ messages


def _settings(command: str | None) -> dict[str, str]:
    """Dotted name of each setting of a command -> what it allows, in words."""
    return {name: in_words(kind) for name, kind in all_fields(_COMMANDS[command][0]).items()} if command else {}


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else ""


def _explain(error: Exception, command: str | None) -> str:
    """An error of the parser as one line: which setting, what it got, what is allowed."""
    text, allowed = str(error), _settings(command)
    where, usage = f"{command}." if command else "", " ".join(_positional(command).values())
    if match := re.search(r"invalid choice: '(.*)' \(choose from", text, re.DOTALL):
        near = _nearest(match[1], list(_COMMANDS))
        return f"unknown command {shown(match[1])}; {near or 'commands: ' + ', '.join(_COMMANDS)}"
    if 'expected "command"' in text:
        return f"no command; commands: {', '.join(_COMMANDS)}"
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
        helped = f"see resnet-bk {command} --help" if command else "see resnet-bk --help"
        return f"{command or 'command line'}: unknown option {shown(match[1])}; {near or helped}"
    if match := re.search(r"does not accept option '([^']*)'", text):
        near = _nearest(match[1], list(allowed))
        return f"{command}: unknown setting {shown(match[1])}; {near or f'see resnet-bk {command} --help'}"
    if match := re.search(r"arguments are required: ([\w.]+)", text):
        return f"{match[1]}: missing; usage: resnet-bk {command} {usage}"
    if (match := re.search(r"argument --([\w.]+): expected one argument", text)) and match[1] in allowed:
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
    text = " ".join(str(error).split())
    return text if len(text) <= 1000 else text[:997] + "..."


def _fail(message: Exception | str, code: int) -> int:
    print(f"resnet-bk: error: {_one_line(message)}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------- commands


def _parse(arguments: Sequence[str], given_as: str = "--config") -> tuple[str, Any]:
    """Command and configuration. Whatever is wrong: a ConfigError of one line. given_as: how messages call a file."""
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = command if command in _COMMANDS else None
    try:
        if command:
            _check_no_whole_section(arguments, _COMMANDS[command][0])
            # a preset alone has no budget, so it is no recipe for other commands
            presets = PRESETS if command == "train" and given_as == "--config" else ()
            arguments = _with_presets(arguments, presets)
            for _, _, name in _config_files(arguments):
                _check_config_file(name, _COMMANDS[command][0], given_as, presets)
        parser = _parser()
        parsed = parser.parse_args(arguments)
        values = dict(vars(parser.instantiate(parsed)[parsed.command]))
        values.pop("config", None)
        return parsed.command, _COMMANDS[parsed.command][0](**values)
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError, OSError, RecursionError) as error:  # its own errors, and its loaders'
        raise ConfigError(_explain(error, command)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad input: one line on standard error, code 2."""
    try:
        command, config = _parse(list(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
        return _fail(error, 2) if _speaks() else 2
    return _run(command, config)


def _speaks() -> bool:
    """Whether this process says what it and all others of a run have to say."""
    return os.environ.get("RANK", "0") == "0"


def _run(command: str, config: Any) -> int:
    from rich.console import Console

    from resnet_bk.checkpoint import CheckpointError
    from resnet_bk.inference.generation import generate
    from resnet_bk.study import run
    from resnet_bk.training.guard import LeakError
    from resnet_bk.training.ranks import launched
    from resnet_bk.training.run import StoppedError
    from resnet_bk.training.trainer import NonFiniteError

    if command != "train" and (count := launched()) > 1:
        only = f"{command}: got {count} processes, allowed 1: only train shares its work; start it alone"
        return _fail(only, 2) if _speaks() else 2
    functions: dict[str, Callable[[Any, Console], Any]] = {
        "train": run.train,
        "eval": run.evaluate_checkpoint,
        "generate": generate,
        "inspect": _inspect,
        "report": _report,
        "tune": _tune,
        "ablate": _ablate,
    }
    try:
        functions[command](config, Console())
    except StoppedError as stopped:
        if _speaks():
            print(f"resnet-bk: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except NonFiniteError as error:
        return _fail(error, 1) if _speaks() else 1
    except UnicodeDecodeError as error:
        return _fail(f"{command}: the input is not UTF-8 at byte {error.start}", 2)
    except (ConfigError, CheckpointError, MissingExtraError) as error:
        return _fail(error, 2)
    except (LeakError, OSError) as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if re.search(r"Connection (closed|reset) by peer|Connection refused|Broken pipe", str(error)):
            return _fail(f"{command}: another process of this run has ended; what it said tells why", 1)
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        return _fail(f"{command}: out of memory; lower batch_size, model.n_seq or model.d_model ({error})", 1)
    return 0


def _inspect(config: InspectConfig, console: Any) -> None:
    from resnet_bk.study.inspection import inspect

    inspect(config, console)


def _report(config: ReportConfig, console: Any) -> None:
    from resnet_bk.study.comparison import report

    report(config, console)


def _tune(config: TuneConfig, console: Any) -> None:
    from resnet_bk.study.tune import tune

    _, recipe = _parse(["train", f"--config={config.base}"], "tune.base")
    tune(config, recipe, console)


def _ablate(config: AblateConfig, console: Any) -> None:
    from resnet_bk.study.ablate import ablate

    _, recipe = _parse(["train", f"--config={config.base}"], "ablate.base")
    ablate(config, recipe, console)


if __name__ == "__main__":
    sys.exit(main())
