"""The router of a stock checkpoint: what is asked, about whom, and which token of an answer comes next."""
