"""`--input JSON` and `--arg NAME=JSON`: the arguments of a workflow or a signal, from the line, a file or stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from perdure.cli.words import Wrong
from perdure.core import codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Arguments as JSON texts."""

    positional: tuple[str, ...]
    named: dict[str, str]

    def stored(self) -> str:
        """The stored form of an input: `[[positional…], {name: value…}]`."""
        named = ",".join(f"{msgspec.json.encode(name).decode()}:{text}" for name, text in self.named.items())
        return f"[[{','.join(self.positional)}],{{{named}}}]"

    def values(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as plain values, for those who do not have the workflow's code."""
        return (
            [codec.decode(text, what=f"--input number {at}") for at, text in enumerate(self.positional, start=1)],
            {name: codec.decode(text, what=f"--arg {name}") for name, text in self.named.items()},
        )


def inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The two options; the function gets `input` and `arg`, which `given` reads."""
    by_position = click.option(
        "--input",
        metavar="JSON",
        multiple=True,
        help="One positional argument; repeat it for more. @FILE reads a file, - reads stdin.",
    )
    by_name = click.option(
        "--arg", metavar="NAME=JSON", multiple=True, help="One argument by name. NAME=@FILE and NAME=- work too."
    )
    return by_position(by_name(function))


def given(input: Sequence[str], arg: Sequence[str] = ()) -> Given:
    """What was given; Wrong if it is no JSON."""
    if [*input, *(each.partition("=")[2] for each in arg)].count("-") > 1:
        raise Wrong("Two arguments are -, and stdin can be read once only. Put one of them into a file: @FILE.")
    named: dict[str, str] = {}
    for each in arg:
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise Wrong(f"--arg {each} has no name. It is written --arg NAME=JSON.")
        if name in named:
            raise Wrong(f"--arg {name} was given twice. An argument has one value.")
        named[name] = _json(text, f"--arg {name}=")
    return Given(positional=tuple(_json(text, "--input ") for text in input), named=named)


def _json(text: str, option: str) -> str:
    read = text
    if text == "-":
        read = sys.stdin.read()
    elif text.startswith("@"):
        try:
            read = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise Wrong(f"{option}{text} cannot be read: {why}.") from error
    try:
        read.encode()
        msgspec.json.decode(read)
    except RecursionError:
        raise Wrong(f"{option}{_short(text)} is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        if _has_half(read):
            raise Wrong(
                f"{option}{_short(text)} has a lone surrogate, half a character without a UTF-8 form."
            ) from None
        hint = f" A text needs its quotes: {option}'\"{text}\"'." if text.isidentifier() else ""
        raise Wrong(f"{option}{_short(text)} is not JSON: {error}.{hint}") from error
    return read.strip()


def _has_half(text: str) -> bool:
    """Whether this would be JSON, if its texts were."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        pass
    return False


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
