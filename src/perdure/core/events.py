"""The events of a history: the line of inputs of one run, each followed by the commands it caused.

An *input* is what reached the code and carries the time at which it did (microseconds since the epoch,
UTC, never going back within a run). A *command* is what the code then asked for. `core/stored.py` turns
events into text and back. Kinds are added by later versions, never changed.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from perdure.core.failure import NOTHING, RecordedError


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True, gc=False):
    """What all events share: their kind is the tag of the stored form."""


# --- inputs -------------------------------------------------------------------------------------------


class Started(_Event, frozen=True, kw_only=True, tag="started", gc=False):
    """The run began. Its input is on the run's row; the seed is in both."""

    at: int
    seed: str
    format: int = 1


class Signal(_Event, frozen=True, kw_only=True, tag="signal", gc=False):
    at: int
    message: str
    name: str
    value: Raw


class CancelRequested(_Event, frozen=True, kw_only=True, tag="cancel_requested", gc=False):
    at: int
    message: str
    reason: str = ""


class _StepOutcome(_Event, frozen=True, kw_only=True, gc=False):
    """The outcome of a local step holds what the call was: there is no event for its beginning."""

    at: int
    step: str
    ordinal: int
    op: str = "run"
    name: str | None = None
    site: str = ""
    digest: str | None = None
    attempt: int = 1


class StepCompleted(_StepOutcome, frozen=True, kw_only=True, tag="step_completed", gc=False):
    value: Raw


class StepFailed(_StepOutcome, frozen=True, kw_only=True, tag="step_failed", gc=False):
    error: RecordedError


class AttemptFailed(_StepOutcome, frozen=True, kw_only=True, tag="attempt_failed", gc=False):
    """One attempt failed and another follows at `retry_at`, drawn once and kept."""

    error: RecordedError
    retry_at: int


class _RemoteEnd(_Event, frozen=True, kw_only=True, gc=False):
    at: int
    message: str
    step: str
    run: str = ""
    status: str = "completed"
    value: Raw = NOTHING
    error: RecordedError | None = None
    attempts: int = 1


class ChildEnded(_RemoteEnd, frozen=True, kw_only=True, tag="child_ended", gc=False):
    """A child run ended, or could not be started because its id is taken (then `error` says so)."""


class ActivityEnded(_RemoteEnd, frozen=True, kw_only=True, tag="activity_ended", gc=False):
    """A dispatched activity ended, after all its attempts."""


class Time(_Event, frozen=True, kw_only=True, tag="time", gc=False):
    """A timer of the code came due."""

    at: int


class Resumed(_Event, frozen=True, kw_only=True, tag="resumed", gc=False):
    """Where what a replay found newly begun has its place in the line."""

    at: int


# --- commands -----------------------------------------------------------------------------------------


class Sleep(_Event, frozen=True, kw_only=True, tag="sleep", gc=False):
    step: str
    ordinal: int
    due: int
    site: str = ""


class SignalWait(_Event, frozen=True, kw_only=True, tag="signal_wait", gc=False):
    step: str
    ordinal: int
    name: str
    deadline: int | None = None
    site: str = ""


class SignalTaken(_Event, frozen=True, kw_only=True, tag="signal_taken", gc=False):
    step: str
    message: str


class Activity(_Event, frozen=True, kw_only=True, tag="activity", gc=False):
    step: str
    ordinal: int
    name: str
    queue: str
    input: Raw
    run: str
    site: str = ""
    digest: str | None = None


class Child(_Event, frozen=True, kw_only=True, tag="child", gc=False):
    step: str
    ordinal: int
    name: str
    input: Raw
    run: str
    awaited: bool = True
    parent_close: str = "cancel"
    site: str = ""
    digest: str | None = None


class Sent(_Event, frozen=True, kw_only=True, tag="sent", gc=False):
    """A message to another run, sent by the code."""

    step: str
    ordinal: int
    op: str
    run: str
    name: str = ""
    value: Raw = NOTHING
    site: str = ""


class StepCancelled(_Event, frozen=True, kw_only=True, tag="step_cancelled", gc=False):
    """The final outcome of a step that the code, or its end, gave up."""

    step: str


class Patched(_Event, frozen=True, kw_only=True, tag="patched", gc=False):
    change: str
    site: str = ""


class Refused(_Event, frozen=True, kw_only=True, tag="refused", gc=False):
    """A value did not fit its annotation when it was first delivered: `what` is `input` or a message's id."""

    what: str
    error: RecordedError


class Ended(_Event, frozen=True, kw_only=True, tag="ended", gc=False):
    """The last event. Value or error are on the run's row; `unread` names mail that nobody took."""

    status: str
    unread: tuple[str, ...] = ()
    at: int | None = None  # only in ends without code, which have no input before them


Input = (
    Started
    | Signal
    | CancelRequested
    | StepCompleted
    | StepFailed
    | AttemptFailed
    | ChildEnded
    | ActivityEnded
    | Time
    | Resumed
)
Command = Sleep | SignalWait | SignalTaken | Activity | Child | Sent | StepCancelled | Patched | Refused | Ended
Event = Input | Command

INPUTS: Final = (
    Started,
    Signal,
    CancelRequested,
    StepCompleted,
    StepFailed,
    AttemptFailed,
    ChildEnded,
    ActivityEnded,
    Time,
    Resumed,
)
LOCAL_OUTCOMES: Final = (StepCompleted, StepFailed, AttemptFailed)


def kind(event: Event) -> str:
    """The kind of an event, as it is stored."""
    return str(type(event).__struct_config__.tag)
