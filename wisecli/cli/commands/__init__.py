"""The commands of the command line: the options of each, one call, and what is printed."""
