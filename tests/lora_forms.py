"""LoRA as honest implementations compute it, and as the definition and its bounds do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic
from lora_bench.case import Problem
from lora_bench.spec import Factors

Form = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]  # x, w, bias, a, b, s
Product = Callable[[Tensor, Tensor, float], Tensor]  # a, b, s


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def turned(matrix: Tensor) -> Tensor:
    """The same matrix, stored column by column."""
    return matrix.T.contiguous().T


def bias_first(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    return torch.addmm(x @ w.T if bias is None else torch.addmm(bias, x, w.T), x @ a.T, b.T, alpha=s)


def rounded_once(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    y = linear(x.double(), w.double(), None if bias is None else bias.double())
    return (y + s * x.double() @ a.double().T @ b.double().T).to(x.dtype)


HONEST: dict[str, Form] = {
    "s on t": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a) * s, b),
    "s on x": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x * s, a), b),
    "s on A": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a * s), b),
    "s on B": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a), b * s),
    "s on y": lambda x, w, bias, a, b, s: linear(x, w, bias) + s * linear(linear(x, a), b),
    "addmm": lambda x, w, bias, a, b, s: torch.addmm(linear(x, w, bias), linear(x, a), b.T, alpha=s),
    "einsum": lambda x, w, bias, a, b, s: linear(x, w, bias) + torch.einsum("ni,ri,or->no", x, a, b * s),
    "bmm": lambda x, w, bias, a, b, s: linear(x, w, bias) + (x[:, None] @ a.T[None] @ (s * b).T[None])[:, 0],
    "columns": lambda x, w, bias, a, b, s: linear(x, turned(w), bias) + linear(linear(turned(x), turned(a)) * s, b),
    "fused": lambda x, w, bias, a, b, s: linear(torch.cat([x, linear(x, a) * s], 1), torch.cat([w, b], 1), bias),
    "base last": lambda x, w, bias, a, b, s: linear(torch.cat([linear(x, a), x], 1), torch.cat([b * s, w], 1), bias),
    "wide": lambda x, w, bias, a, b, s: linear(x, w, bias) + (s * linear(linear(*wide(x, a)), *wide(b))).to(x.dtype),
    "bias first": bias_first,
    "bias last": lambda x, w, bias, a, b, s: linear(x, w) + linear(linear(x, a) * s, b) + (0 if bias is None else bias),
    "rounded once": rounded_once,
    "row by row": lambda x, w, bias, a, b, s: torch.stack(
        [linear(t, w, bias) + linear(linear(t, a) * s, b) for t in x]
    ),
}
PRODUCTS: dict[str, Product] = {
    "s on BA": lambda a, b, s: s * (b @ a),
    "s on B": lambda a, b, s: (s * b) @ a,
    "s on A": lambda a, b, s: b @ (s * a),
    "turned": lambda a, b, s: ((a.T @ b.T) * s).T,
    "wide": lambda a, b, s: s * torch.mm(*wide(b, a)),
    "wide, rounded": lambda a, b, s: (s * torch.mm(*wide(b, a))).to(a.dtype),
}


def merges(w: Tensor, a: Tensor, b: Tensor, s: float) -> dict[str, Tensor]:
    merged = {name: (w + product(a, b, s)).to(w.dtype) for name, product in PRODUCTS.items()}
    merged["addmm"] = torch.addmm(w, b, a, alpha=s)
    merged["wide addmm"] = torch.addmm(*wide(w, b, a), alpha=s).to(w.dtype)
    return merged


def computed(problem: Problem, factors: Factors, s: float) -> dict[str, dict[str, Tensor]]:
    """What honest implementations get, by what it is and by name."""
    (x, w, bias, grad, *_), a, b = problem, factors.a, factors.b
    weights = merges(w, a, b, s)
    results: dict[str, dict[str, Tensor]] = {
        "y": {name: form(x, w, bias, a, b, s) for name, form in HONEST.items()},
        "W merged": weights,
        "y merged": {name: linear(x, weight, bias) for name, weight in weights.items()},
        "W restored": {
            f"{name}, by {undo}": restored
            for name, weight in weights.items()
            for undo, restored in merges(weight, a, b, -s).items()
        },
    }
    x, a, b = (tensor.detach().clone().requires_grad_() for tensor in (x, a, b))
    outputs = {name: form(x, w, bias, a, b, s) for name, form in HONEST.items()}
    del outputs["row by row"]  # its rows' gradients are summed in the dtype, which is not honest
    outputs |= {f"through {name}": linear(x, weight, bias) for name, weight in merges(w, a, b, s).items()}
    gradients = {name: torch.autograd.grad(y, (a, b, x), grad, retain_graph=True) for name, y in outputs.items()}
    return results | {
        of: {name: found[place] for name, found in gradients.items()} for place, of in enumerate(("dA", "dB", "dx"))
    }


def judged(
    problem: Problem, factors: Factors, s: float, arithmetic: Arithmetic, by: Any = bounds
) -> dict[str, tuple[Tensor, Tensor]]:
    """What the definition says and the bounds (`bounds`, or `bounds.probable`) allow, by what it is."""
    x, w, bias, grad, *_ = problem
    y = definition.forward(x, w, bias, factors, s)
    gradients = definition.gradients(x, grad, w, factors, s)
    allowed = by.gradients(x, grad, w, factors, s, arithmetic)
    return {
        "y": (y, by.separate(x, w, bias, factors, s, arithmetic)),
        "W merged": (definition.merged_weight(w, factors, s), by.merged_weight(w, factors, s, arithmetic)),
        "y merged": (y, by.merged(x, w, bias, factors, s, arithmetic)),
        "W restored": (w.double(), by.unmerged_weight(w, factors, s, arithmetic)),
    } | dict(zip(("dA", "dB", "dx"), zip(gradients, allowed, strict=True), strict=True))
