"""The command line: ``resnet-bk train | eval | generate``. Heavy imports wait until a command runs."""

import difflib
import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from resnet_bk import __version__
from resnet_bk.config import ConfigError, EvalConfig, GenerateConfig, TrainConfig

_COMMANDS = {
    "train": (TrainConfig, "Train a model, score it on held-out text, measure its speed, write a report."),
    "eval": (EvalConfig, "Score a checkpoint: bits per byte and perplexities."),
    "generate": (GenerateConfig, "Continue a prompt."),
}


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
        command.add_argument("--config", action="config", help="YAML file with any of the settings below.")
        command.add_class_arguments(config, as_positional=True, fail_untyped=True)
        commands.add_subcommand(name, command, help=text)
    return parser


def _one_line(error: Exception) -> str:
    """An error as one line; an unknown setting with the nearest known one."""
    text = " ".join(str(error).split())
    unknown = re.search(r"(?:[Uu]nrecognized arguments: |[Kk]ey |Option )['\"]?(?:--)?([\w.]+)", text)
    if unknown and ("nrecognized" in text or "not accepted" in text or "does not accept" in text or "xpected" in text):
        near = difflib.get_close_matches(unknown[1], _known_settings(), n=1)
        if near:
            text += f"; did you mean {near[0]!r}?"
    return text


def _known_settings() -> list[str]:
    from dataclasses import fields, is_dataclass

    names = []
    for config, _ in _COMMANDS.values():
        for f in fields(config):
            names.append(f.name)
            if is_dataclass(f.type):
                names += [f"{f.name}.{inner.name}" for inner in fields(f.type)]
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad input: one line on standard error, code 2."""
    try:
        parser = _parser()
        parsed = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        values = dict(vars(parser.instantiate_classes(parsed)[parsed.command]))
        values.pop("config", None)
        config = _COMMANDS[parsed.command][0](**values)
    except (ArgumentError, ConfigError) as error:
        print(f"resnet-bk: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return _run(parsed.command, config)


def _run(command: str, config: TrainConfig | EvalConfig | GenerateConfig) -> int:
    from rich.console import Console

    from resnet_bk.checkpoint import CheckpointError
    from resnet_bk.training import run
    from resnet_bk.training.guard import LeakError
    from resnet_bk.training.trainer import NonFiniteError

    function = {"train": run.train, "eval": run.evaluate_checkpoint, "generate": run.generate}[command]
    try:
        function(config, Console())  # type: ignore[operator]
    except run.Stopped as stopped:
        print(f"resnet-bk: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except (ConfigError, CheckpointError, LeakError, NonFiniteError, OSError) as error:
        print(f"resnet-bk: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | CheckpointError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
