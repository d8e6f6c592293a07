"""Rewards inside other people's trainers, one file each. None of them is imported here."""
