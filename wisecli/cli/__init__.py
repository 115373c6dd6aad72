"""The command line: it parses, calls one function of :mod:`wisecli.commands`, and prints."""

from wisecli.cli.app import app, main

__all__ = ["app", "main"]
