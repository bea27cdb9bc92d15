"""`Merging`: what a layer refuses while its base holds an adapter, whatever kind of layer it is."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class Merging(nn.Module):
    """A layer whose adapters can be merged into its base; by `merged` it says whether any is now."""

    enabled: bool

    @property
    def merged(self) -> bool:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; RuntimeError for training while merged, when A and B would silently get no gradient."""
        if mode:
            self.refuse_merged("training: a merged adapter gets no gradient")
        return super().train(mode)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.refuse_merged("saving the whole layer: its base holds the adapter, which would be applied twice")
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.refuse_merged("loading a whole layer: what is merged would be taken for its base")
        super()._load_from_state_dict(*arguments)

    def refuse_disabled(self) -> None:
        if not self.enabled:
            raise RuntimeError("enable the adapter before merging it")

    def refuse_merged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"unmerge before {what}")
