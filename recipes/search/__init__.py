"""Searching a recipe's settings by what its edits do."""
