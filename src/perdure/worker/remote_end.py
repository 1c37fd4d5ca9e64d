"""How one run tells another about its end: the message's data, and the event it becomes."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

from perdure.core import events as ev
from perdure.core.errors import StoreTooNew, quoted
from perdure.core.failure import NOTHING, RecordedError
from perdure.core.retry import micros
from perdure.core.turn import Mail, ParentLink, Send
from perdure.runtime.steps import ActivityPolicy


class RemoteEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of `child_ended` and `activity_ended` messages."""

    step: str
    run: str
    status: str
    value: Raw = NOTHING
    error: RecordedError | None = None
    attempts: int = 1


class StartPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run's row keeps of how it was started, as JSON: not for the store, for whoever ends or executes it."""

    awaited: bool = True
    retry: dict[str, Any] | None = None
    timeout: int | None = None
    total_timeout: int | None = None
    workflow: str = ""  # an activity's: that of the run whose step it is
    root: str = ""  # the id of the run above all, where this one's own id does not begin with it


NO_POLICY: Final = StartPolicy()

_ENDS: Final[dict[str, type[ev.ChildEnded] | type[ev.ActivityEnded]]] = {
    "child_ended": ev.ChildEnded,
    "activity_ended": ev.ActivityEnded,
}
_encode = msgspec.json.encode
_ends: msgspec.json.Decoder[RemoteEnd] = msgspec.json.Decoder(RemoteEnd)
_policies: msgspec.json.Decoder[StartPolicy] = msgspec.json.Decoder(StartPolicy)


def start_policy(policy: ActivityPolicy, workflow: str) -> StartPolicy:
    """The policy of an activity dispatched by a run of `workflow`, as its row keeps it; code stays with the worker."""
    given = policy.retry
    return StartPolicy(
        workflow=workflow,
        retry={
            "max_attempts": given.max_attempts,
            "first_delay": micros(given.first_delay),
            "factor": given.factor,
            "max_delay": micros(given.max_delay),
            "jitter": given.jitter,
        },
        timeout=None if policy.timeout is None else micros(policy.timeout),
        total_timeout=None if policy.total_timeout is None else micros(policy.total_timeout),
    )


def policy_text(policy: StartPolicy) -> str:
    """As it is stored; the default is nothing at all."""
    return "" if policy == NO_POLICY else _encode(policy).decode()


def policy_of(text: str) -> StartPolicy:
    """The policy a row keeps."""
    return _policies.decode(text) if text else NO_POLICY


def telling_parent(
    *,
    kind: str,
    parent: int,
    step: str,
    run: str,
    status: str,
    result: str | None,
    error: RecordedError | None,
    attempts: int = 1,
) -> Send:
    """The message that a child or activity has ended; the same end is the same message."""
    end = RemoteEnd(
        step=step,
        run=run,
        status=status,
        value=NOTHING if result is None else Raw(result.encode()),
        error=error,
        attempts=attempts,
    )
    named = "child" if kind == "workflow" else "activity"
    return Send(to=parent, id=f"perdure:{named}:{step}", kind=f"{named}_ended", name=step, data=_encode(end).decode())


def cancelling(parent: int, step: str, reason: str) -> Send:
    """Ask a child, found by its parent link and never by its id, to cancel."""
    return Send(
        to=ParentLink(run=parent, step=step),
        id=CANCEL,
        kind="cancel",
        data=_encode({"reason": reason}).decode(),
    )


CANCEL = "perdure:cancel"
"""The id of every request to cancel: twice is once."""


def reason_of(cancel: Mail) -> str:
    """Why it is to cancel, as whoever asked says."""
    return str(msgspec.json.decode(cancel.data).get("reason", ""))


def input_of(mail: Mail, at: int) -> ev.Input:
    """The input that a message becomes when it is delivered; `StoreTooNew` if a later version sent it."""
    if mail.kind == "signal":
        return ev.Signal(at=at, message=mail.id, name=mail.name, value=Raw(mail.data.encode()))
    if mail.kind == "cancel":
        return ev.CancelRequested(at=at, message=mail.id, reason=reason_of(mail))
    made = _ENDS.get(mail.kind)
    if made is None:
        raise StoreTooNew(
            f"This run has a message of the kind {quoted(mail.kind)}, which this version of Perdure does not know. "
            f"It knows signal, cancel, {' and '.join(_ENDS)}. A newer version sent it: upgrade this process."
        )
    end = _ends.decode(mail.data)
    return made(
        at=at,
        message=mail.id,
        step=end.step,
        run=end.run,
        status=end.status,
        value=end.value,
        error=end.error,
        attempts=end.attempts,
    )
