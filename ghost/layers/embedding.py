"""Look-up tables: `nn.Embedding`."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ghost.errors import UnsupportedModelError
from ghost.gradients import RowGathers, SampleGradients
from ghost.layers.base import LayerRule, register_layer


@register_layer(nn.Embedding)
class EmbeddingRule(LayerRule):
    """Weight `[V, d]`; the input is `[b, …]` int64 ids, or `[T]` positions shared by all samples."""

    def check(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, nn.Embedding)
        for option, why in (
            (module.max_norm is not None, "max_norm rewrites the table during the forward"),
            (module.scale_grad_by_freq, "scale_grad_by_freq makes a sample's gradient depend on its batch"),
            (module.sparse, "sparse=True yields sparse gradients"),
        ):
            if option:
                raise UnsupportedModelError(
                    f"layer {name!r} is an nn.Embedding whose {why}: set it to its default."
                )

    def rows_first(self, x: Tensor, rows: int) -> Tensor:
        if x.dim() == 1 and x.shape[0] != rows:  # positions: arange(T)
            x = x[None]
        return super().rows_first(x, rows)

    def forward(self, module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        return F.embedding(x, params["weight"], module.padding_idx)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        assert isinstance(module, nn.Embedding)
        ids = x.reshape(x.shape[0], -1)  # [b, T]
        grad = grad.reshape(*ids.shape, -1)  # [b, T, d]
        if module.padding_idx is not None:
            grad = grad * (ids != module.padding_idx)[:, :, None]
        return {"weight": RowGathers(ids, grad, module.num_embeddings)}
