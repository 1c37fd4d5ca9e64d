#!/bin/sh
# Makes one ready environment: setup.sh VENV PYTHON [LOCK]
#
# Needs only a Python with pip. pip puts a pinned uv into .tools (with --target: no venv module is needed, and an
# "externally managed" Python has nothing against it); uv makes VENV and fills it with exactly what LOCK holds. With
# the default, requirements/dev.txt, the project itself is installed too, editable. VENV/ready says that all of it
# worked.
set -eu
venv=$1
python=$2
lock=${3:-requirements/dev.txt}
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is not a Python 3.10 or newer; name another one: make PYTHON=python3.12 …"

if ! cmp -s requirements/tools.txt .tools/ready; then
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "'$python' has no pip; install it (Debian and Ubuntu: apt-get install python3-pip)"
    echo "setup: installing uv into .tools"
    rm -rf .tools
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$python" -m pip install --quiet --require-hashes --target .tools -r requirements/tools.txt ||
        fail "pip could not install uv; its reason is above"
    .tools/bin/uv --version >/dev/null || fail "uv was installed but does not run on this machine; its reason is above"
    cp requirements/tools.txt .tools/ready
fi

# Whoever told pip to use a mirror means uv too, which does not read pip's settings.
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    mirror=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX="$mirror"; fi
fi
export UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1
uv() {
    .tools/bin/uv --quiet "$@" || fail "uv could not set up $venv ('uv $1 ${2:-}' failed); its reason is above"
}

# An environment of the same Python is brought up to date in place, so that what runs in it goes on.
version() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null; }
if [ "$(version "$venv/bin/python")" != "$(version "$python")" ]; then
    echo "setup: making $venv with $("$python" --version)"
    uv venv --no-project --clear --python "$("$python" -c 'import sys; print(sys.executable)')" "$venv"
fi
rm -f "$venv/ready"
uv pip sync --python "$venv/bin/python" --require-hashes "$lock"
[ "$lock" != requirements/dev.txt ] ||
    uv pip install --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
touch "$venv/ready"
