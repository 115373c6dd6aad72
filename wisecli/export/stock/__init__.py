"""The ``stock`` form: the memory and its router as decoder blocks of a stock architecture."""
