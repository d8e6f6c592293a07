"""Benchmarks of moreward against its peers: `python -m benchmarks.NAME`. How it is measured: docs/benchmarks.md."""
