"""The commands that measure: bench, compare, gate, baseline, history; no logic here either."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecompile import terminal
from edgecompile.errors import EdgecompileError, InputError

if TYPE_CHECKING:
    from edgecompile import gate as gating
    from edgecompile.bench import BenchResult
    from edgecompile.bundle import Bundle
    from edgecompile.verdict import GateResult

_STORE = Path(".edgecompile/baselines")  # as baselines.DEFAULT and history.DEFAULT, whose imports are slow
_HISTORY = Path(".edgecompile/history.jsonl")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of a table.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of the order of sessions.")
_device = click.option(
    "--device", metavar="ssh://HOST|rpc://TRACKER:PORT/KEY",
    help="Measure there: a board behind ssh needs Python and the runtime only; one of TVM's RPC tracker runs bundles "
    "of target tvm, e.g. rpc://tracker:9190/pi5.",
)  # fmt: skip
_store = click.option(
    "--store", type=click.Path(path_type=Path), default=_STORE, show_default=True, help="Folder of saved baselines."
)
_target = click.option("--target", default="ort", show_default=True, help="Backend for what is not built yet.")
_option = click.option(
    "--option", "target_options", multiple=True, metavar="KEY=VALUE", help="Option of the target, e.g. threads=1."
)


_history = click.option(
    "--history", type=click.Path(path_type=Path), help=f"Append a line to this file, e.g. {_HISTORY}."
)


@click.command(
    epilog="\b\nExamples:\n  edgecompile bench build/shvit_s1\n"
    "  edgecompile bench build/shvit_s1 --layers -o bench\n  edgecompile bench build/* --device ssh://orin\n"
    "  edgecompile bench build/repvgg_a0 --device rpc://tracker:9190/pi5"
)
@click.argument("subjects", nargs=-1, required=True, metavar="X...")
@click.option("--seconds", default=10.0, show_default=True, help="Most time to spend on each.")
@click.option("--precision", "wanted", default="1%", show_default=True, help="Interval of the median to stop at, +-.")
@click.option("--layers", is_flag=True, help="Also time each layer and hold it against the machine's roofline.")
@click.option(
    "--trtexec", type=click.Path(path_type=Path),
    help="Measure nothing: X ran elsewhere, and this folder has what trtexec exported: times.json, profile.json, "
    "layers.json.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for bench.json, bench.md and bench.html.")
@_history
@_device
@_target
@_option
@_seed
@json_option
def bench(
    subjects: tuple[str, ...], seconds: float, wanted: str, layers: bool, trtexec: Path | None, output: Path | None,
    history: Path | None, device: str | None, target: str, target_options: tuple[str, ...], seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Latency of X: percentiles with intervals, throughput, memory, cold start.

    X is a bundle, an ONNX file or a SOURCE; the latter are built first. Raw samples are kept in the bundle.
    """
    from edgecompile import bench as measuring
    from edgecompile import config, remote, render_bench

    fraction = config.fraction(wanted, "--precision")
    if trtexec is not None:
        _bench_imported(subjects, trtexec, output, as_json)
        return
    found = []
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(terminal.progress())
        board = stack.enter_context(remote.open_board(device, say=say))
        for number, subject in enumerate(subjects, 1):
            bundle = stack.enter_context(as_bundle(subject, target, target_options, seed, say, device))
            result = measuring.run(
                bundle, bundle.probe()[0], board=board, seconds=seconds, precision=fraction, seed=seed,
                progress=lambda done, name=subject: say(f"measuring {name}, {done:.0%}"),
            )  # fmt: skip
            if layers:
                say(f"profiling the layers of {subject}")
                result = measuring.with_layers(result, measuring.layers(bundle, bundle.probe()[0], board=board))
            found.append(result)
            if output is not None:
                render_bench.write(result, output, "bench" if len(subjects) == 1 else f"{number}_{Path(subject).stem}")
            if history is not None:
                engine = bundle.engine_manifest
                measuring.remember(result, bundle, board.fingerprint(engine.versions, engine.options), history)
    _print_bench(found, as_json)


def _bench_imported(subjects: tuple[str, ...], folder: Path, output: Path | None, as_json: bool) -> None:
    from edgecompile import bench as measuring
    from edgecompile import render_bench
    from edgecompile.bundle import Bundle

    if len(subjects) != 1:
        raise InputError("--trtexec takes one bundle", "its files are those of one engine")
    result = measuring.imported(Bundle.open(subjects[0]), folder)
    if output is not None:
        render_bench.write(result, output, "bench")
    _print_bench([result], as_json)


def _print_bench(found: list[BenchResult], as_json: bool) -> None:
    from edgecompile import render_bench

    if as_json:
        documents = [result.to_json() for result in found]
        terminal.print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for result in found:
            render_bench.print_table(result, terminal.console())


@click.command(
    epilog="\b\nExamples:\n  edgecompile compare build/before build/after\n"
    "  edgecompile compare net.onnx net.opt.onnx --option threads=1"
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--seconds", default=30.0, show_default=True, help="Most time to spend.")
@click.option(
    "--precision", "wanted", default="0.5%", show_default=True, help="Stop when the interval is no wider than this, +-."
)
@_device
@_target
@_option
@_seed
@json_option
def compare(
    first: str, second: str, seconds: float, wanted: str, device: str | None, target: str,
    target_options: tuple[str, ...], seed: int, as_json: bool,
) -> None:  # fmt: skip
    """How much slower or faster is B than A? Both run side by side, in pairs of fresh sessions.

    A and B are bundles, ONNX files or SOURCEs; the latter are built first.
    """
    from edgecompile import compare as comparing
    from edgecompile import config, remote

    fraction = config.fraction(wanted, "--precision")
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(terminal.progress())
        a, b = (stack.enter_context(as_bundle(x, target, target_options, seed, say, device)) for x in (first, second))
        board = stack.enter_context(remote.open_board(device, say=say))
        found = comparing.compare(a, b, board, seconds=seconds, precision=fraction, seed=seed, progress=say)
    if as_json:
        terminal.print_json(found.to_json())
    else:
        comparing.print_table(found, first, second, terminal.console())


@click.command(
    epilog="\b\nExamples:\n  edgecompile gate build/model --baseline main\n"
    "  edgecompile gate build/* --baseline 'main-{name}' --config edgecompile.toml -o gate\n"
    "  edgecompile gate --replay gate"
)
@click.argument("candidates", nargs=-1, metavar="[CANDIDATE]...")
@click.option("--baseline", help="A bundle, or a name in the store; {name} stands for the model's name.")
@click.option("--anchor", help="The last release, likewise: many small steps do not slip through.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file with a [gate] table.")
@click.option("--max-regression", metavar="5%", help="By how much latency may grow.  [default: 5%]")
@click.option("--time-limit", metavar="60s", help="Longest measuring time of a candidate.  [default: 60s]")
@click.option("--on-inconclusive", metavar="error|warn|retry:N", help="Exit 3, exit 0, or measure again.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder: result.json, junit.xml, summary.md, samples.npz."
)
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML to this file.")
@click.option("--summary", type=click.Path(path_type=Path), help="Also append Markdown to this file.")
@click.option("--annotations", is_flag=True, help="Print GitHub annotations for what did not pass.")
@click.option("--replay", type=click.Path(path_type=Path), help="Judge a recorded run again; measures nothing.")
@_history
@_device
@_store
@_seed
@json_option
@click.pass_context
def gate(ctx: click.Context, **given: Any) -> None:
    """Is CANDIDATE still the same model, as fast as the baseline, and within its budgets?

    Exit 0: pass. 1: fail. 3: inconclusive, this machine could not tell. 4: a baseline, runtime or device is missing.
    """
    from edgecompile import ci
    from edgecompile import gate as gating
    from edgecompile.verdict import ERROR, GateResult, Problem

    kept: list[gating.Recording] = []

    def failed(problem: Problem, code: int) -> GateResult:
        return kept[0].failure(problem, code) if kept else GateResult(ERROR, code, error=problem)

    result = failed(Problem("no verdict was reached"), 70)
    try:
        with gating.stoppable():
            result = _run_gate(given, kept.append)
    except EdgecompileError as error:
        result = failed(Problem(error.what, error.why, error.fix), max(error.exit_code, 2))
        raise
    except KeyboardInterrupt:
        result = failed(Problem("interrupted"), 130)
        raise
    except Exception as error:
        result = failed(Problem(f"{type(error).__name__}: {error}", "this is a defect of edgecompile"), 70)
        raise
    finally:
        _write_result(result, given)
    if given["history"] is not None and given["replay"] is None:
        gating.remember(result, given["history"])
    if given["as_json"]:
        terminal.print_json(result.to_json())
    else:
        ci.print_result(result, terminal.console())
    ctx.exit(result.exit_code)


def _run_gate(given: dict[str, Any], kept: Callable[[gating.Recording], object]) -> GateResult:
    """What the command line and the configuration ask for; the recording is given to ``kept`` and written."""
    from dataclasses import replace

    from edgecompile import baselines, bundle, config, remote
    from edgecompile import gate as gating

    if given["replay"] is not None:
        return gating.replay(given["replay"])
    if not given["candidates"]:
        raise InputError("no candidate is given", fix="edgecompile gate build/model --baseline main")
    limits = config.load_gate(given["config_file"]) if given["config_file"] else config.GateConfig()
    changes: dict[str, Any] = {}
    if given["max_regression"]:
        changes["max_regression"] = config.fraction(given["max_regression"], "--max-regression")
    if given["time_limit"]:
        changes["time_limit"] = config.seconds(given["time_limit"], "--time-limit")
    if given["on_inconclusive"]:
        answer = config.on_inconclusive(given["on_inconclusive"], "--on-inconclusive")
        changes["on_inconclusive"], changes["retries"] = answer
    limits = replace(limits, **changes)
    store = baselines.Store(given["store"])

    def other(named: str | None) -> Callable[[str], Bundle | None]:
        return lambda model: bundle.Bundle.open(store.resolve(named.replace("{name}", model))) if named else None

    found = gating.contests(
        [bundle.Bundle.open(path) for path in given["candidates"]],
        other(given["baseline"] or limits.baseline),
        other(given["anchor"] or limits.anchor),
    )
    out: Path | None = given["output"]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    def keep(recording: gating.Recording) -> None:
        kept(recording)
        if out is not None:
            recording.save(out / gating.SAMPLES)

    device = next((d.transport for d in limits.devices if d.name == given["device"]), given["device"])
    with terminal.progress() as say, remote.open_board(device or None, say=say) as board:
        return gating.run(found, limits, board, seed=given["seed"], progress=say, keep=keep)


def _write_result(result: GateResult, given: dict[str, Any]) -> None:
    """The files for CI, on every way out."""
    from edgecompile import ci

    if given["output"] is not None:
        ci.write(result, given["output"])
    if given["junit"] is not None:
        ci.write_junit(result, given["junit"])
    if given["summary"] is not None:
        ci.append_summary(result, given["summary"])
    if given["annotations"]:
        for line in ci.annotations(result):
            click.echo(line, err=given["as_json"])


@click.group(
    epilog="\b\nExamples:\n  edgecompile baseline save main build/shvit_s1\n  edgecompile baseline list\n"
    "  edgecompile gate build/shvit_s1 --baseline main"
)
def baseline() -> None:
    """Bundles to compare with, by name: a folder that a CI cache or a shared disk can hold."""


@baseline.command(epilog="\b\nExample:\n  edgecompile baseline save main build/shvit_s1 --replace")
@click.argument("name")
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Let NAME mean this bundle; the old one stays in its history.")
@click.option("--note", default="", help="Kept with it, e.g. a commit.")
@_store
def save(name: str, folder: Path, replace: bool, note: str, store: Path) -> None:
    """Copy BUNDLE into the store as NAME."""
    from edgecompile import baselines

    entry = baselines.Store(store).save(name, folder, note=note, replace=replace)
    click.echo(f"{name} is {terminal.printable(entry.current.model)}, {entry.current.digest[:12]}")


@baseline.command("list", epilog="\b\nExample:\n  edgecompile baseline list --json")
@_store
@json_option
def list_(store: Path, as_json: bool) -> None:
    """The names there are."""
    from edgecompile import baselines

    rows = [
        {
            "name": entry.name,
            "model": saved.model,
            "target": saved.target,
            "precision": saved.precision,
            "saved": saved.saved,
            "digest": saved.digest,
            "note": saved.note,
        }
        for entry in baselines.Store(store).list()
        for saved in [entry.current]
    ]
    if as_json:
        terminal.print_json({"schema": "edgecompile.baselines/1", "baselines": rows})
    elif rows:
        terminal.console().print(terminal.table("", [row | {"digest": row["digest"][:12]} for row in rows]))
    else:
        click.echo(f"no baseline is saved in {store}")


@baseline.command(epilog="\b\nExamples:\n  edgecompile baseline fetch main\n  edgecompile baseline fetch main~1")
@click.argument("name")
@_store
def fetch(name: str, store: Path) -> None:
    """Check the bundle that NAME means and print its folder; NAME~1 is the one before."""
    from edgecompile import baselines

    click.echo(str(baselines.Store(store).resolve(name)))


@click.command(epilog="\b\nExamples:\n  edgecompile history\n  edgecompile history --model shvit_s1 --html trend.html")
@click.argument("file", type=click.Path(path_type=Path), default=_HISTORY)
@click.option("--model", help="Only this model.")
@click.option("--metric", help="Only this metric, e.g. latency_p50.")
@click.option("--html", type=click.Path(path_type=Path), help="Write one page with pictures.")
@json_option
def history(file: Path, model: str | None, metric: str | None, html: Path | None, as_json: bool) -> None:
    """The trend of what bench and gate measured with --history, and where it changed. Advice, not a verdict."""
    from edgecompile import files, render_history
    from edgecompile import history as records

    entries = records.read(file, model=model)
    if html is not None:
        files.write_atomic(html, [render_history.page(entries, metric).encode()])
    if as_json:
        terminal.print_json(records.as_dict(records.trends(entries, metric)))
    else:
        render_history.print_table(entries, terminal.console(), metric)


@contextlib.contextmanager
def as_bundle(
    subject: str,
    target: str,
    target_options: tuple[str, ...],
    seed: int,
    say: Callable[[str], None],
    device: str | None = None,
) -> Iterator[Bundle]:
    """The bundle that ``subject`` is, or one built from it that lives as long as the context."""
    from edgecompile import bundle, cli, driver, remote

    if bundle.is_bundle(subject):
        yield bundle.Bundle.open(subject)
        return
    if device and device.startswith(remote.RPC):
        raise InputError(
            f"{subject} is not a bundle", f"{device} runs what was built for the CPU there",
            f"edgecompile build {subject} --target tvm --device {device}",
        )  # fmt: skip
    options = driver.Options(
        target=target, bench=False, seed=seed, target_options=dict(cli.pair(o) for o in target_options)
    )
    given = {"source": subject, "inputs": (), "dynamic": (), "seed": seed}
    with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch, cli.opened(given, say) as source:
        yield driver.build(source, Path(scratch) / "bundle", options, say)


COMMANDS = (bench, compare, gate, baseline, history)
