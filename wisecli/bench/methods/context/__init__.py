"""Methods that keep edits as text or states and look them up for each prompt."""
