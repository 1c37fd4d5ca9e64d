#!/bin/sh
# Prints the interpreters of this machine that Perdure supports, one a line: "3.12 /usr/bin/python3.12"
#
# Each is started before it is believed: a version manager's shim may be on PATH for a Python that is switched off.
# For those we look where pyenv keeps them.
for version in 3.10 3.11 3.12 3.13 3.14; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        found=$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null) || continue
        echo "$version $found"
        break
    done
done
