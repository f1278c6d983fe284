"""Concept packs: making one, and asking what one can be used for."""
