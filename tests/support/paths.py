"""Where things are in the checkout, so that a test that moves need not count folders."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
