"""Capability labels: which of two responses is better in one named point, asked of a judge in both orders.

The protocol is DMoERM's (arXiv 2403.01197 and its public repository): every unordered pair, every point of the pair's
task, both orders; a label is kept only where both verdicts name the same response.
"""
