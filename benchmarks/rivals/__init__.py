"""Other sparse attention on the same inputs as ours, run unmodified from sources that are not part of this project."""
