"""The ``stock`` form: the memory as gated decoder blocks of a stock architecture."""
