"""The commands: one module for each, and `main`, which imports only the one that was asked for."""
