"""Look-up tables: `nn.Embedding`."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ghost.gradients import RowGathers, SampleGradients
from ghost.layers.base import LayerRule, register_layer


@register_layer(nn.Embedding)
class EmbeddingRule(LayerRule):
    """Weight `[V, d]`; the input is `[b, …]` int64 ids, or `[T]` positions shared by all samples.

    As a matrix it maps one-hot ids to rows.
    """

    inputs_first = True

    def rows_first(self, x: Tensor, rows: int) -> Tensor:
        if x.dim() == 1 and x.shape[0] != rows:  # positions: arange(T)
            x = x[None]
        return super().rows_first(x, rows)

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        return F.embedding(x, params["weight"], module.padding_idx)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, nn.Embedding)
        ids = x[:, None].flatten(1)  # [b, T]
        grad = grad.reshape(*ids.shape, module.embedding_dim)  # [b, T, d]
        if module.padding_idx is not None:
            grad = grad * (ids != module.padding_idx)[:, :, None]
        return {"weight": RowGathers(ids, grad, module.num_embeddings)}
