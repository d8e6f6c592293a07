"""How good a system is, and whether it beats another."""
