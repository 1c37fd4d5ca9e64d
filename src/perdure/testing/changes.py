"""Changes that a deploy may make to a program, drawn at random: what replay must judge."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from perdure.testing.programs import Body, Program, Statement

Way = tuple[int, ...]
"""The place of a statement: its index in the body, then index of the fact and of the statement, and so on."""

BRANCHED: Final = ("gather", "first", "group", "guarded", "completed")


def change(program: Program, rng: random.Random) -> tuple[Program, str]:
    """The program after one small change, and what was done: inserted, removed, renamed, branch, guarded, same."""
    places = list(ways(program.body))
    kinds = ["insert", "insert", "remove", "rename", "branch", "branch", "guard"]
    kind = kinds[rng.randrange(len(kinds))]
    if not places:
        kind = "insert"
    if kind == "insert":
        added = _added(rng)
        way = places[rng.randrange(len(places))] if places else (0,)
        return program.with_body(edited(program.body, way, lambda old: (added, *old))), f"inserted {added[0]}"
    if kind == "guard":
        guarded: Statement = ("guard", "new-change", (("start", "new", "step"),))
        way = places[rng.randrange(len(places))]
        return program.with_body(edited(program.body, way, lambda old: (guarded, *old))), "guarded"
    if kind == "branch":
        branched = [way for way in places if statement_at(program.body, way)[0] in BRANCHED]
        if not branched:
            return program, "same"
        way = branched[rng.randrange(len(branched))]
        body: Body = (_added(rng),)
        return program.with_body(edited(program.body, way, lambda old: (_with_branch(old[0], body),))), "branch"
    way = places[rng.randrange(len(places))]
    if kind == "remove":
        return program.with_body(edited(program.body, way, lambda old: ())), "removed"
    named = [way for way in places if statement_at(program.body, way)[0] in ("step", "sleep", "signal", "child")]
    if not named:
        return program, "same"
    way = named[rng.randrange(len(named))]
    return program.with_body(edited(program.body, way, lambda old: (_renamed(old[0]),))), "renamed"


def _added(rng: random.Random) -> Statement:
    added: tuple[Statement, ...] = (
        ("step", "new"),
        ("sleep", "new", 3),
        ("start", "new", "step"),
        ("signal", "new", "go", 2),
        ("emit", "new", "cancel"),
        ("facts",),
    )
    return added[rng.randrange(len(added))]


def _with_branch(statement: Statement, body: Body) -> Statement:
    facts = list(statement)
    for place, fact in enumerate(facts):
        if isinstance(fact, tuple):
            facts[place] = (*fact, body)
            break
    return tuple(facts)


def _renamed(statement: Statement) -> Statement:
    return (statement[0], f"{statement[1]}-renamed", *statement[2:])


# --- places in a program ------------------------------------------------------------------------------


def ways(body: Body, before: Way = ()) -> Iterator[Way]:
    """The places of all statements of a body, also of nested ones."""
    for place, statement in enumerate(body):
        yield (*before, place)
        for number, fact in enumerate(statement):
            for inner, block in _blocks(fact):
                yield from ways(block, (*before, place, number, inner))


def statement_at(body: Body, way: Way) -> Statement:
    """The statement at this place."""
    place, rest = way[0], way[1:]
    if not rest:
        return body[place]
    block = dict(_blocks(body[place][rest[0]]))[rest[1]]
    return statement_at(block, rest[2:])


def edited(body: Body, way: Way, edit: Callable[[tuple[Statement, ...]], tuple[Statement, ...]]) -> Body:
    """The body with the statement at this place replaced by what `edit` makes of it (none for an empty body)."""
    place, rest = way[0], way[1:]
    if not rest:
        return (*body[:place], *edit(body[place : place + 1]), *body[place + 1 :])
    statement = list(body[place])
    number, inner = rest[0], rest[1]
    fact = statement[number]
    block = edited(dict(_blocks(fact))[inner], rest[2:], edit)
    statement[number] = block if inner < 0 else (*fact[:inner], block, *fact[inner + 1 :])
    return (*body[:place], tuple(statement), *body[place + 1 :])


def _blocks(fact: Any) -> Iterator[tuple[int, Body]]:
    """The bodies in a fact of a statement: the fact itself (-1), or its parts."""
    if not isinstance(fact, tuple) or not fact:
        return
    if _is_body(fact):
        yield -1, fact
    else:
        for number, part in enumerate(fact):
            if _is_body(part):
                yield number, part


def _is_body(fact: Any) -> bool:
    return isinstance(fact, tuple) and bool(fact) and isinstance(fact[0], tuple) and isinstance(fact[0][0], str)
