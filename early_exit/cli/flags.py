"""Parsers with one-line errors, and the flags that several programs share."""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from early_exit.errors import UserError


class Formatter(argparse.HelpFormatter):
    """Help with 100 characters per line and a wide column for the flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a UserError: one line and exit code 2.

    `instead` maps flags of similar scripts, which this one lacks, to what to use instead.
    """

    instead: Mapping[str, str] = MappingProxyType({})

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but an empty word is an error: it comes from a variable that is not set,
        and would stand for the working directory, or for nothing. A flag whose default is empty
        takes one."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(("", *words), words, strict=False):
            flag, equals, value = word.partition("=")
            if not word or (flag.startswith("-") and equals and not value):
                action = self._option_string_actions.get(flag or before)
                if action is not None and action.default == "":
                    continue
                where = flag or (f"the word after {before}" if before else "the first word")
                raise UserError(
                    f"{where} is empty; is a variable not set? (--help lists the flags)"
                )
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, without the usage."""
        given = [word.partition("=")[0] for word in message.split()]
        given += [word[:2] for word in given if re.match(r"-\w", word)]  # -j4 is -j 4
        hints = [f"{flag}: use {ours}; " for flag, ours in self.instead.items() if flag in given]
        raise UserError(f"{message} ({''.join(hints)}--help lists the flags)")


class StoreSetting(argparse.Action):
    """Stores the value of a flag in `namespace.settings`, under the dotted name of its setting.

    A flag with `const` and without `nargs` takes no value.
    """

    def __init__(
        self, option_strings: list[str], dest: str, const: Any = None, **options: Any
    ) -> None:
        if const is not None:
            options.setdefault("nargs", 0)
        super().__init__(option_strings, dest, const=const, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        value = self.const if self.nargs == 0 else values
        earlier = namespace.given_by.get(self.dest, self)
        if earlier is not self:
            one, other = ((*action.option_strings, action.metavar) for action in (earlier, self))
            raise UserError(f"{one[0]} and {other[0]} give the same setting; remove one")
        namespace.given_by = {**namespace.given_by, self.dest: self}
        namespace.settings = {**namespace.settings, self.dest: value}


def build_parser(prog: str, usage: str, docstring: str | None) -> Parser:
    """A parser whose help begins with the usage and the script's docstring.

    docstring: a summary, an empty line, examples; None under `python -OO`.
    """
    summary, _, examples = (docstring or "").partition("\n\n")
    parser = Parser(
        prog=prog,
        usage=f"{usage}\n\n{examples.rstrip()}".rstrip().replace("%", "%%"),
        description=summary.replace("%", "%%"),
        formatter_class=Formatter,
    )
    parser.set_defaults(settings={}, given_by={})
    return parser


def absolute(path: str) -> str:
    """The absolute path, which does not depend on the working directory of later commands."""
    return str(Path(path).absolute())


def flag_of(name: str) -> str:
    """The flag whose value a namespace of arguments has under this name."""
    return f"--{name.replace('_', '-')}"


def check_at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Raises UserError for a flag with a number, or one of several, below the least one. One
    without a number passes. names: as in `flag_of`."""
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value >= least:  # NaN too
                raise UserError(f"{flag_of(name)} must be at least {least}, got {value}")


def add_setting(group: Any, *flags: str, setting: str, **options: Any) -> None:
    """Adds a flag for the setting of this dotted name. `settings_of` gives the settings of all
    flags."""
    group.add_argument(
        *flags, dest=setting, default=argparse.SUPPRESS, action=StoreSetting, **options
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The nested settings that flags and --set gave."""
    given = dict(args.settings)
    for pair in getattr(args, "set", []):
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--set takes SECTION.NAME=VALUE, got {pair!r}")
        if not value:
            raise UserError(f"--set {pair} has no value; null sets a setting to none")
        if key in args.settings:
            raise UserError(f"--set {pair} gives a setting that a flag gives too; remove one")
        given[key] = _set_value(value)
    nested: dict[str, Any] = {}
    for key, value in given.items():
        section, name = key.split(".", 1)
        nested.setdefault(section, {})[name] = value
    model = nested.get("model", {})
    for name, kind in (("exits", "a place"), ("head", "a kind of head")):
        _check_no_directory(name, kind, model.get(name))
    exits = model.get("exits")
    if exits is not None:  # no names: the default places, which the configuration writes as null
        model["exits"] = exits or None
    return nested


def _set_value(text: str) -> str | list[str] | None:
    """The value that --set gives: null, as in a preset, is none; commas separate several."""
    if text == "null":
        return None
    return text.split(",") if "," in text else text


def _check_no_directory(name: str, kind: str, values: Any) -> None:
    """Raises UserError if a flag with several values took the data directory for one of them."""
    for word in values if isinstance(values, list) else ():
        if "/" in word or (Path(word) / "train").is_dir():
            raise UserError(
                f"--{name} got the directory {word} instead of {kind}; put the directory before the"
                " flags, or -- between them"
            )


def add_evaluated_run(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a run and one of its evaluations."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="run directory that was evaluated, or one of its evaluations RUN/eval/NAME",
    )
    parser.add_argument(
        "--eval",
        metavar="NAME",
        help="evaluation whose policy is used (default: the only one; if there are several, that of"
        " --max-drop 0.5)",
    )
    parser.add_argument(
        "--task",
        metavar="MODULE:NAME",
        help="task that made the run, such as mytask.train:TASK; its module is imported (default:"
        " the one that the report names, if this program knows it)",
    )
    add_data_flag(parser, ", which a run in 8-bit integers needs")


def add_data_flag(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    """Adds the flag for the directory of a run's data set. purpose: a clause for its help."""
    add_setting(
        parser,
        "--data",
        setting="data.root",
        type=absolute,
        metavar="DIR",
        help=f"directory of the data set{purpose} (default: the one used in training)",
    )


def add_machine_flags(parser: argparse.ArgumentParser, amp: str) -> Any:
    """Adds the flags for device and precision, which training, evaluation and prediction share.

    amp: the default of --amp. Returns their group.
    """
    group = parser.add_argument_group("machine")
    add_setting(
        group,
        "--device",
        setting="run.device",
        metavar="NAME",
        help="cpu, cuda or cuda:1 (default: the GPU if there is one)",
    )
    add_setting(
        group,
        "--threads",
        setting="run.threads",
        metavar="N",
        help="CPU threads (default: torch's choice, within a container's limit)",
    )
    add_setting(
        group,
        "--amp",
        setting="run.amp",
        metavar="MODE",
        help="mixed precision: bf16, fp16, off, or auto: bf16 on processors with fast bf16, else"
        f" off (default: {amp})",
    )
    add_setting(
        group,
        "--compile",
        setting="run.compile",
        const=True,
        help="use torch.compile, which takes about a minute at the start and is not always faster",
    )
    add_setting(
        group,
        "--no-channels-last",
        setting="run.channels_last",
        const=False,
        help="store images and weights channels first (default: channels last)",
    )
    return group
