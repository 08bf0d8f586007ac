"""The words a key can take.

Members equal their strings, so `cfg.model.kind == "gpt2"` and `getattr(torch, cfg.dtype.model)` work.
"""

from enum import StrEnum

ModelKind = StrEnum("ModelKind", ["gpt2", "mlp", "cnn"])
DataKind = StrEnum("DataKind", ["interpreter", "text", "tokens", "digits"])
EngineName = StrEnum("EngineName", ["graddotprod", "regular"])
OptimizerName = StrEnum("OptimizerName", ["adamw", "sgd"])
Attention = StrEnum("Attention", ["sdpa", "eager"])
InterpreterDomain = StrEnum("InterpreterDomain", ["code", "docs", "legal"])
ValMode = StrEnum("ValMode", ["concat", "separate"])
Algebra = StrEnum("Algebra", ["auto", "token_token", "target", "fused"])
Family = StrEnum("Family", ["attn", "mlp", "embed", "norm", "head", "other"])
TokenType = StrEnum("TokenType", ["uint16", "uint32"])
FloatType = StrEnum("FloatType", ["float32", "float64", "bfloat16"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Schedule = StrEnum("Schedule", ["constant", "cosine", "linear"])
