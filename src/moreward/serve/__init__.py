"""A reward server: one process that owns the model, one that speaks HTTP.

    HTTP ── guard ── routes ── door ── queue ── owner ══ pipe ══ worker ── Scorer

`guard` keeps out what is too large, too slow or has no key; `routes` speak the formats of trainers and engines, one
file each; `door` turns them into jobs and checks their size; the `queue` joins the jobs of many requests into batches;
`owner` starts the `worker`, which alone imports torch, and starts it again when it dies.
"""
