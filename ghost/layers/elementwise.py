"""Layers whose output is affine in their parameters, entry by entry: RMS norms, gains and shifts."""

import torch
from torch import Tensor, nn

from ghost.gradients import Materialised, SampleGradients
from ghost.layers.base import LayerRule, leading_ones, register_layer, sum_rows_to

TRANSFORMERS_NORMS = {
    "deepseek_v2": "DeepseekV2RMSNorm",
    "deepseek_v3": "DeepseekV3RMSNorm",
    "exaone4": "Exaone4RMSNorm",
    "gemma": "GemmaRMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "glm": "GlmRMSNorm",
    "glm4": "Glm4RMSNorm",
    "gpt_oss": "GptOssRMSNorm",
    "granite": "GraniteRMSNorm",
    "granitemoe": "GraniteMoeRMSNorm",
    "helium": "HeliumRMSNorm",
    "llama": "LlamaRMSNorm",
    "llama4": "Llama4TextRMSNorm",
    "longt5": "LongT5LayerNorm",
    "ministral": "MinistralRMSNorm",
    "mistral": "MistralRMSNorm",
    "mixtral": "MixtralRMSNorm",
    "mt5": "MT5LayerNorm",
    "olmo2": "Olmo2RMSNorm",
    "olmo3": "Olmo3RMSNorm",
    "olmoe": "OlmoeRMSNorm",
    "phi3": "Phi3RMSNorm",
    "pixtral": "PixtralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen2_moe": "Qwen2MoeRMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "qwen3_moe": "Qwen3MoeRMSNorm",
    "smollm3": "SmolLM3RMSNorm",
    "t5": "T5LayerNorm",
    "t5gemma": "T5GemmaRMSNorm",
    "umt5": "UMT5LayerNorm",
}
"""Hugging Face's RMS norms by model: `w ∘ n(x)`, or Gemma's `(1 + w) ∘ n(x)`."""


@register_layer(
    nn.RMSNorm,
    *(f"transformers.models.{model}.modeling_{model}.{name}" for model, name in TRANSFORMERS_NORMS.items()),
)
class ElementwiseAffineRule(LayerRule):
    """Any layer with one input and one output `y = s_0(x) + Σ_k s_k(x) ∘ w_k`, each parameter `w_k` broadcast
    over the leading axes of `y`.

    The slopes `s_k` are differences of the layer's own outputs, so nothing of its formula is repeated here.
    A layer of your own that is of this kind, and does not edit its input, needs one line:
    `register_layer(Scale)(ElementwiseAffineRule)`.
    """

    any_rank = True

    def smallest_rank(self, module: nn.Module) -> int:
        shapes = [p.shape for p in module.parameters(recurse=False)]
        return 1 + max(len(shape) - leading_ones(shape) for shape in shapes)

    def gradients(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, SampleGradients]:
        zeros = {
            name: torch.zeros_like(p, dtype=grad.dtype) for name, p in module.named_parameters(recurse=False)
        }
        offset = self.forward(module, zeros, x)
        found: dict[str, SampleGradients] = {}
        for name, zero in zeros.items():
            slope = self.forward(module, zeros | {name: torch.ones_like(zero)}, x) - offset
            found[name] = Materialised(sum_rows_to(grad * slope.to(grad.dtype), zero.shape))
        return found
