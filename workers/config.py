"""Engine configuration: frozen, typed, unknown keys refused with the nearest right one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

QuantizationName = Literal["none", "int8", "w8a8", "int4", "w4a8", "nf4"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "int8", "fp8"]


_SIZE = TypeAdapter(ByteSize)


def _as_bytes(value: object) -> object:
    """Text such as ``6GiB`` as a number; anything else is the field's own to judge."""
    return int(_SIZE.validate_python(value)) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_as_bytes)]
"""A number of bytes, or text with a unit."""


class FrozenConfig(BaseModel):
    """Base of every configuration section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = list(cls.model_fields)
        for key in data:
            if key in known:
                continue
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no key {key!r}; {hint}")
        return data


class LoopGuardConfig(FrozenConfig):
    """When a thought counts as caught in a loop."""

    min_repeats: int = Field(4, ge=2)
    """Copies of the same run of tokens, back to back."""
    min_tokens: int = Field(96, ge=8)
    """Tokens that those copies span together."""
    max_period: int = Field(256, ge=1)
    """The longest run that is looked for, in tokens."""


class ParallelConfig(FrozenConfig):
    """How one engine is spread over ranks: ``pipeline`` stages of ``tensor`` ranks each."""

    tensor: int = Field(1, ge=1, le=64)
    """Ranks that share every layer: attention heads, MLP and vocabulary."""
    pipeline: int = Field(1, ge=1, le=64)
    """Stages that the layers are split into."""
    sequence_from: int | None = Field(None, ge=2)
    """Prefill steps of at least so many tokens are split by tokens over the tensor ranks, which
    then hold every weight; ``None``: never."""
    micro_batches: int | None = Field(None, ge=1)
    """Parts of a step in flight between stages; ``None``: as many as its tokens are worth."""
    rank_timeout_s: float = Field(3.0, gt=0)
    """A rank that gives no sign of life for this long ends the whole group."""

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline

    @model_validator(mode="after")
    def _tokens_need_ranks(self) -> Self:
        if self.sequence_from is not None and self.tensor == 1:
            raise ValueError("sequence_from splits tokens over tensor ranks; tensor is 1")
        return self


class KVPagingConfig(FrozenConfig):
    """Where prefix blocks go that the KV pool has no room for; without a budget they are lost."""

    host_bytes: Bytes = Field(0, ge=0)
    """Host memory for them, taken at the start; 0: none."""
    disk_bytes: Bytes = Field(0, ge=0)
    """Room on a disk for what host memory has no room for; 0: none."""
    folder: Path | None = None
    """On that disk; made where it is missing. ``None``: the system's folder for temporary files,
    which may lie in memory."""

    @property
    def is_on(self) -> bool:
        return self.host_bytes > 0

    @model_validator(mode="after")
    def _disk_needs_host(self) -> Self:
        if self.disk_bytes and not self.host_bytes:
            raise ValueError(
                "disk_bytes needs host_bytes: blocks wait in host memory for the disk; a few dozen "
                "blocks are enough"
            )
        return self


AttentionKind = Literal["full", "sliding_window", "sink_window", "top_pages"]
FULL_ATTENTION: Literal["full"] = "full"


class AttentionConfig(FrozenConfig):
    """Which keys a token attends to. All kinds but ``full`` are approximations of the model.

    Its ``label`` may stand for it: ``sliding_window:1024``, ``sink_window:1024+4``,
    ``top_pages:16``.
    """

    kind: AttentionKind = "full"
    """``sliding_window``: the last ``window`` tokens; ``sink_window``: also the first ``sinks``;
    ``top_pages``: prompts in full, generated tokens the first block, the last two and the ``pages``
    that promise the highest scores."""
    window: int | None = Field(None, ge=1)
    """Tokens, the attending one included."""
    sinks: int | None = Field(None, ge=1)
    """Tokens."""
    pages: int | None = Field(None, ge=1)
    """KV blocks of ``block_size`` tokens, chosen anew by each token for each KV head."""

    @model_validator(mode="before")
    @classmethod
    def _read_label(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        kind, colon, written = data.partition(":")
        names = _SIZES.get(kind, ())
        values = written.split("+") if colon else []
        if kind not in _SIZES or len(values) != len(names):
            forms = (":".join((k, "+".join(s).upper())).rstrip(":") for k, s in _SIZES.items())
            raise ValueError(f"attention {data!r} is none of {', '.join(forms)}")
        return {"kind": kind, **dict(zip(names, values, strict=True))}

    @model_validator(mode="after")
    def _kind_has_its_sizes(self) -> Self:
        needed = _SIZES[self.kind]
        for size in ("window", "sinks", "pages"):
            if size in needed and getattr(self, size) is None:
                raise ValueError(f"attention {self.kind!r} needs {size!r}")
            if size not in needed and getattr(self, size) is not None:
                belongs = " and ".join(repr(kind) for kind in _SIZES if size in _SIZES[kind])
                raise ValueError(f"attention {self.kind!r} has no {size!r}; {belongs} has one")
        return self

    @property
    def is_exact(self) -> bool:
        """Whether every token attends to all before it, as the model was trained."""
        return self.kind == FULL_ATTENTION

    @property
    def tells_prompts_apart(self) -> bool:
        """Whether a token's KV depends on its being of the prompt or generated."""
        return self.kind == "top_pages"

    @property
    def label(self) -> str:
        """Kind and sizes in one word, the same for the same attention: ``sink_window:1024+4``."""
        sizes = "+".join(str(getattr(self, size)) for size in _SIZES[self.kind])
        return f"{self.kind}:{sizes}" if sizes else self.kind


_SIZES: dict[str, tuple[str, ...]] = {
    "full": (),
    "sliding_window": ("window",),
    "sink_window": ("window", "sinks"),
    "top_pages": ("pages",),
}


class EngineConfig(FrozenConfig):
    """One engine: a model, its memory and its batch."""

    model: str = "embedded"
    """``embedded``, a checkpoint folder, or a hub name."""
    dtype: DTypeName = "auto"
    """Of the weights, and of the KV cache unless ``kv_cache_dtype`` says otherwise; ``auto`` takes
    the checkpoint's."""
    quantization: QuantizationName = "none"
    """What the linears are rounded to while they are loaded; a checkpoint that is quantized already
    needs ``none``."""
    kv_cache_dtype: KVCacheDType = "auto"
    """What keys and values are stored as: ``auto`` takes the weights' dtype; ``int8`` and ``fp8``
    (e4m3) are codes of one byte with a scale for each token and KV head."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    weight_memory_bytes: Bytes | None = Field(None, ge=1)
    """Memory that the weights of one rank may take; layers that it does not hold are read from the
    disk in every step. ``None``: all of them are in memory."""
    block_size: int = Field(64, ge=1, le=1024)
    """Tokens in a KV block."""
    kv_cache_bytes: Bytes | None = Field(None, ge=1)
    """Size of the KV pool; ``None``: a share of the memory that is free after loading."""
    kv_memory_share: float = Field(0.5, gt=0, lt=1)
    """That share."""
    max_model_len: int | None = Field(None, ge=2)
    """Prompt plus output of one sequence; ``None``: the checkpoint's own limit."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences in one step."""
    max_batched_tokens: int = Field(1024, ge=1)
    """Token budget of one step: decode rows first, prefill chunks in what is left."""
    max_waiting: int = Field(1024, ge=1)
    """Requests that may wait; one more is refused."""
    prefix_caching: bool = True
    num_threads: int | None = Field(None, ge=1)
    """CPU threads; ``None``: every core this process may use, or one for a very small model."""
    seed: int = 0
    """Seeds the requests that bring none."""
    default_reservation: int = Field(512, ge=1)
    """Output tokens reserved for a request that names no ``max_tokens``."""
    aging_seconds: float = Field(5.0, gt=0)
    """A waiting request gains one priority level each time it has waited this long."""
    attention: AttentionConfig = AttentionConfig()
    loop_guard: LoopGuardConfig = LoopGuardConfig()
    parallel: ParallelConfig = ParallelConfig()
    kv_paging: KVPagingConfig = KVPagingConfig()

    @model_validator(mode="after")
    def _paging_needs_names(self) -> Self:
        if self.kv_paging.is_on and not self.prefix_caching:
            raise ValueError("kv_paging keeps blocks of the prefix cache; prefix_caching is off")
        return self

    @model_validator(mode="after")
    def _streams_one_set_of_weights(self) -> Self:
        if self.weight_memory_bytes is not None and self.parallel.sequence_from is not None:
            raise ValueError(
                "weight_memory_bytes and parallel.sequence_from cannot be together: a rank that "
                "splits prefill by tokens has a second set of all weights, which is not streamed"
            )
        return self

    @model_validator(mode="after")
    def _batch_holds_every_sequence(self) -> Self:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs one token a step"
            )
        return self
