"""What a model's shape says about its time and memory: sizes of weights, KV and matrix products.

Dense decoder-only transformers with multi-head or grouped-query attention and 16-bit weights. What is
outside of that is refused by name: a mixture of experts, latent attention, sliding windows and
quantized weights would each get a wrong answer, not a rough one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from baton.step_time.shipped_shapes import SHIPPED

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "half": 2, "float": 4}

NUM_FFN_MATRICES = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "opt": 2, "gpt_neox": 2}
"""By `model_type`: gated feed-forward layers have three matrices, plain ones two."""

MIXTURE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


class UnsupportedShape(ValueError):
    """The model is of a kind, or split in a way, that the step-time model does not describe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    num_ffn_matrices: Literal[2, 3]
    vocab_size: int
    has_tied_embeddings: bool = False
    """The LM head reads the embedding's matrix: it is stored once."""
    dtype_bytes: int = 2
    max_context_tokens: int | None = None
    """None: unknown."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1 and not isinstance(value, bool):
                raise UnsupportedShape(f"{self.name}: {field.name} is {value}, expected at least 1")
        if self.num_ffn_matrices not in (2, 3):
            raise UnsupportedShape(
                f"{self.name}: num_ffn_matrices is {self.num_ffn_matrices}, expected 2 or 3"
            )
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedShape(
                f"{self.name}: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly"
            )

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices. Norms, biases and positions are below 0.1 % and left out."""
        query_and_output = 2 * self.hidden_size * self.num_heads * self.head_dim
        key_and_value = 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        return query_and_output + key_and_value + self.num_ffn_matrices * self.hidden_size * self.ffn_size

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.has_tied_embeddings else 2)
        return self.num_layers * self.layer_parameters + embeddings

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, over all ranks, each KV head counted once."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    def kv_bytes_per_token_and_rank(self, tensor_parallel_size: int, pipeline_parallel_size: int = 1) -> int:
        """On the fullest rank. With more ranks than KV heads each rank keeps a whole head."""
        heads = max(1, self.num_kv_heads // tensor_parallel_size)
        layers = -(-self.num_layers // pipeline_parallel_size)
        return 2 * layers * heads * self.head_dim * self.dtype_bytes

    def check_parallel(self, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
        """Raises UnsupportedShape with the numbers when the model cannot be split so."""
        tp, pp = tensor_parallel_size, pipeline_parallel_size
        if tp < 1 or pp < 1:
            raise UnsupportedShape(f"TP {tp} x PP {pp}: both start at 1")
        if self.num_heads % tp or self.ffn_size % tp:
            raise UnsupportedShape(
                f"{self.name}: {self.num_heads} heads and {self.ffn_size} FFN columns do not split by TP {tp}"
            )
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise UnsupportedShape(f"{self.name}: {self.num_kv_heads} KV heads do not split over TP {tp}")
        if pp > self.num_layers:
            raise UnsupportedShape(f"{self.name}: {self.num_layers} layers do not fill PP {pp}")


FILE_SUFFIXES = (".json", ".yaml", ".yml")
"""What ends otherwise and is no file is a name: Llama-3.1-8B."""


def shape_by_name(name: str) -> ModelShape:
    """A shipped shape; upper and lower case, and an owner before a slash, make no difference."""
    key = name.rpartition("/")[2].lower()
    for shipped, values in SHIPPED.items():
        if key == shipped.lower():
            return ModelShape(name=shipped, **cast(dict[str, Any], values))
    raise UnsupportedShape(f"no shape {name!r} is shipped; shipped are {', '.join(SHIPPED)}")


def load_shape(source: str) -> ModelShape:
    """From a model folder with config.json, an HF config or a YAML file of `ModelShape` fields, or a
    shipped name. Raises UnsupportedShape with a sentence."""
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if path.suffix in FILE_SUFFIXES:
            raise UnsupportedShape(f"{path} does not exist")
        return shape_by_name(source)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnsupportedShape(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UnsupportedShape(f"{path} holds no mapping of a model's fields")
    name = path.parent.name if path.name == "config.json" else path.stem
    if "model_type" in config or "text_config" in config or "architectures" in config:
        return shape_from_hf(config, name=name)
    return _from_fields({"name": name} | config, str(path))


def _from_fields(values: Mapping[str, Any], path: str) -> ModelShape:
    known = {field.name: field for field in fields(ModelShape)}
    if unknown := sorted(set(values) - set(known)):
        raise UnsupportedShape(f"{path}: no field {unknown[0]!r}; fields are {', '.join(known)}")
    required = [name for name in known if name not in OPTIONAL_FIELDS]
    if missing := [name for name in required if name not in values]:
        raise UnsupportedShape(f"{path}: {', '.join(missing)} missing")
    for name, value in values.items():
        wanted = str if name == "name" else bool if name == "has_tied_embeddings" else int
        if type(value) is not wanted:
            raise UnsupportedShape(f"{path}: {name} is {value!r}, expected a {wanted.__name__}")
    return ModelShape(**values)


OPTIONAL_FIELDS = ("has_tied_embeddings", "dtype_bytes", "max_context_tokens")


def shape_from_hf(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """From the contents of a Hugging Face config.json."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        config = {"torch_dtype": config.get("torch_dtype")} | dict(nested)
    kind = config.get("model_type")
    if mixture := [key for key in MIXTURE_KEYS if config.get(key)]:
        raise UnsupportedShape(
            f"{name} is a mixture of experts ({mixture[0]} is {config[mixture[0]]}): not supported, "
            "its time depends on which experts a batch touches"
        )
    if config.get("kv_lora_rank"):
        raise UnsupportedShape(
            f"{name} keeps latent KV (kv_lora_rank {config['kv_lora_rank']}): not supported"
        )
    if config.get("quantization_config"):
        raise UnsupportedShape(f"{name} has quantized weights: not supported, 16-bit weights are")
    if kind not in NUM_FFN_MATRICES:
        raise UnsupportedShape(
            f"{name}: model_type {kind!r} is not known (known: {', '.join(NUM_FFN_MATRICES)}); "
            "a YAML file of its sizes is accepted"
        )
    window = config.get("sliding_window")
    context = _optional_int(config, "max_position_embeddings")
    if window and config.get("use_sliding_window", True) and (context is None or window < context):
        raise UnsupportedShape(f"{name} attends to a window of {window} tokens: not supported")
    heads = _int(config, "num_attention_heads", name)
    hidden = _int(config, "hidden_size", name)
    if config.get("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedShape(f"{name} projects its embeddings: not supported")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise UnsupportedShape(f"{name} has weights of {dtype}: not supported")
    return ModelShape(
        name=name,
        num_layers=_int(config, "num_hidden_layers", name),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_optional_int(config, "num_key_value_heads") or heads,
        head_dim=_optional_int(config, "head_dim") or hidden // heads,
        ffn_size=_int(config, "ffn_dim" if kind == "opt" else "intermediate_size", name),
        num_ffn_matrices=cast(Literal[2, 3], NUM_FFN_MATRICES[kind]),
        vocab_size=_int(config, "vocab_size", name),
        has_tied_embeddings=bool(config.get("tie_word_embeddings", kind == "opt")),
        dtype_bytes=DTYPE_BYTES[dtype],
        max_context_tokens=context,
    )


def _int(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedShape(
            f"{name}: {key} is {json.dumps(value, default=str)}, expected a positive number"
        )
    return value


def _optional_int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None
