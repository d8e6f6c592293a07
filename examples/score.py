"""Rewards, order and choice of several responses to one prompt.

python examples/score.py runs/a 'Name a prime above 10.' '11' 'Twelve, I think.'
"""

import argparse
from collections.abc import Sequence

import moreward


def show(run: str, prompt: str, responses: Sequence[str]) -> int:
    """Print every response with its reward, best first; returns the index of the best."""
    scorer = moreward.load(run)
    found = scorer.compare(prompt, responses, explain=True)
    for place in found.order:
        reward = found.rewards[place]
        print(f"{reward.reward:+.3f}  {reward.expert:<12}  {responses[place]}")
        for expert, value in reward.expert_rewards.items():
            print(f"        {expert:<12}  {value:+.3f}")
    first, last = found.order[0], found.order[-1]
    print(f"P(best is preferred to worst) = {found.probabilities[first][last]:.2f}")
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("prompt")
    parser.add_argument("responses", nargs="+")
    asked = parser.parse_args()
    show(asked.run, asked.prompt, asked.responses)


if __name__ == "__main__":
    main()
