"""``inference-pio bench``: measurements in one form, as a table, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .engine_settings import EngineSettings, engine_settings

bench_app = typer.Typer(
    help="Measure speed, memory, serving, handoff and accuracy, each in rounds with their spread.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


Json = Annotated[Path | None, typer.Option("--json", help="Write the report here.")]
Picture = Annotated[Path | None, typer.Option(help="Draw the rows here (.png or .svg).")]
Model = Annotated[str, typer.Argument(help="embedded, a checkpoint folder, or a hub name.")]
QuantizationOption = Annotated[str, typer.Option(help="none, int8, w8a8, int4, w4a8 or nf4.")]
DTypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Formats = Annotated[
    list[str] | None,
    typer.Option(help="none, int8, w8a8, int4, w4a8 or nf4; may be repeated. [default: all]"),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds after a warm-up.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: every core]")]


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench speed ./random-0.6b "
    "--json speed.json --picture speed.png"
)
def speed(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    settings: EngineSettings = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Decode at batch 1, 8 and 32 and prefill of 512 and 2048 tokens, without a server.

    Beside each round the machine's read and multiply rates are sampled: the floor.
    """
    from .bench_runs import run_speed

    run_speed(model, engine_settings(settings, dtype=dtype), rounds, threads, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench compare ./random-0.6b "
    "--precision bfloat16 --precision int4 --json compare.json --picture compare.png"
)
def compare(
    model: Model = "embedded",
    against: Annotated[
        list[str] | None, typer.Option(help="Only this peer; may be repeated. [default: all]")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, int8 or int4; may be repeated. [default: bfloat16]"),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Only this case, as 'decode b8'; may be repeated. [default: all]"),
    ] = None,
    rounds: Rounds = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each. [default: every core]")
    ] = None,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """This engine against transformers, llama.cpp, OpenVINO GenAI and vLLM, in turns.

    The first run installs each peer into an environment of its own in your cache folder (some are
    compiled) and converts the checkpoint for it.
    """
    from .bench_compare import run_compare

    run_compare(
        model,
        against or [],
        precision or ["bfloat16"],
        case or [],
        rounds,
        threads,
        json_file,
        picture,
    )


@bench_app.command(
    epilog="Examples:\n\n[dim]$[/] inference-pio bench serve embedded --streams 16 --offline\n\n"
    "[dim]$[/] inference-pio bench serve --url http://127.0.0.1:8000 --rate 4"
)
def serve(
    model: Model = "embedded",
    url: Annotated[
        str | None, typer.Option(help="A running server, instead of one of its own.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Its application file.")] = None,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: requests under way at any time.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Open loop: Poisson arrivals a second.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in a round.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 128,
    rounds: Rounds = 3,
    offline: Annotated[
        bool, typer.Option("--offline", help="Run the engine alone in turn (with --streams).")
    ] = False,
    dtype: DTypeOption = "auto",
    settings: EngineSettings = None,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Time to first token, time to first answer token, inter-token latency and throughput.

    Give --rate or --streams; the default is 16 streams.
    """
    from .bench_runs import ServeWishes, run_serve

    engine = engine_settings(settings, dtype=dtype)
    wishes = ServeWishes(
        model, url, config, engine, streams, rate, requests, max_tokens, rounds, offline
    )
    run_serve(wishes, json_file, picture)


@bench_app.command(
    epilog="Examples:\n\n[dim]$[/] inference-pio bench accuracy --count 200 --json accuracy.json"
    "\n\n[dim]$[/] inference-pio bench accuracy Qwen/Qwen3-0.6B --task gsm8k --limit 200 "
    "--results gsm8k.jsonl"
    "\n\n[dim]$[/] inference-pio bench accuracy --url http://127.0.0.1:8000 --mode non-thinking"
)
def accuracy(
    model: Model = "embedded",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="gsm8k, ifeval, humaneval or bfcl; may be repeated. [default: all; for the "
            "embedded model the problems it was made for]"
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running OpenAI-compatible server, instead of an own one.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="thinking or non-thinking; may be repeated. [default: all it has]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task or category. [default: all]")
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Of each kind of the embedded model's problems.")
    ] = 100,
    streams: Annotated[int, typer.Option(min=1, help="Requests under way at any time.")] = 16,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer with its thought. [default: no limit]")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 3600,
    results: Annotated[
        Path | None, typer.Option(help="Keep every answer here (JSON lines), and go on from it.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. [default: as the model does]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of items and of sampling.")] = 0,
    dtype: DTypeOption = "auto",
    quantization: QuantizationOption = "none",
    settings: EngineSettings = None,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Published task sets through the HTTP API; or the embedded model on unseen problems.

    The sets are read from the folder that INFERENCE_PIO_DATA names.
    """
    from .bench_accuracy import run_embedded_accuracy, run_task_sets, task_set_wishes

    engine = engine_settings(settings, dtype=dtype, quantization=quantization)
    if model == "embedded" and url is None and not task:
        run_embedded_accuracy(count, temperature, seed, engine, json_file, picture)
        return
    wishes = task_set_wishes(
        task or [], mode or [], limit, seed, temperature, max_tokens, streams, timeout, results
    )
    run_task_sets(model, url, engine, wishes, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench memory ./random-0.6b "
    "--json memory.json --picture memory.png"
)
def memory(
    model: Model = "embedded",
    format: Formats = None,
    kv_mib: Annotated[int, typer.Option(min=1, help="Size of the KV pool.")] = 256,
    dtype: DTypeOption = "auto",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes of each format.")] = 1,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """What an engine takes of memory, in a fresh process for each format: weights, KV and rest.

    Measured after each stage of loading and with the KV pool filled to its last block.
    """
    from .bench_formats import run_memory

    run_memory(model, format or [], kv_mib, dtype, threads, rounds, json_file, picture)


@bench_app.command(
    epilog="Examples:\n\n[dim]$[/] inference-pio bench quantization --count 60 "
    "--json quantization.json --picture quantization.png"
    "\n\n[dim]$[/] inference-pio bench quantization Qwen/Qwen3-0.6B --task gsm8k --limit 200 "
    "--results answers"
)
def quantization(
    model: Model = "embedded",
    format: Formats = None,
    count: Annotated[
        int, typer.Option(min=1, help="Of each kind of the embedded model's problems.")
    ] = 60,
    task: Annotated[
        list[str] | None,
        typer.Option(help="gsm8k, ifeval, humaneval or bfcl, asked through the API; repeatable."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="thinking or non-thinking. [default: all it has]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task or category. [default: all]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer with its thought. [default: no limit]")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder that keeps every answer, a file a format.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the problems and of sampling.")] = 0,
    dtype: DTypeOption = "auto",
    threads: Threads = None,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Size, accuracy, error of the next token and speed of every weight format, in one run.

    Accuracy is greedy on the embedded model's problems, or that of --task; for another model
    without --task it is left out.
    """
    from .bench_formats import QuantizationWishes, run_quantization

    wishes = QuantizationWishes(
        model,
        format or [],
        count,
        task or [],
        mode or [],
        limit,
        max_tokens,
        results,
        seed,
        dtype,
        threads,
        rounds,
    )
    run_quantization(wishes, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench handoff ./random-0.6b "
    "--json handoff.json --picture handoff.png"
)
def handoff(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    settings: EngineSettings = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens.")
    ] = "64,128,256,512,1024,2048",
    chunk: Annotated[int, typer.Option(min=64, help="Tokens of a prefill step.")] = 256,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each of the two engines.")
    ] = 1,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Handing KV from a prefill engine to a decode engine through Ray's object store.

    Rates of export, transfer and import beside the memory copy; time to first token of remote and
    local prefill by prompt length, with the decode engine idle and busy.
    """
    from .bench_handoff import run_handoff

    engine = engine_settings(settings, dtype=dtype)
    run_handoff(model, engine, _tokens(lengths), chunk, threads, rounds, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench paging ./random-0.6b "
    "--json paging.json --picture paging.png"
)
def paging(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2048,8192",
    threads: Threads = None,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """KV paging: time to first token of new prompts, and of prompts that the pool has lost.

    Without tiers, with host memory, and with a disk behind a little of it.
    """
    from .bench_paging import run_paging

    run_paging(model, dtype, _tokens(lengths), threads, rounds, json_file, picture)


def _tokens(lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(
            "numbers with commas between them", param_hint="--lengths"
        ) from None


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench parallel ./random-4b --tensor 2 "
    "--json parallel.json"
)
def parallel(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that share every layer.")] = 2,
    pipeline: Annotated[int, typer.Option(min=1, help="Stages of layers.")] = 1,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """What telling the ranks of a replica each step costs, and its share of the step."""
    from .bench_parallel import run_parallel

    run_parallel(model, dtype, tensor, pipeline, rounds, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench gpu Qwen/Qwen3-0.6B "
    "--json gpu.json --picture gpu.png"
)
def gpu(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    against: Annotated[
        bool, typer.Option("--against/--alone", help="Beside transformers, compiled.")
    ] = True,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """This machine's CUDA device: parity of every kernel, then decode, prefill and a workload.

    Decode at batch 1 to 256, prefill of 512 to 8192 tokens, each beside the device's read and
    multiply rates, and 256 requests of 100 to 1024 tokens in and out.
    """
    from .bench_gpu import run_gpu

    run_gpu(model, dtype, against, rounds, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench sampling --threads 2 --json sampling.json"
)
def sampling(
    threads: Threads = None,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """What sampling costs a step, over random logits of Qwen3's vocabulary; no model is loaded."""
    from .bench_sampling import run_sampling

    run_sampling(threads, rounds, json_file, picture)


@bench_app.command(
    epilog="Examples:\n\n[dim]$[/] inference-pio bench kernels ./random-0.6b --json kernels.json"
    "\n\n[dim]$[/] inference-pio bench kernels ./random-0.6b --operation layer --format none "
    "--format int4"
)
def kernels(
    model: Model = "embedded",
    dtype: DTypeOption = "auto",
    operation: Annotated[
        list[str] | None,
        typer.Option(
            help="layer (its four linears in turn), qkv, out, gate_up, down, output, decode and "
            "prefill (attention), norm or rotation; may be repeated. [default: all]"
        ),
    ] = None,
    format: Formats = None,
    threads: Threads = None,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """The operations of a forward pass one by one, beside the machine's read and multiply rates.

    MODEL gives the shapes; its weights are not read. INFERENCE_PIO_KERNELS chooses the kernels.
    """
    from .bench_kernels import run_kernels

    run_kernels(model, dtype, operation or [], format or [], threads, rounds, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench offload ./random-0.6b --keep 0.5 --keep 0 "
    "--json offload.json"
)
def offload(
    model: Model = "embedded",
    keep: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Share of the layers in memory; may be repeated. [default: 0.5, 0]"
        ),
    ] = None,
    dtype: DTypeOption = "auto",
    quantization: QuantizationOption = "none",
    settings: EngineSettings = None,
    threads: Threads = None,
    rounds: Rounds = 3,
    json_file: Json = None,
    picture: Picture = None,
) -> None:
    """Decode and prefill with layers streamed from the disk, beside the disk's own read rate.

    Each engine in a process of its own, in a cgroup that holds little more than its limit where
    the system lets us make one; and its peak memory.
    """
    from .bench_offload import run_offload

    engine = engine_settings(settings, dtype=dtype, quantization=quantization)
    run_offload(model, engine, keep or [], threads, rounds, json_file, picture)


@bench_app.command(
    epilog="Example:\n\n[dim]$[/] inference-pio bench table speed.json serve.json > RESULTS.md"
)
def table(reports: Annotated[list[Path], typer.Argument(help="Files that --json wrote.")]) -> None:
    """Print reports as Markdown tables with their commands."""
    from ...benchmarks.report import Report, markdown_table

    for path in reports:
        report = Report.read(path)
        print(markdown_table(report.rows, report.notes))
