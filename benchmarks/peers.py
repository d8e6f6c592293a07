"""The peers: what people run today. Each function builds one and returns one run of it as a function.

N rows, T tokens, D hidden, P prompts. Outputs are rewards in the order of the texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import shapes

Run = Callable[[], Any]


def adapter_draws(num_rows: int, num_adapters: int, used: int | None = None) -> list[Tensor]:
    """Which adapter each row meets, in four rounds that differ, as in traffic. `used`: only so many of them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(used or num_adapters, (num_rows,), generator=generator) for _ in range(4)]


def hf(shape: str, lengths: Sequence[int], *, batch_size: int = 0, budget: int = 0) -> Run:
    """One Hugging Face model: batches of `batch_size` in order of arrival, each padded to its longest; or sorted by
    length under a budget of padded tokens."""
    model = shapes.classifier(shape)
    rows = shapes.texts(lengths)
    batches = shapes.budget_batches(lengths, budget) if budget else shapes.in_turn_batches(len(rows), batch_size)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    inputs = [shapes.padded([rows[i] for i in batch]) for batch in batches]

    @torch.no_grad()
    def run() -> Tensor:
        logits = [model(input_ids=ids_NT, attention_mask=mask_NT).logits[:, 0] for ids_NT, mask_NT in inputs]
        return torch.cat(logits)[order]

    return run


def onnx_file(shape: str, ids_NT: Tensor, mask_NT: Tensor, folder: str) -> Path:
    """One model as ONNX, free in both axes; the file also serves OpenVINO."""
    model = shapes.classifier(shape)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
            return self.model(input_ids=ids_NT, attention_mask=mask_NT).logits[:, 0]  # type: ignore[no-any-return]

    path = Path(folder) / "model.onnx"
    axes = {0: torch.export.Dim("rows", min=1, max=512), 1: torch.export.Dim("tokens", min=2, max=512)}
    with torch.no_grad():
        torch.onnx.export(
            Logits().eval(),
            (ids_NT[:2], mask_NT[:2]) if len(ids_NT) > 1 else (ids_NT.repeat(2, 1), mask_NT.repeat(2, 1)),
            path,
            input_names=["ids", "mask"],
            output_names=["reward"],
            dynamic_shapes={"ids_NT": axes, "mask_NT": axes},
            dynamo=True,
            verbose=False,
        )
    return path


def onnxruntime(shape: str, lengths: Sequence[int], *, batch_size: int = 0, budget: int = 0) -> Run:
    import onnxruntime as ort

    rows = shapes.texts(lengths)
    batches = shapes.budget_batches(lengths, budget) if budget else shapes.in_turn_batches(len(rows), batch_size)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    inputs = [shapes.padded([rows[i] for i in batch]) for batch in batches]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_file(shape, *inputs[0], folder)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = [{"ids": ids_NT.numpy(), "mask": mask_NT.numpy()} for ids_NT, mask_NT in inputs]

    def run() -> Tensor:
        return torch.cat([torch.from_numpy(session.run(None, feed)[0]) for feed in feeds])[order]

    return run


def openvino(shape: str, lengths: Sequence[int], *, batch_size: int = 0, budget: int = 0, dtype: str = "f32") -> Run:
    import openvino as ov

    rows = shapes.texts(lengths)
    batches = shapes.budget_batches(lengths, budget) if budget else shapes.in_turn_batches(len(rows), batch_size)
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    inputs = [shapes.padded([rows[i] for i in batch]) for batch in batches]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        core = ov.Core()
        compiled = core.compile_model(core.read_model(onnx_file(shape, *inputs[0], folder)), "CPU", settings)
    request = compiled.create_infer_request()
    feeds = [[ids_NT.numpy(), mask_NT.numpy()] for ids_NT, mask_NT in inputs]

    def run() -> Tensor:
        return torch.cat([torch.from_numpy(request.infer(feed)[0].copy()) for feed in feeds])[order]

    return run


def peft(
    shape: str,
    *,
    how: str,
    num_adapters: int,
    num_rows: int,
    tokens: int,
    rank: int = 12,
    used: int | None = None,
) -> Run:
    """Many adapters in PEFT. `how`: `sample` and `group` call `set_adapter` before every row or every group of rows of
    one adapter; `mixed` gives `adapter_names`; `none` runs the model without any."""
    model = shapes.headless(shapes.classifier(shape))
    ids_NT, mask_NT = shapes.padded(shapes.texts([tokens] * num_rows))
    head = shapes.head(model.config.hidden_size, 0)
    draws = cycle(adapter_draws(num_rows, num_adapters, used))
    peft = model if how == "none" else shapes.peft_model(model, shape, num_adapters=num_adapters, rank=rank)

    def hidden(rows: Tensor, **more: Any) -> Tensor:
        return peft(input_ids=ids_NT[rows], attention_mask=mask_NT[rows], **more).logits  # type: ignore[no-any-return]

    def parts(adapter_N: Tensor) -> list[Tensor]:
        if how == "sample":
            return list(torch.arange(num_rows).split(1))
        return [(adapter_N == a).nonzero().flatten() for a in adapter_N.unique()]

    @torch.no_grad()
    def run() -> Tensor:
        adapter_N = next(draws)
        everything = torch.arange(num_rows)
        if how == "none":
            return head(hidden(everything))[:, 0]  # type: ignore[no-any-return]
        if how == "mixed":
            names = [str(a) for a in adapter_N.tolist()]
            return head(hidden(everything, adapter_names=names))[:, 0]  # type: ignore[no-any-return]
        reward_N = torch.empty(num_rows)
        for rows in parts(adapter_N):
            peft.set_adapter(str(int(adapter_N[rows[0]])))
            reward_N[rows] = head(hidden(rows))[:, 0]
        return reward_N

    return run


def gate_of(hidden_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a gate that sends prompt p to expert p: the hidden vectors of the prompts, centred."""
    mean_D = hidden_PD.mean(0)
    weight_PD = (hidden_PD - mean_D) / (hidden_PD - mean_D).square().sum(1, keepdim=True)
    return weight_PD, -weight_PD @ mean_D


def step_inputs(num: int, prompt: int, tokens: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """ARLISS's step: `num` conversations of `tokens` tokens, the first `prompt` of which are the prompt."""
    rows = shapes.texts([tokens] * num)
    return shapes.padded([row[:prompt] for row in rows]), shapes.padded(rows)


def hf_step(shape: str, *, num: int = 5, prompt: int = 64, tokens: int = 128, one_by_one: bool = False) -> Run:
    """What one plain model does with the step's conversations; it has no router and no prompt to read."""
    return hf(shape, [tokens] * num, batch_size=1 if one_by_one else num)


def peft_arliss(
    shape: str, *, num: int = 5, prompt: int = 64, tokens: int = 128, rank: int = 12, one_by_one: bool = True
) -> Run:
    """ARLISS as the paper has it: the router's adapter reads the prompt, then the expert's reads the conversation.
    Adapters 0 to 4 are the experts, 5 is the router. Not one by one: all prompts at once, then group by group."""
    model = shapes.headless(shapes.classifier(shape))
    size = model.config.hidden_size
    peft = shapes.peft_model(model, shape, num_adapters=num + 1, rank=rank)
    prompts, whole = step_inputs(num, prompt, tokens)
    heads = [shapes.head(size, e) for e in range(num)]
    parts = torch.arange(num).split(1) if one_by_one else (torch.arange(num),)

    def hidden(adapter: int, inputs: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        peft.set_adapter(str(adapter))
        ids_NT, mask_NT = inputs
        return peft(input_ids=ids_NT[rows], attention_mask=mask_NT[rows]).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        weight, bias = gate_of(hidden(num, prompts, torch.arange(num)))

    @torch.no_grad()
    def run() -> Tensor:
        reward_N = torch.empty(num)
        for part in parts:
            expert_N = (hidden(num, prompts, part) @ weight.T + bias).argmax(1)
            for e in expert_N.unique().tolist():
                rows = part[expert_N == e]
                reward_N[rows] = heads[e](hidden(e, whole, rows))[:, 0]
        return reward_N

    return run


def hf_rodos(shape: str, *, num: int = 5, prompt: int = 64, tokens: int = 128) -> Run:
    """RODOS: a router model reads the prompts, then each expert model its conversations."""
    router = shapes.headless(shapes.classifier(shape, seed=num))
    experts = [shapes.classifier(shape, seed=e) for e in range(num)]
    prompts, (ids_NT, mask_NT) = step_inputs(num, prompt, tokens)

    def routed() -> Tensor:
        return router(input_ids=prompts[0], attention_mask=prompts[1]).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        weight, bias = gate_of(routed())

    @torch.no_grad()
    def run() -> Tensor:
        expert_N = (routed() @ weight.T + bias).argmax(1)
        reward_N = torch.empty(num)
        for e in expert_N.unique().tolist():
            rows = (expert_N == e).nonzero().flatten()
            reward_N[rows] = experts[e](input_ids=ids_NT[rows], attention_mask=mask_NT[rows]).logits[:, 0]
        return reward_N

    return run


def naive_best_of_n(shape: str, *, prompt: int, response: int, num: int, batch_size: int = 16) -> Run:
    """Every response with a copy of its prompt."""
    model = shapes.classifier(shape)
    inputs = [shapes.padded(rows) for rows in _split(best_of_n_rows(prompt, response, num), batch_size)]

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat(
            [model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0] for ids, mask in inputs]
        )

    return run


def best_of_n_rows(prompt: int, response: int, num: int) -> list[list[int]]:
    """`num` responses to one prompt."""
    first, *responses = shapes.texts([prompt, *[response] * num])
    return [first + more for more in responses]


def peft_dmoerm(shape: str, *, num_experts: int = 5, num_rows: int = 8, tokens: int = 128, rank: int = 12) -> Run:
    """DMoERM's inner experts in PEFT: all of them judge every row, one after another."""
    model = shapes.headless(shapes.classifier(shape))
    peft = shapes.peft_model(model, shape, num_adapters=num_experts, rank=rank)
    ids_NT, mask_NT = shapes.padded(shapes.texts([tokens] * num_rows))
    heads = [shapes.head(model.config.hidden_size, e) for e in range(num_experts)]

    @torch.no_grad()
    def run() -> Tensor:
        rewards = []
        for e, head in enumerate(heads):
            peft.set_adapter(str(e))
            rewards.append(head(peft(input_ids=ids_NT, attention_mask=mask_NT).logits)[:, 0])
        return torch.stack(rewards, 1).flatten()

    return run


def _split(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
