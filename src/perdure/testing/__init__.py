"""For tests: of workflows, of stores, of Perdure itself. Ships to users; only what is imported here is loaded."""
