"""What is asked of a checkpoint in several tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moreward.checkpoint import Checkpoint

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


def bits_of(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def assert_holds(found: Checkpoint | None, step: int, tensors: Tensors, state: Mapping[str, object]) -> None:
    assert found is not None
    assert (found.step, found.state) == (step, state)
    for name, group in tensors.items():
        loaded = found.tensors(name)
        assert {k: bits_of(v) for k, v in loaded.items()} == {k: bits_of(v) for k, v in group.items()}
