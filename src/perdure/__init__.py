"""Perdure: durable execution for Python. These are the public names; nothing else is."""

from typing import TYPE_CHECKING

from perdure.client import Client, RunHandle
from perdure.core.errors import (
    CallFailed,
    Cancelled,
    ChildFailed,
    DuplicateStepId,
    IdempotencyConflict,
    LimitExceeded,
    NonDeterminismError,
    NonRetryable,
    NotAStore,
    NoTransactions,
    PayloadError,
    PerdureError,
    RetryAfter,
    RolledBack,
    RunCancelled,
    RunExists,
    RunFailed,
    RunFinished,
    RunNotFound,
    RunTerminated,
    RunTimedOut,
    StepFailed,
    StepTimedOut,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    StoreUnavailable,
    UnknownWorkflow,
)
from perdure.core.limits import Limits
from perdure.core.retry import Retry
from perdure.core.status import Status
from perdure.engine import Engine, Worker
from perdure.info import Event, RunInfo, RunPage
from perdure.runtime.context import Context, Pending
from perdure.runtime.registry import Activity, Workflow, activity, workflow
from perdure.stores.memory import MemoryStore
from perdure.stores.opening import by_name as __getattr__  # noqa: F401  # PostgresStore, whose driver is an extra
from perdure.stores.sqlite import SQLiteStore
from perdure.worker.executing import StepInfo, current_step

if TYPE_CHECKING:
    from perdure.stores.postgres import PostgresStore as PostgresStore


__all__ = [
    "Activity",
    "CallFailed",
    "Cancelled",
    "ChildFailed",
    "Client",
    "Context",
    "DuplicateStepId",
    "Engine",
    "Event",
    "IdempotencyConflict",
    "LimitExceeded",
    "Limits",
    "MemoryStore",
    "NoTransactions",
    "NonDeterminismError",
    "NonRetryable",
    "NotAStore",
    "PayloadError",
    "Pending",
    "PerdureError",
    "Retry",
    "RetryAfter",
    "RolledBack",
    "RunCancelled",
    "RunExists",
    "RunFailed",
    "RunFinished",
    "RunHandle",
    "RunInfo",
    "RunNotFound",
    "RunPage",
    "RunTerminated",
    "RunTimedOut",
    "SQLiteStore",
    "Status",
    "StepFailed",
    "StepInfo",
    "StepTimedOut",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreReadOnly",
    "StoreTooNew",
    "StoreUnavailable",
    "UnknownWorkflow",
    "Worker",
    "Workflow",
    "activity",
    "current_step",
    "workflow",
]
