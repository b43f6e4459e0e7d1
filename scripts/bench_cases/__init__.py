"""The cases of scripts/bench."""
