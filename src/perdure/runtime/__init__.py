"""Lets workflow code run against the core: the event loop of async runs, the threads of sync ones, the context."""
