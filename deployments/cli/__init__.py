"""The command ``inference-pio``.

Every command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .bench import bench_app
from .engine_settings import EngineSettings, engine_settings

app = typer.Typer(
    help="Serve Qwen3 on one machine or a Ray cluster, talk to it, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")

MODEL_HELP = "[bold]embedded[/], a checkpoint folder, or a hub name such as Qwen/Qwen3-0.6B."


class DType(StrEnum):
    """Weights and KV cache; ``auto`` takes the checkpoint's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Format(StrEnum):
    """What linears can be rounded to."""

    INT8 = "int8"
    W8A8 = "w8a8"
    INT4 = "int4"
    W4A8 = "w4a8"
    NF4 = "nf4"


class Shape(StrEnum):
    """Real shapes that a random checkpoint can have."""

    QWEN3_0_6B = "qwen3-0.6b"
    QWEN3_4B = "qwen3-4b"


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"[dim]$[/] {line}" for line in lines)


Thinking = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Thinking on or off. [default: as the model does]"),
]
Budget = Annotated[
    int | None, typer.Option(min=0, help="Thought tokens before the thought is ended.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Precision = Annotated[DType, typer.Option(help="Weights and KV cache.")]
Url = Annotated[
    str | None, typer.Option(help="Ask this running server instead of loading a model.")
]


@app.command(
    "serve",
    epilog=_examples(
        "inference-pio serve embedded",
        "inference-pio serve Qwen/Qwen3-0.6B --dtype bfloat16 --port 8080",
        "inference-pio serve ./checkpoint --served-model-name mine --config service.yaml",
    ),
)
def serve_command(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default="embedded")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A Serve application file.", show_default="cluster_configs/local.yaml"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, show_default="8000")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Weights and KV cache.", show_default="auto")
    ] = None,
    quantization: Annotated[
        Format | None,
        typer.Option(help="Round the linears while loading.", show_default="none"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API.", show_default="MODEL")
    ] = None,
    settings: EngineSettings = None,
) -> None:
    """Start the server; it answers at /health with 200 once it is ready.

    Ctrl-C or SIGTERM ends it and every process that belongs to it.
    """
    from ..application_file import Wishes
    from .serve import run_server

    engine = engine_settings(
        settings,
        dtype=None if dtype is None else dtype.value,
        quantization=None if quantization is None else quantization.value,
    )
    run_server(config, Wishes(model, host, port, served_model_name, engine))


@app.command(
    "chat",
    epilog=_examples(
        "inference-pio chat",
        "inference-pio chat ./checkpoint --budget 200",
        "inference-pio chat --url http://127.0.0.1:8000",
    ),
)
def chat_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "embedded",
    url: Url = None,
    budget: Budget = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    dtype: Precision = DType.AUTO,
    settings: EngineSettings = None,
) -> None:
    """Talk to a model in the terminal; its thought is shown apart from its answer.

    /think and /no_think at the end of a message switch its thinking on and off.
    """
    from .chat import run_chat
    from .open_talker import open_talker
    from .talk import Manner

    engine = engine_settings(settings, dtype=dtype.value)
    with open_talker(url, model, engine) as talker:
        run_chat(talker, Manner(budget=budget, max_tokens=max_tokens, seed=seed))


@app.command(
    "generate",
    epilog=_examples(
        'inference-pio generate "What is 12 + 34 - 5?"',
        'inference-pio generate "Sort 30, 4, 12." --no-think --json',
        'inference-pio generate "Once upon a time" --raw --model ./checkpoint --max-tokens 50',
        'inference-pio generate "Hello" --model Qwen/Qwen3-4B-Instruct-2507 '
        "--engine weight_memory_bytes=3GiB",
    ),
)
def generate_command(
    prompt: Annotated[str, typer.Argument(help="The question, or - for standard input.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "embedded",
    raw: Annotated[bool, typer.Option(help="Continue the text; no chat template.")] = False,
    think: Thinking = None,
    budget: Budget = None,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Seed = None,
    dtype: Precision = DType.AUTO,
    settings: EngineSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer one prompt without a server. Standard output carries the answer only."""
    from ...workers.types import SamplingParams
    from .generate import run_generate

    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, thinking_budget=budget
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    engine = engine_settings(settings, dtype=dtype.value)
    run_generate(text, model, engine, params, thinking=think, raw=raw, as_json=as_json)


@app.command(
    "make-checkpoint",
    epilog=_examples("inference-pio make-checkpoint qwen3-0.6b ./random --tokenizer ./tokenizer"),
)
def make_checkpoint_command(
    shape: Annotated[Shape, typer.Argument(help="Which model's shapes.", metavar="SHAPE")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json and its config.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a checkpoint with a real model's shapes and random weights, for tests and speed."""
    from .checkpoint import run_make_checkpoint

    run_make_checkpoint(shape.value, out, tokenizer, seed)


@app.command(
    "quantize",
    epilog=_examples(
        "inference-pio quantize ./Qwen3-0.6B ./Qwen3-0.6B-int8 --format int8",
        "inference-pio quantize Qwen/Qwen3-4B-Instruct-2507 ./4b-int4 --format int4",
    ),
)
def quantize_command(
    source: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", metavar="DST")],
    format: Annotated[Format, typer.Option("--format", help="What the linears are rounded to.")],
) -> None:
    """Write a copy of a checkpoint with quantized linears; it loads as any checkpoint does."""
    from .checkpoint import run_quantize

    run_quantize(source, out, format.value)


@app.command(
    "check",
    epilog=_examples(
        "inference-pio check cluster_configs/disaggregated.yaml",
        "inference-pio check cluster_configs/ray-up-aws.yaml --svg cluster.svg",
    ),
)
def check_command(
    file: Annotated[
        Path, typer.Argument(help="A Serve application, ray up or KubeRay file.", metavar="FILE")
    ],
    svg: Annotated[Path | None, typer.Option(help="Draw the topology there.")] = None,
) -> None:
    """Say what a deployment file asks for, what each node must hold, and what cannot work.

    Exit status 1 where something cannot.
    """
    from .check import run_check

    if status := run_check(file, svg):
        raise typer.Exit(status)


@app.command("demo", epilog=_examples("inference-pio demo", "inference-pio demo --exit"))
def demo_command(
    exit_after: Annotated[
        bool, typer.Option("--exit", help="End the server after the answers.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="[default: any free one]")] = None,
) -> None:
    """Start the embedded model, ask it with and without thinking, and leave the server up."""
    from .demo import run_demo

    run_demo(port=port, exit_after=exit_after)


def main() -> None:
    """Entry point: an error is one line on standard error and status 1."""
    try:
        app(prog_name="inference-pio")
    except Exception as error:
        from .console import report_failure

        sys.exit(report_failure(error))
