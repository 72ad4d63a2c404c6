# Sourced by the other scripts.

# pyenv puts a command on the path for every version it has, and those not active only fail: a Python is what runs.
python_runs() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

use_pyenv_pythons() {
    command -v pyenv >/dev/null || return 0
    local version bin
    for version in 3.11 3.12 3.13; do
        python_runs "python$version" && continue
        for bin in "$(pyenv root)/versions/$version".*/bin; do
            if python_runs "$bin/python$version"; then PATH="$bin:$PATH"; break; fi
        done
    done
}

find_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if python_runs "$python"; then echo "$python"; return; fi
    done
    echo "authd needs Python 3.11, 3.12 or 3.13" >&2
    return 1
}

# Makes .venv with authd and the stores it can bring along, or brings it up to date.
ensure_venv() {
    if ! python_runs .venv/bin/python; then
        use_pyenv_pythons
        local python
        python="$(find_python)"
        "$python" -m venv --clear .venv
    fi
    if ! cmp -s pyproject.toml .venv/installed.toml; then
        .venv/bin/python -m pip install --quiet --editable '.[dev]'
        cp pyproject.toml .venv/installed.toml
    fi
}
