"""What an implementer writes, without a third-party library; and the same with a bug."""

from __future__ import annotations

from textwrap import dedent

PLUG_IN = dedent("""\
    from torch import nn
    from lora_bench import Subject
    class Lora(nn.Module):
        def __init__(self, base, spec):
            super().__init__()
            self.base, self.scaling = base.requires_grad_(False), spec.scaling
            self.a = nn.Parameter(base.weight.new_empty(spec.rank, base.in_features).normal_())
            self.b = nn.Parameter(base.weight.new_zeros(base.out_features, spec.rank))
        def forward(self, x):
            return self.base(x) + self.scaling * (x @ self.a.T @ self.b.T)
    def load(layer, factors):
        layer.a.data.copy_(factors.a), layer.b.data.copy_(factors.b)
    ACME = Subject("acme", Lora, load, supports=lambda spec: "no dropout" if spec.dropout else None)
    """)
WRONG = PLUG_IN.replace("self.scaling *", "2 * self.scaling *")
