"""``python -m wisecli``: the command line without its script."""

from wisecli.cli.app import main

main()
