"""Rewards for a whole file, in jobs that may be killed and started again."""

from moreward.bulk.job import BulkReport, SupportsScore, score_file

__all__ = ["BulkReport", "SupportsScore", "score_file"]
