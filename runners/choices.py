"""The words a key can take.

Members equal their strings, so `cfg.model.kind == "gpt2"` and `getattr(torch, cfg.dtype.model)` work.
"""

from enum import StrEnum

ModelKind = StrEnum("ModelKind", ["hf", "mlp", "cnn"])
Architecture = StrEnum(
    "Architecture", ["gpt2", "gpt_neox", "llama", "qwen2", "opt", "t5", "bert", "vit", "resnet", "llava"]
)
DataKind = StrEnum("DataKind", ["interpreter", "text", "tokens", "hf", "digits", "digit_questions", "table"])
TaskName = StrEnum(
    "TaskName", ["language", "seq2seq", "text_classes", "image_classes", "table_classes", "image_text"]
)
EngineName = StrEnum("EngineName", ["graddotprod", "gradprojlora", "regular"])
OptimizerName = StrEnum("OptimizerName", ["adam", "adamw", "sgd"])
PolicyName = StrEnum(
    "PolicyName", ["none", "all", "top_k", "bottom_k", "threshold", "softmax", "greedy", "curriculum"]
)
Attention = StrEnum("Attention", ["sdpa", "eager"])
InterpreterDomain = StrEnum("InterpreterDomain", ["code", "docs", "legal"])
ValMode = StrEnum("ValMode", ["concat", "separate"])
ValGradDevice = StrEnum("ValGradDevice", ["model", "cpu"])
ValSets = StrEnum("ValSets", ["one", "domain"])
Resolution = StrEnum("Resolution", ["total", "layer", "family", "head"])
Preconditioner = StrEnum("Preconditioner", ["none", "adam", "auto"])
Credit = StrEnum("Credit", ["step", "trajectory"])
Algebra = StrEnum("Algebra", ["auto", "token_token", "target", "fused"])
Family = StrEnum("Family", ["attn", "mlp", "embed", "norm", "head", "conv", "other"])
StoredType = StrEnum("StoredType", ["float32", "float16", "bfloat16", "int8"])
ShardFormat = StrEnum("ShardFormat", ["npy", "pt"])
Metric = StrEnum("Metric", ["cosine", "inner_product"])
QuerySplit = StrEnum("QuerySplit", ["val", "train"])
TokenType = StrEnum("TokenType", ["uint16", "uint32"])
FloatType = StrEnum("FloatType", ["float32", "float64", "bfloat16", "float16"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Strategy = StrEnum("Strategy", ["none", "ddp", "fsdp"])
Schedule = StrEnum("Schedule", ["constant", "cosine", "linear"])
NonFinite = StrEnum("NonFinite", ["stop", "skip", "mark"])
RetrainEngine = StrEnum("RetrainEngine", ["regular", "scored"])
ProjectionKind = StrEnum("ProjectionKind", ["gaussian", "rademacher", "orthonormal"])
ExperimentName = StrEnum(
    "ExperimentName", ["one_step", "mislabel", "text", "dropping", "domains", "lds", "selection"]
)
