"""The ``gguf`` form: a stock checkpoint as a file of llama.cpp's."""
