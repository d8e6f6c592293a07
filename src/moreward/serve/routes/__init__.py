"""The formats of trainers and engines, one file each. `FAMILIES` in `moreward.serve.app` lists them."""
