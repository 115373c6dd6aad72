"""The command line: it parses, calls one function of :mod:`wisecli.commands`, and prints."""

from wisecli.cli.app import main

__all__ = ["main"]
