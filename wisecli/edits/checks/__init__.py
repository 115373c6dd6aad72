"""Checks of edits before training: signature, policy, conflicts."""
