"""Pure decisions: no I/O, clock, random, threads, loop or environment. All of it can be run in the head."""
