"""Rivals of the paper, one file each, behind one small protocol (:mod:`wisecli.baselines.protocol`)."""
