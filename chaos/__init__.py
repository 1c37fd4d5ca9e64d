"""Real faults against real processes: `make chaos`. What is run and what is promised: `docs/chaos.md`."""
