"""Machinery that knows no capability, and the only home of drivers and of Quart."""
