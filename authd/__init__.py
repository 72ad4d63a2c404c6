"""authd: registration, login, refresh and logout over HTTP."""

__version__ = "0.1.0"
