"""The command line: one function per command, no logic; errors become one message and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecompile import __version__, cli_measure, terminal
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError

if TYPE_CHECKING:
    from edgecompile.frontend import Source

_TROUBLE, _INTERRUPTED = 70, 130


class _Group(click.Group):
    """Turns every exception into one message on stderr and the exit code of the design."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
            sys.exit(code if isinstance(code, int) else 0)
        except EdgecompileError as error:
            _complain(error.what, error.why, error.fix)
            sys.exit(error.exit_code)
        except click.exceptions.Abort:
            _complain("interrupted")
            sys.exit(_INTERRUPTED)
        except click.ClickException as error:
            hint = (
                f"`{error.ctx.command_path} --help` shows how"
                if isinstance(error, click.UsageError) and error.ctx
                else ""
            )
            _complain(error.format_message(), fix=hint)
            sys.exit(2)
        except KeyboardInterrupt:
            _complain("interrupted")
            sys.exit(_INTERRUPTED)
        except BrokenPipeError:  # the reader of our output has gone, as in `edgecompile models | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:  # a defect of ours: keep the evidence, spare the reader
            handle, path = tempfile.mkstemp(prefix="edgecompile-crash-", suffix=".txt")
            with os.fdopen(handle, "w") as file:
                file.write(f"edgecompile {__version__}\n{sys.argv}\n{traceback.format_exc()}")
            _complain(
                f"edgecompile failed: {type(error).__name__}: {error}", "this is a defect of edgecompile",
                f"please report it with {path}",
            )  # fmt: skip
            sys.exit(_TROUBLE)


def _complain(what: str, why: str = "", fix: str = "") -> None:
    lines = [f"error: {what}"] + [f"  {k}: {v}" for k, v in (("why", why), ("fix", fix)) if v]
    for line in lines:
        click.echo(terminal.printable(line), err=True)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  edgecompile build shvit_s1 --target ort\n  edgecompile build model.py -o build/model",
)
@click.version_option(__version__, prog_name="edgecompile")
def main() -> None:
    """PyTorch in, the fastest engine that is still the same model out."""


_inputs = click.option(
    "--input", "inputs", multiple=True, metavar="NAME:1x3x224x224[:float32]", help="Shape and type of an input."
)
_dynamic = click.option(
    "--dynamic",
    multiple=True,
    metavar="NAME:0=1:4:16",
    help="Dynamic axis of an input, with least:usual:largest extent.",
)
_checkpoint = click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights for a zoo model; random ones without it."
)
_seed = click.option("--seed", default=0, show_default=True, help="Seed of random weights and inputs.")
_passes_option = click.option("--passes", metavar="SPEC", help="Passes and options, e.g. clean,fold_norm.")


@main.command(
    epilog="\b\nExamples:\n  edgecompile build shvit_s1 --target ort\n"
    "  edgecompile build model.py:small --target ort -o build/small --dynamic x:0=1:4:16\n"
    "  edgecompile build net.onnx --target ort --option threads=1 --option ort_format=true\n"
    "  edgecompile build net.onnx --precision int8 --calib images/ --config edgecompile.toml\n"
    "  edgecompile build net.onnx --prune 0.7x --calib images/\n"
    "  edgecompile build net.onnx --target tvm --tune 10m\n"
    "  edgecompile build net.onnx --target tvm --device rpc://tracker:9190/pi5"
)
@click.argument("source")
@click.option("--target", default="ort", show_default=True, help="Backend: see `edgecompile doctor`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle folder  [default: build/NAME]")
@click.option("--precision", default="fp32", show_default=True, help="Precision of the engine.")
@_passes_option
@_inputs
@_dynamic
@_checkpoint
@click.option(
    "--option", "target_options", multiple=True, metavar="KEY=VALUE",
    help="Option of the target, e.g. threads=1; `--option help` lists them.",
)  # fmt: skip
@click.option(
    "--device", default="", metavar="rpc://TRACKER:PORT/KEY",
    help="Build for a board of TVM's RPC tracker, compare and measure there, e.g. rpc://tracker:9190/pi5; "
    "with --target tvm.",
)  # fmt: skip
@click.option("--calib", metavar="PATH", help="Calibration data: folder of images, .npz, .npy, or random:16.")
@click.option("--calib-memory", metavar="512MiB", help="Memory that calibration may take for activations.")
@click.option(
    "--min-snr", type=float, metavar="DB", help="Least signal-to-noise ratio below fp32; layers are reverted."
)
@click.option(
    "--max-drop", metavar="0.5%", help="Most that the score of evaluate(run) may fall below fp32; layers are reverted. "
    "With %, that share of the fp32 score; without, in the unit of the score.",
)  # fmt: skip
@click.option(
    "--prune", metavar="0.7x", help="Prune channels to this share of the measured latency; repaired with --calib."
)
@click.option("--prune-params", metavar="0.5", help="Prune channels to this share of the parameters instead.")
@click.option(
    "--tune", metavar="10m", help="Look for faster kernels for so long; what is found is kept for the next time. "
    "0s only takes what is known.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Keep int8 or fp16 even if it is not faster than fp32.")
@click.option("--strict", is_flag=True, help="Stop when a pass fails, instead of going on without it.")
@click.option("--no-bench", is_flag=True, help="Do not measure latency.")
@click.option("--prepare", is_flag=True, help="Do everything but the target's own build, to be finished on the board.")
@_seed
@click.option("--config", type=click.Path(path_type=Path), help="TOML file; its [build] table gives these options.")
@cli_measure.json_option
@click.pass_context
def build(ctx: click.Context, config: Path | None, **given: Any) -> None:
    """Compile SOURCE to a verified engine with a latency report.

    SOURCE is model.py, model.py:factory, a zoo name (see `edgecompile models`), file.onnx, file.pt2, or a bundle to be
    built again for this machine.
    """
    from edgecompile import bundle, driver, registry, report
    from edgecompile import config as files

    given = _with_config(ctx, config, given)
    if "help" in given["target_options"]:
        options = registry.target(given["target"]).options
        rows = [{"option": n, "default": str(value), "what": what} for n, (value, what) in options.items()]
        if given["as_json"]:
            terminal.print_json({"schema": "edgecompile.options/1", "target": given["target"], "options": rows})
        else:
            terminal.console().print(terminal.table("", rows))
        return
    recorded: dict[str, Any] = {}
    before = ""
    if bundle.is_bundle(given["source"]):  # finish it, or build it again, as it was
        manifest = bundle.Bundle.open(given["source"]).manifest
        before = str(manifest.get("passes", ""))
        for name in ("target", "precision"):
            where = ctx.get_parameter_source(name)
            if where is not None and where.name == "DEFAULT":
                given[name] = manifest[name]
        if given["target"] == manifest["target"]:
            recorded = manifest["engine"]["options"]
        given["output"], given["passes"] = given["output"] or Path(given["source"]), given["passes"] or ""
    if given["dynamic"] and "dynamic" in registry.target(given["target"]).options:
        recorded = {**recorded, "dynamic": ",".join(given["dynamic"])}
    if given["tune"] is not None:
        files.time_box(given["tune"], "--tune")
        if "tune" not in registry.target(given["target"]).options:
            able = [name for name in registry.target_names() if "tune" in registry.target(name).options]
            raise InputError(
                f"target {given['target']} cannot tune", "its runtime chooses the kernels itself",
                f"leave out --tune, or use --target {' or '.join(able)}",
            )  # fmt: skip
        recorded = {**recorded, "tune": given["tune"]}
    options = driver.Options(
        target=given["target"],
        precision=given["precision"],
        passes=given["passes"],
        strict=given["strict"],
        bench=not given["no_bench"],
        seed=given["seed"],
        target_options={**recorded, **dict(pair(o) for o in given["target_options"])},
        prepare=given["prepare"],
        before=before,
        calib=given["calib"],
        preprocess=files.load_preprocess(config) if config else None,
        calib_memory=files.size(given["calib_memory"], "--calib-memory") if given["calib_memory"] else None,
        min_snr=given["min_snr"],
        max_drop=None if given["max_drop"] is None else files.drop(given["max_drop"], "--max-drop"),
        force=given["force"],
        prune=None if given["prune"] is None else files.share(given["prune"], "--prune"),
        prune_params=None if given["prune_params"] is None else files.share(given["prune_params"], "--prune-params"),
        device=given["device"],
    )
    if options.prune is not None and options.prune_params is not None:
        raise InputError("--prune and --prune-params cannot both be the goal", fix="give one of them")
    if options.prune is not None and options.prepare:
        raise InputError("--prune times the model on the target", "--prepare leaves that to the board",
                         "prune on the board, or give --prune-params")  # fmt: skip
    if options.device and (options.prepare or options.prune is not None):
        raise InputError("--device does not go with --prepare or --prune", fix="leave one of them out")
    output = given["output"] or driver.default_output(Path(given["source"]).name)
    driver.check(given["source"], output, options)  # what cannot be built fails before the export
    with terminal.progress() as say, opened(given, say) as source:
        made = driver.build(source, output, options, say)
    if made.prepared:
        if not given["prepare"]:
            raise EnvironmentMissing(made.manifest["missing"])
        if given["as_json"]:
            terminal.print_json(made.manifest)
        else:
            terminal.console().print(made.manifest["missing"], highlight=False, soft_wrap=True, markup=False)
        return
    document = json.loads((made.path / "report.json").read_text())
    if given["as_json"]:
        terminal.print_json(document)
        return
    report.Report.from_json(document).print_table(terminal.console())
    terminal.console().print(
        f"\n[bold]{made.path}[/]  engine, model.onnx, report.html, report.md, report.json", highlight=False
    )


@main.command(epilog="\b\nExample:\n  edgecompile opt net.onnx -o net.opt.onnx --passes clean,fold_norm")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="ONNX file to write.")
@_passes_option
@_inputs
@click.option("--strict", is_flag=True, help="Stop when a pass fails, instead of going on without it.")
@click.option("--no-verify", is_flag=True, help="Check the structure only, not the numbers.")
@click.option("--limit", type=int, help="Number of the last rewrite to apply.")
@_seed
@cli_measure.json_option
def opt(
    model: Path, output: Path, passes: str | None, inputs: tuple[str, ...], strict: bool, no_verify: bool,
    limit: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Run passes on an ONNX file: ONNX in, ONNX out. Without --passes, every exact pass runs."""
    from edgecompile.graph import Graph
    from edgecompile.pipeline import Pipeline

    if output.is_dir():
        raise InputError(f"cannot write {output}", "it is a folder", "give the name of an .onnx file")
    pipeline = Pipeline.parse(passes or _exact_passes())
    graph = Graph.load(model)
    with terminal.progress() as say:
        trace = pipeline.run(
            graph, _given_feeds(graph, inputs, seed), strict=strict, limit=limit, verify=not no_verify, progress=say
        )
        say(f"writing {output}")
        graph.save(output)
    steps = [_step_row(s) for s in trace.steps]
    if as_json:
        terminal.print_json({"schema": "edgecompile.opt/1", "output": str(output), "steps": steps})
        return
    console = terminal.console()
    console.print(terminal.table(f"{model} -> {output}", steps))
    for step in trace.steps:
        for note in step.notes:
            console.print(f"  {step.spec}: {note}", markup=False, highlight=False)
        if step.failure:
            console.print(f"[red]rolled back[/] {step.spec}: {step.failure}", highlight=False)


@main.command(
    epilog="\b\nExamples:\n  edgecompile verify net.onnx net.opt.onnx\n  edgecompile verify model.py build/model"
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--tolerance", default=1e-4, show_default=True, help="Largest error, relative to the output's largest value."
)
@click.option("--layers", default=5, show_default=True, help="Show this many layers, worst first.")
@_inputs
@_seed
@cli_measure.json_option
def verify(
    first: str, second: str, tolerance: float, layers: int, inputs: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Are A and B the same function? Each is a bundle, an ONNX file, model.py or a zoo name. Exit 1 if not."""
    from edgecompile import verify as checker

    with terminal.progress() as say:
        a, feeds = _graph(first, inputs, seed, say)
        b, _ = _graph(second, inputs, seed, say)
        say("comparing")
        verdict = checker.verify(a, b, feeds, tolerance)
    outputs = {n: e.as_dict() for n, e in verdict.outputs.items()}
    worst = [{"tensor": r.tensor, "op": r.op, "module": r.module, **r.error.as_dict()} for r in verdict.layers[:layers]]
    if as_json:
        terminal.print_json(
            {
                "schema": "edgecompile.verify/1",
                "same": verdict.same,
                "tolerance": tolerance,
                "outputs": outputs,
                "layers": worst,
            }
        )
    else:
        console = terminal.console()
        console.print("[green]same function[/]" if verdict.same else "[red]not the same function[/]")
        console.print(terminal.table("outputs", [{"output": n, **e} for n, e in outputs.items()]))
        if worst:
            console.print(terminal.table("layers that both compute, worst first", worst))
    sys.exit(0 if verdict.same else 1)


@main.command(epilog="\b\nExample:\n  edgecompile bisect net.onnx --passes clean,fold_norm")
@click.argument("model", type=click.Path(path_type=Path))
@_passes_option
@_inputs
@_seed
@cli_measure.json_option
def bisect(model: Path, passes: str | None, inputs: tuple[str, ...], seed: int, as_json: bool) -> None:
    """Find the first single rewrite that changes what MODEL computes. Exit 1 if there is one."""
    from edgecompile import pipeline
    from edgecompile.graph import Graph

    graph = Graph.load(model)
    with terminal.progress() as say:
        spec = pipeline.Pipeline.parse(passes or _exact_passes())
        culprit = pipeline.bisect(graph, spec, _given_feeds(graph, inputs, seed), say)
    if as_json:
        found = culprit and {**vars(culprit.rewrite), "why": culprit.why, "total": culprit.total}
        terminal.print_json({"schema": "edgecompile.bisect/1", "culprit": found})
    elif culprit is None:
        click.echo("every rewrite keeps the function")
    else:
        click.echo(terminal.printable(f"{culprit.rewrite} (of {culprit.total}): {culprit.why}"))
        click.echo(f"run up to it with: edgecompile opt {model} -o good.onnx --limit {culprit.rewrite.number - 1}")
    sys.exit(0 if culprit is None else 1)


@main.command(epilog="\b\nExamples:\n  edgecompile inspect net.onnx\n  edgecompile inspect shvit_s1 --depth 3")
@click.argument("source", metavar="X")
@click.option("--depth", default=2, show_default=True, help="Levels of the module tree.")
@_inputs
@_dynamic
@_seed
@cli_measure.json_option
def inspect(
    source: str, depth: int, inputs: tuple[str, ...], dynamic: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Ops, parameters, MACs, bytes and module tree of a bundle, an ONNX file or a SOURCE."""
    from edgecompile import stats

    with terminal.progress() as say:
        graph, feeds = _graph(source, inputs, seed, say, dynamic)
    shape_feeds = feeds[0] if feeds else None
    total, ops = stats.count(graph, shape_feeds), stats.ops(graph)
    modules = stats.by_module(graph, depth, shape_feeds)
    signature = graph.signature()
    ports = [
        {
            "name": p.name,
            "kind": kind,
            "type": stats.type_name(p.dtype),
            "shape": "x".join(str(d or "?") for d in p.shape or ()),
        }
        for kind, found in (("input", signature.inputs), ("output", signature.outputs))
        for p in found
    ]
    if as_json:
        terminal.print_json(
            {
                "schema": "edgecompile.inspect/1",
                **total.as_dict(),
                "opsets": graph.opsets,
                "ir_version": graph.ir_version,
                "ports": ports,
                "ops": ops,
                "modules": [vars(m) for m in modules],
            }
        )
        return
    console = terminal.console()
    console.print(
        f"[bold]{terminal.escape(source)}[/]  {total.nodes} nodes, {total.parameters:,} parameters, "
        f"{terminal.si(total.macs)}MACs, {total.bytes / 2**20:.1f} MiB, opset {graph.opsets.get('', '?')}",
        highlight=False,
    )
    console.print(terminal.table("", ports))
    console.print(terminal.table("ops", [{"op": op, "nodes": n} for op, n in ops.items()]))
    console.print(terminal.table("modules", [vars(m) | {"macs": terminal.si(m.macs)} for m in modules]))


@main.command(epilog="\b\nExample:\n  edgecompile passes")
@cli_measure.json_option
def passes(as_json: bool) -> None:
    """The passes there are, with their options."""
    import dataclasses

    from edgecompile import registry

    rows = []
    for name in registry.pass_names():
        cls = registry.pass_class(name)
        options = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        rows.append({"name": name, "exact": cls.exact, "options": options, "what": _summary(cls)})
    if as_json:
        terminal.print_json({"schema": "edgecompile.passes/1", "passes": rows})
        return
    for row in rows:
        row["options"] = ", ".join(f"{k}={v}" for k, v in row["options"].items()) or "-"
        row["exact"] = "yes" if row["exact"] else "no"
    terminal.console().print(terminal.table("", rows))


@main.command(epilog="\b\nExample:\n  edgecompile models")
@cli_measure.json_option
def models(as_json: bool) -> None:
    """The models of the zoo."""
    from edgecompile.models import ZOO

    rows = [
        {"name": n, "task": e.task, "input": "x".join(map(str, e.input_shape)), "published": e.paper}
        for n, e in ZOO.items()
    ]
    if as_json:
        terminal.print_json({"schema": "edgecompile.models/1", "models": rows})
    else:
        terminal.console().print(terminal.table("", rows))


@main.command(epilog="\b\nExample:\n  edgecompile doctor")
@cli_measure.json_option
def doctor(as_json: bool) -> None:
    """What is installed, what it can do here, what is missing and how to get it."""
    from edgecompile import doctor as checks

    if as_json:
        terminal.print_json(checks.as_dict())
    else:
        checks.render(terminal.console())


# -- helpers ---------------------------------------------------------------------------------------------------------


def _exact_passes() -> str:
    from edgecompile import registry

    return ",".join(n for n in registry.pass_names() if registry.pass_class(n).exact)


@contextlib.contextmanager
def opened(given: dict[str, Any], say: Callable[[str], None]) -> Iterator[Source]:
    """Load a SOURCE with its scratch folder, which must outlive it: weights may be mapped from there."""
    from edgecompile import bundle, frontend

    with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
        if bundle.is_bundle(given["source"]):
            made = bundle.Bundle.open(given["source"])
            feeds, reference = made.probe()
            given["passes"] = given.get("passes") or ""
            name = str(made.manifest.get("name", Path(given["source"]).name))
            yield frontend.Source(name, "bundle", made.graph(), (feeds,), (reference,), (), {}, ())
            return
        yield frontend.load(
            given["source"],
            inputs=dict(frontend.parse_input(i) for i in given["inputs"]),
            dynamic=frontend.parse_dynamics(given["dynamic"]),
            checkpoint=given.get("checkpoint"),
            seed=given["seed"],
            folder=Path(scratch),
            progress=say,
        )


def _graph(source: str, inputs: tuple[str, ...], seed: int, say: Callable[[str], None], dynamic: tuple[str, ...] = ()):
    """Graph and feeds (or None) of a bundle, an ONNX file or a SOURCE."""
    from edgecompile import bundle
    from edgecompile.graph import Graph

    if bundle.is_bundle(source):
        made = bundle.Bundle.open(source)
        return made.graph(), [made.probe()[0]]
    if source.endswith(".onnx"):
        graph = Graph.load(source)
        return graph, _given_feeds(graph, inputs, seed)
    stack = click.get_current_context().with_resource  # the scratch folder lives as long as the command
    given = {"source": source, "inputs": inputs, "dynamic": dynamic, "seed": seed}
    loaded = stack(opened(given, say))
    return loaded.graph, list(loaded.feeds)


def _given_feeds(graph, inputs: tuple[str, ...], seed: int):
    """Random feeds of the shapes given with --input, or None."""
    if not inputs:
        return None
    from edgecompile import frontend, oracle

    feeds = frontend.feeds_for(graph, dict(frontend.parse_input(i) for i in inputs), seed)
    for feed in feeds:
        oracle.check_feeds(graph, feed)
    return feeds


def _with_config(ctx: click.Context, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Options of the [build] table where the command line is silent; unknown keys are errors."""
    if config is None:
        return given
    from edgecompile import config as files

    names = {
        p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p.name not in ("config", "as_json")
    }
    keys = {name: max(p.opts, key=len).lstrip("-") for name, p in names.items() if name}
    underscored = {key.replace("-", "_"): key for key in keys.values()}  # as the keys of other tables are written
    table = files.load(config, "build", tuple(dict.fromkeys([*keys.values(), *underscored])))
    table = {underscored.get(key, key): value for key, value in table.items()}
    for name, key in keys.items():
        source = ctx.get_parameter_source(name)
        if key in table and source is not None and source.name == "DEFAULT":
            given[name] = names[name].type_cast_value(ctx, table[key])
    return given


def pair(text: str) -> tuple[str, str]:
    """``KEY=VALUE`` as two texts."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--option {text} cannot be read", fix="write it like --option threads=1")
    return key, value


def _step_row(step) -> dict[str, Any]:
    error = max((e.max_rel for e in step.errors.values()), default=0.0) if step.errors else None
    return {
        "pass": step.spec,
        "rewrites": len(step.rewrites),
        "nodes": f"{step.before.nodes} -> {step.after.nodes}",
        "parameters": step.after.parameters,
        "MACs": terminal.si(step.after.macs),
        "error": "not compared" if error is None else f"{error:.1e}",
        "result": "rolled back" if step.failure else "kept" if step.rewrites else "nothing to do",
    }


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


for _command in cli_measure.COMMANDS:
    main.add_command(_command)
