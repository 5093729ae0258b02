"""Statistics of fused experts, which no hook on a module sees.

While a batch is probed, the experts modules compute by :meth:`ExpertStatistics._forward`, registered as one more
implementation in transformers' ``ExpertsInterface``: the same sums as every other implementation, with the tokens of
each expert at hand. Per expert and prompt, over all tokens of the prompt that are not padding:

    activation    mean |h|                       tokens that were not sent to the expert count as zero
    sensitivity   sum of g^2 (or mean of |g|)    likewise: J and h are zero there

so that the score of an expert's weight is the same as if the expert were a layer of its own, called with every token
and with its output taken times zero where the router did not choose it.

Those of Llama 4 have one implementation, which multiplies every expert with every token, those that were not sent to
it as zeros. There the products themselves are recorded, the rows of zeros left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dowser_peft.fused_experts import FusedWeight, fused_weight_names, is_dense

_IMPLEMENTATION = "dowser_probe"


class Layout(NamedTuple):
    """How the rows ``[B * tokens, features]`` of a tensor divide into prompts.

    Args:
        num_prompts: B.
        mask: which tokens are not padding, bool ``[B, tokens]``; None if all are.
    """

    num_prompts: int
    mask: torch.Tensor | None


class _Rows(NamedTuple):
    """The rows of one experts module, sorted by expert: each a token that was sent to an expert.

    Args:
        counts: rows of each expert.
        bins: ``prompt * E + expert`` of each row, int64.
        real: which rows are no padding, bool ``[rows, 1]``; None if all are.
        tokens: of each prompt, those that are no padding, ``[B]``.
    """

    counts: list[int]
    bins: torch.Tensor
    real: torch.Tensor | None
    tokens: torch.Tensor


class ExpertStatistics:
    """Records ``weights`` between :meth:`start` and :meth:`stop`.

    Args:
        weights: the fused parameters to record, by name.
        absolute: record the mean of ``|g|`` over tokens instead of the sum of ``g^2``.
        layout_of: how the input of an experts module ``[B * tokens, in]`` divides into prompts; may refuse it.
    """

    def __init__(
        self, weights: dict[str, FusedWeight], *, absolute: bool, layout_of: Callable[[torch.Tensor], Layout]
    ) -> None:
        self._weights, self._absolute, self._layout_of = weights, absolute, layout_of
        self._names = {(id(weight.experts), weight.parameter_name): name for name, weight in weights.items()}
        dense = {id(w.parameter): name for name, w in weights.items() if is_dense(w.experts)}
        self._dense = _DenseProducts(dense, self._record_dense) if dense else None
        self._implementations: list[tuple[Any, str | None]] = []  # of each configuration, to be restored
        self._started = False
        self.called: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._activation_sum: dict[str, torch.Tensor] = {}  # [B, E, in]
        self._sensitivity_sum: dict[str, torch.Tensor] = {}  # [B, E, out]
        self._token_count: dict[str, torch.Tensor] = {}  # [B]

    def start(self) -> None:
        """Begin a batch."""
        self.stop()
        self._forget()
        if not self._weights:
            return
        self._started = True
        if self._dense is not None:
            self._dense.__enter__()
        ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = self._forward
        dispatching: list[Any] = [w.experts for w in self._weights.values() if not is_dense(w.experts)]
        configs: dict[int, Any] = {id(experts.config): experts.config for experts in dispatching}
        for config in configs.values():
            self._implementations.append((config, config._experts_implementation))
            config._experts_implementation = {"": _IMPLEMENTATION}  # of this configuration, not of those inside it

    def stop(self) -> None:
        """Let the experts compute as before."""
        if not self._started:
            return
        self._started = False
        if self._dense is not None:
            self._dense.__exit__(None, None, None)
        while self._implementations:
            config, implementation = self._implementations.pop()
            config._experts_implementation = {"": implementation}
        del ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION]

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Statistics of the batch, on the CPU: there they are large. Mean ``|h|`` ``[B, E, in]`` and sums over probes
        ``[B, E, out]``; a parameter that was not used is missing.
        """
        activations = {
            name: (total / self._token_count[name].clamp(min=1)[:, None, None]).cpu()
            for name, total in self._activation_sum.items()
        }
        sensitivities = {name: total.cpu() for name, total in self._sensitivity_sum.items()}
        self._forget()
        return activations, sensitivities

    def _forward(
        self,
        module: Any,
        hidden_states: torch.Tensor,  # [tokens of all prompts, hidden]
        top_k_index: torch.Tensor,  # [tokens, k]
        top_k_weights: torch.Tensor,  # [tokens, k]
    ) -> torch.Tensor:
        up, down = fused_weight_names(module)
        num_experts = getattr(module, up).shape[0]
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        order = order[chosen < num_experts]  # an index past the last expert stands for none
        chosen = chosen[: len(order)]
        token = order // top_k_index.shape[1]
        rows = self._rows(hidden_states, token, chosen, num_experts)

        z = self._linear(module, up, hidden_states[token], rows)
        a = module._apply_gate(z) if up == "gate_up_proj" else module.act_fn(z)
        z = self._linear(module, down, a, rows)
        if getattr(module, "has_post_expert_norm", False):
            z = module.post_expert_norm(z)
        z = z * top_k_weights.reshape(-1)[order, None]
        every = z.new_zeros(top_k_index.numel(), z.shape[1]).index_copy(0, order, z)
        return every.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _rows(self, hidden_states: torch.Tensor, token: torch.Tensor, chosen: torch.Tensor, num_experts: int) -> _Rows:
        layout = self._layout_of(hidden_states)
        length = max(1, hidden_states.shape[0] // layout.num_prompts)
        real, tokens = None, torch.full((layout.num_prompts,), length, device=token.device)
        if layout.mask is not None:
            mask = layout.mask.to(token.device)
            real, tokens = mask.reshape(-1)[token, None], mask.sum(1)
        counts = torch.bincount(chosen, minlength=num_experts).tolist()
        return _Rows(counts, token // length * num_experts + chosen, real, tokens)

    def _linear(self, module: Any, parameter_name: str, x: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """``z = x W^T + b`` of each expert on its rows, recorded."""
        weight, bias = getattr(module, parameter_name), getattr(module, f"{parameter_name}_bias", None)
        parts = []
        for expert, part in enumerate(x.split(rows.counts)):
            if len(part):
                matrix = weight[expert].T if module.is_transposed else weight[expert]
                parts.append(F.linear(part, matrix, None if bias is None else bias[expert]))
        out_features = weight.shape[2 if module.is_transposed else 1]
        z = torch.cat(parts) if parts else x.new_zeros(0, out_features)
        name = self._names.get((id(module), parameter_name))
        return z if name is None else self._record(name, x, z, rows, weight.shape[0], lambda gradient: gradient)

    def _record_dense(self, name: str, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Record a product ``z [E, tokens, out]`` of all experts with ``x [E, tokens, in]``."""
        x = x.detach()
        expert, row = x.ne(0).any(-1).nonzero(as_tuple=True)
        rows = self._rows(x[0], row, expert, x.shape[0])
        return self._record(name, x[expert, row], z, rows, x.shape[0], lambda gradient: gradient[expert, row])

    def _record(
        self,
        name: str,
        x: torch.Tensor,
        z: torch.Tensor,
        rows: _Rows,
        num_experts: int,
        rows_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Record the inputs ``x [rows, in]``, and the gradient of ``z``, of which ``rows_of`` takes the rows.

        Returns:
            ``z``, to go on with.
        """
        self.called.add(name)
        shape = (rows.tokens.shape[0], num_experts)
        self._add(self._activation_sum, name, x.detach().abs(), rows, shape)
        self._token_count[name] = self._token_count.get(name, 0) + rows.tokens
        self._sensitivity_sum.setdefault(name, torch.zeros(*shape, z.shape[-1], device=z.device))
        if not torch.is_grad_enabled():
            return z
        if not z.requires_grad:  # the graph starts here
            z = z.detach().requires_grad_()
        z.register_hook(lambda gradient: self._on_gradient(name, rows, shape, rows_of(gradient)))
        return z.clone() if z.is_leaf else z

    def _on_gradient(self, name: str, rows: _Rows, shape: tuple[int, int], gradient: torch.Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self._absolute:  # the authors' code takes the mean over tokens
            per_row = rows.tokens.clamp(min=1)[rows.bins // shape[1], None]
            self._add(self._sensitivity_sum, name, wide.abs() / per_row, rows, shape)
        else:
            self._add(self._sensitivity_sum, name, wide.square(), rows, shape)

    def _add(
        self, sums: dict[str, torch.Tensor], name: str, values: torch.Tensor, rows: _Rows, shape: tuple[int, int]
    ) -> None:
        """Add the rows ``values`` to the sums ``[B, E, features]`` of their prompts and experts."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if rows.real is not None:
            values = values.masked_fill(~rows.real, 0)
        found = sums.get(name)
        if found is None or found.dtype != values.dtype:
            wide = torch.zeros(*shape, values.shape[1], dtype=values.dtype, device=values.device)
            found = sums[name] = wide if found is None else wide + found
        found.view(-1, values.shape[1]).index_add_(0, rows.bins, values)


class _DenseProducts(TorchFunctionMode):
    """Hands every ``bmm(x, parameter)`` to ``record``, and its result on.

    Args:
        names: names of the parameters, by their ids.
        record: takes a name, ``x`` and the product; returns the product to go on with.
    """

    def __init__(
        self, names: dict[int, str], record: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._names, self._record = names, record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.bmm and len(args) == 2 and id(args[1]) in self._names:
            return self._record(self._names[id(args[1])], args[0], result)
        return result
