"""A mixture that lives: one expert more, another, or one less, and the line of versions that this makes."""
