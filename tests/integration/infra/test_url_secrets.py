"""No command shows a part of a password that stands unescaped in a store's URL, whatever the drivers make of it."""

import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from support.process import INHERITED

from authd.embedded.processes import free_port

#: Runs each command with each pair of URLs. A line of its output parts one run from the next.
PROGRAM = """
import json, os, sys, traceback
from authd.cli.main import main
for arguments, environment in json.load(sys.stdin):
    os.environ.update(environment)
    try:
        status = main(arguments)
    except Exception:
        traceback.print_exc()
        status = "raised"
    print("status", arguments[0], status, flush=True)
"""
COMMANDS = (
    ["serve"],
    ["check"],
    ["migrate"],
    ["users", "show", "ada@example.com"],
    ["users", "unlock", "ada@example.com"],
)
PASSWORDS = 50
#: What is shorter may stand in a sentence by chance.
PART_CHARS = 4
ODD = "#?/@:%[]"


def make_password(source: random.Random) -> str:
    """Between odd characters stand capital letters, which no sentence has, and digits, which look like a port."""
    parts = ["".join(source.choices(source.choice((string.ascii_uppercase, string.digits)), k=5)) for _ in range(4)]
    return "".join(part + "".join(source.choices(ODD, k=source.randint(0, 2))) for part in parts)


@pytest.mark.timeout(180)
def test_no_command_shows_a_part_of_a_password(tmp_path: Path) -> None:
    source = random.Random(9)
    passwords = [make_password(source) for _ in range(PASSWORDS)]
    # Nobody listens there: what is accepted goes on to the drivers, and to their errors.
    port = free_port()
    names = {
        "AUTHD_DATABASE_URL": f"postgresql://authd:{{}}@127.0.0.1:{port}/authd",
        "AUTHD_REDIS_URL": f"redis://:{{}}@127.0.0.1:{port}/0",
    }
    runs = [
        (command, {other: url.format("x") for other, url in names.items()} | {name: names[name].format(password)})
        for password in [*passwords, quote(passwords[0], safe="")]
        for name in names
        for command in COMMANDS
    ]
    settings = {
        "AUTHD_SECRET": "s" * 32,
        "AUTHD_BIND": "127.0.0.1:0",
        "AUTHD_START_TIMEOUT_S": "0.05",
        "AUTHD_BCRYPT_COST": "4",
        "AUTHD_LOG_DIR": str(tmp_path / "logs"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(runs),
        env={name: value for name, value in os.environ.items() if name in INHERITED} | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    logged = "".join(file.read_text() for file in (tmp_path / "logs").iterdir())
    shown = done.stdout + done.stderr + logged
    statuses = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("status ")]
    # Refused with a sentence, or accepted and then without a store: both happen, and nothing else.
    assert len(statuses) == len(runs)
    assert {status for _, status in statuses} == {"1", "2"}
    assert "Traceback" not in shown
    # Digits of a password may stand by chance in a time or in a port.
    shown = re.sub(rf'"timestamp":"[^"]*"|\b{port}\b', "", shown)
    parts = {password[i : i + PART_CHARS] for password in passwords for i in range(len(password) - PART_CHARS + 1)}
    assert {part for part in parts if part in shown} == set()
