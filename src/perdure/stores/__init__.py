"""Keep runs: rows and keys, never workflow code. `contract.py` says what each of them promises."""
