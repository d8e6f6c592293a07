"""Is this what was trained? Golden rewards recomputed: in a run, in its exported forms, behind a URL."""
