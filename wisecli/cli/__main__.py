"""``python -m wisecli.cli``: the command line without its script."""

from wisecli.cli.app import main

main()
