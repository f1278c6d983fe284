"""Distill an edited model into a damaged copy of itself, so that less of what was removed is left to come back."""
