"""What merging branches is worth at run time: ours against the plain export, onnxslim, onnxsim and the author's fusion.

Every model is exported once in its training form and once fused by hand in torch as its authors do it. onnxslim,
onnxsim and the default pipeline start from the first export. All five files go to ONNX Runtime's CPU provider under the
same settings, with every optimisation of its own on, on one thread, and are interleaved in one run with fresh sessions
for every pair. A sixth arm, ours opened a second time, shows what the run calls noise. Weights and BatchNorm statistics
are random.

A ratio is the median call of ours over that of another arm, as thread CPU time; its interval is that of the sign test
over the pairs of sessions, at the confidence that the file states, for each cell by itself. Beyond noise means that the
interval leaves out 1 by more than 1 %.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import measure, models

if TYPE_CHECKING:
    from torch import nn

    from edgecompile.graph import Graph

ARMS = ("plain", "onnxslim", "onnxsim", "author", "ours")
CONTROL = "ours again"
NOISE = 0.01
PAIRS = 6  # the fewest whose sign test has 95 % confidence; the rounds of one pair tell nothing about the next
TOLERANCE = 1e-4
DEFAULT = (
    *("shvit_s1", "shvit_s4", "efficientvit_m0", "efficientvit_m5", "litepose_xs", "litepose_s", "damoyolo_t"),
    *("damoyolo_s", "damoyolo_m", "damoyolo_ns", "deanet", "repavit_tiny", "repavit_small", "repavit_base"),
    "repaswin_tiny",
)

# Parameters of the form that the authors deploy. DAMO-YOLO's merges RepConv and leaves other norms to the exporter; its
# nano models have no RepConv.
FUSED_PARAMETERS = {
    "shvit_s1": 6_308_660,
    "shvit_s2": 11_453_508,
    "shvit_s3": 14_210_010,
    "shvit_s4": 16_546_248,
    "efficientvit_m0": 2_334_916,
    "efficientvit_m1": 2_964_256,
    "efficientvit_m2": 4_168_338,
    "efficientvit_m3": 6_875_890,
    "efficientvit_m4": 8_776_340,
    "efficientvit_m5": 12_436_260,
    "litepose_xs": 1_654_944,
    "litepose_s": 2_705_904,
    "litepose_m": 3_503_040,
    "litepose_l": 5_697_736,
    "damoyolo_t": 8_479_631,
    "damoyolo_s": 16_251_631,
    "damoyolo_m": 28_178_175,
    "damoyolo_l": 42_058_111,
    "damoyolo_ns": 1_405_691,
    "damoyolo_nm": 2_707_219,
    "damoyolo_nl": 5_688_579,
    "deanet": 3_653_377,
    "repavit_tiny": 3_494_248,
    "repavit_small": 13_180_648,
    "repavit_base": 51_132_904,
    "repaswin_tiny": 17_483_554,
}

# Run by the interpreter of --tools with the paths of the source and of the result. They may crash: hence a child.
_SIMPLIFY = {
    "onnxslim": "import onnxslim; onnxslim.slim(source, result)",
    "onnxsim": "import onnx, onnxsim; model, same = onnxsim.simplify(onnx.load(source)); "
    "assert same, 'its own check of the result failed'; onnx.save(model, result)",
}
_NOT_INSTALLED = 64
_SIMPLIFY_SECONDS = 600

# Nodes of a synthetic graph or a zoo model, and the seconds of CPU time that the pass may take.
TOWERS = {"5000": 60.0, "10000": 60.0, "20000": 60.0}
LARGEST = {"damoyolo_l": 20.0}
REPEATS = 5


# -- the authors' fusions ----------------------------------------------------------------------------------------------


def fuse(name: str, model: nn.Module) -> nn.Module:
    """The form that the authors of a zoo model deploy, made from its training form, which is changed."""
    rules = {
        "shvit": functools.partial(_fuse_three_stage, residual=True),
        "efficientvit": functools.partial(_fuse_three_stage, residual=False),  # theirs keeps the shortcuts
        "damoyolo": _fuse_rep_conv,
        "deanet": _fuse_deconv,
        "repavit": _fuse_ffn,
    }
    family = models.ZOO[name].module
    if family == "litepose":
        return _fuse_litepose(model)
    return _replace(model, rules[family]).eval()


def _replace(module: nn.Module, rule: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module, in which every part for which ``rule`` returns another is replaced by it."""
    made = rule(module)
    if made is not None:
        return made
    for name, child in list(module.named_children()):
        setattr(module, name, _replace(child, rule))
    return module


def _scale_and_shift(bn: Any) -> tuple[Any, Any]:
    """BatchNorm in eval mode as ``scale * x + shift``."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale


def _affine(layer: Any, weight: Any, bias: Any) -> Any:
    """A copy of a convolution or linear layer with these values."""
    from torch import nn

    made = copy.copy(layer)
    made._parameters = {"weight": nn.Parameter(weight.detach()), "bias": nn.Parameter(bias.detach())}
    return made


def _conv_bn(conv: Any, bn: Any) -> Any:
    """Convolution, transposed or not, then BatchNorm."""
    scale, shift = _scale_and_shift(bn)
    shape = [1] * conv.weight.ndim
    shape[int(conv.transposed)] = -1
    return _affine(conv, conv.weight * scale.view(shape), shift if conv.bias is None else conv.bias * scale + shift)


def _fuse_three_stage(module: Any, residual: bool) -> nn.Module | None:
    """Conv2d_BN.fuse, BN_Linear.fuse and, for SHViT, Residual.fuse."""
    from edgecompile.models.layers import BNLinear, ConvBN, Residual

    if isinstance(module, ConvBN):
        return _conv_bn(module.c, module.bn)
    if isinstance(module, BNLinear):
        scale, shift = _scale_and_shift(module.bn)
        return _affine(module.l, module.l.weight * scale, module.l.weight @ shift + module.l.bias)
    if residual and isinstance(module, Residual) and isinstance(module.m, ConvBN) and module.m.c.groups > 1:
        conv = _conv_bn(module.m.c, module.m.bn)
        conv.weight.data[:, :, 1, 1] += 1
        return conv
    return None


def _fuse_rep_conv(module: Any) -> nn.Module | None:
    """RepConv.switch_to_deploy: the 1x1 kernel is added to the centre tap of the 3x3 kernel."""
    from torch import nn

    from edgecompile.models.damoyolo import RepConv

    if not isinstance(module, RepConv):
        return None
    dense, point = (_conv_bn(*branch) for branch in (module.rbr_dense, module.rbr_1x1))
    weight = nn.functional.pad(point.weight, [1] * 4) + dense.weight
    return nn.Sequential(_affine(dense, weight, dense.bias + point.bias), module.act)


def _fuse_deconv(module: Any) -> nn.Module | None:
    """The five kernels of a DEConv as one."""
    from edgecompile.models.deanet import DEConv

    if not isinstance(module, DEConv):
        return None
    made = _affine(module.conv1_5, *module.merged())
    made.padding, made._reversed_padding_repeated_twice = (1, 1), [1] * 4
    return made


def _fuse_ffn(module: Any) -> nn.Module | None:
    """RePaViT, section 3: idle channels, both norms and the shortcut become one matrix."""
    import torch
    from torch import nn

    from edgecompile.models.repavit import ChannelIdleFfn

    if not isinstance(module, ChannelIdleFfn):
        return None

    class Deployed(nn.Module):
        def __init__(self, matrix: nn.Module, up: nn.Module, down: nn.Module):
            super().__init__()
            self.matrix, self.up, self.down = matrix, up, down

        def forward(self, x: Any) -> Any:
            return self.matrix(x) + self.down(nn.functional.gelu(self.up(x)))

    def linear(weight: Any, bias: Any) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        made.weight.data.copy_(weight)
        if bias is not None:
            made.bias.data.copy_(bias)
        return made

    (scale1, shift1), (scale2, shift2) = _scale_and_shift(module.norm1), _scale_and_shift(module.norm2)
    w1, b1 = module.fc1.weight * scale1, module.fc1.weight @ shift1 + module.fc1.bias
    w2, b2 = module.fc2.weight * scale2, module.fc2.weight @ shift2 + module.fc2.bias
    a = module.active
    matrix = linear(torch.eye(len(w2)) + w2[:, a:] @ w1[a:], w2[:, a:] @ b1[a:] + b2)
    return Deployed(matrix, linear(w1[:a], b1[:a]), linear(w2[:, :a], None)) if a else matrix


def _fuse_litepose(model: Any) -> nn.Module:
    """Every norm into the convolution before it; that of a deconvolution level into both."""
    from torch import nn

    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            if isinstance(sequence[i + 1], nn.BatchNorm2d):
                sequence[i] = _conv_bn(sequence[i], sequence[i + 1])
                sequence[i + 1] = nn.Identity()
    for i, after in enumerate(model.deconv_bnrelu):
        model.deconv_refined[i] = _conv_bn(model.deconv_refined[i], after[0])
        model.deconv_raw[i] = _conv_bn(model.deconv_raw[i], after[0])
        model.deconv_raw[i].bias.data.zero_()
        after[0] = nn.Identity()
    return model.eval()


# -- the files that are compared ---------------------------------------------------------------------------------------


def prepare(name: str, folder: Path, seed: int, tools: str) -> dict[str, Any]:
    """Write ``ARM.onnx`` for every arm and ``input.npy``; what each arm is.

    Raises:
        RuntimeError: the author's fused form is another function, or of another size than published.
    """
    import torch

    from edgecompile import frontend, registry, stats
    from edgecompile.graph import Graph
    from edgecompile.models.randomize import randomize
    from edgecompile.pipeline import Pipeline

    x = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model = randomize(models.create(name), seed, x).eval()
        author = fuse(name, copy.deepcopy(model))
        error = max(_difference(a, b) for a, b in zip(_flat(model(x)), _flat(author(x)), strict=True))
    parameters = sum(p.numel() for p in author.parameters())
    if error > TOLERANCE:
        raise RuntimeError(f"{name}: the author's form differs from the training form by {error:.1e}")
    if parameters != FUSED_PARAMETERS[name]:
        raise RuntimeError(f"{name}: the author's form has {parameters} parameters, not {FUSED_PARAMETERS[name]}")

    arms: dict[str, dict[str, Any]] = {}
    sources = {}
    for arm, module in (("plain", model), ("author", author)):
        sources[arm] = frontend.from_module(module, x, folder=folder / arm, seed=seed)
        sources[arm].graph.save(folder / f"{arm}.onnx", external=False)
        arms[arm] = {"status": "ok", "exporter": next(a.rung for a in sources[arm].attempts if a.ok)}
    ours = sources["plain"].graph.copy()
    spec = registry.target("ort").pipelines["fp32"]
    trace = Pipeline.parse(spec).run(ours, sources["plain"].feeds, strict=True)
    ours.save(folder / "ours.onnx", external=False)
    arms["ours"] = {"status": "ok", "passes": spec, "pass_seconds": {s.spec: s.seconds for s in trace.steps}}
    for tool in _SIMPLIFY:
        arms[tool] = simplify(tool, folder / "plain.onnx", folder / f"{tool}.onnx", tools)
    np.save(folder / "input.npy", x.numpy())
    for arm in ARMS:
        if arms[arm]["status"] == "ok":
            graph = Graph.load(folder / f"{arm}.onnx")
            arms[arm] |= stats.count(graph, {graph.inputs[0].name: x.numpy()}).as_dict()
    return {
        "model": name,
        "input": list(x.shape),
        "author_fused": {"parameters": parameters, "published": FUSED_PARAMETERS[name], "max_rel": error},
        "arms": {arm: arms[arm] for arm in ARMS},
    }


def _flat(outputs: Any) -> list[np.ndarray]:
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _difference(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(reference - other).max() / np.abs(reference).max())


def simplify(tool: str, source: Path, result: Path, python: str) -> dict[str, Any]:
    """Run onnxslim or onnxsim on a file; ``status`` is ``"ok"``, ``"not installed"`` or ``"failed: why"``."""
    code = (
        "import sys, importlib.util, importlib.metadata\n"
        "source, result = sys.argv[1:]\n"
        f"if importlib.util.find_spec({tool!r}) is None: sys.exit({_NOT_INSTALLED})\n"
        f"{_SIMPLIFY[tool]}\n"
        f"print(); print(importlib.metadata.version({tool!r}))\n"
    )
    start = time.perf_counter()
    try:
        command = [python, "-c", code, str(source), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SIMPLIFY_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"status": f"failed: {error.strerror if isinstance(error, OSError) else 'timeout'}"}
    if done.returncode == _NOT_INSTALLED:
        return {"status": "not installed"}
    if done.returncode or not result.is_file():
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return {"status": f"failed: {ended}, {said[0][:200]}"}
    return {"status": "ok", "version": done.stdout.split()[-1], "seconds": time.perf_counter() - start}


# -- measuring ---------------------------------------------------------------------------------------------------------


def run_model(name: str, seconds: float, pairs: int, seed: int, tools: str, keep: str | None) -> dict[str, Any]:
    """Prepare the files of one model, unless ``keep`` has them, and time them if there are ``seconds`` to spend."""
    with contextlib.ExitStack() as stack:
        folder = Path(keep) / f"{name}-{seed}" if keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        facts = folder / "facts.json"
        if not facts.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(prepare(name, folder, seed, tools)))
        row = json.loads(facts.read_text())
        if seconds > 0:
            time_arms(row, folder, seconds, pairs, seed)
    return row


def time_arms(row: dict[str, Any], folder: Path, seconds: float, pairs: int, seed: int) -> None:
    """Add to ``row`` the times of every arm and their ratios; an arm that computes something else has failed."""
    x = np.load(folder / "input.npy")
    reference = [np.asarray(y) for y in run_once(open_session(folder / "plain.onnx"), x)]
    for arm, facts in row["arms"].items():
        if facts["status"] == "ok":
            try:
                outputs = run_once(open_session(folder / f"{arm}.onnx"), x)
                facts["max_rel"] = max(_difference(a, b) for a, b in zip(reference, outputs, strict=True))
            except Exception as error:  # ONNX Runtime raises a dozen types of its own
                facts["status"] = f"failed: {' '.join(str(error).split())[:200]}"
                continue
            if not facts["max_rel"] <= TOLERANCE:
                facts["status"] = f"failed: differs from the plain export by {facts['max_rel']:.1e}"
    files = {arm: folder / f"{arm}.onnx" for arm, facts in row["arms"].items() if facts["status"] == "ok"}
    files[CONTROL] = files["ours"]
    order = random.Random(seed)

    @contextlib.contextmanager
    def open_arms():
        # In random order: what is opened first lies elsewhere in memory, which alone can be worth a percent.
        opened = {arm: open_session(files[arm]) for arm in order.sample(list(files), len(files))}
        calls = {arm: functools.partial(run_once, opened.pop(arm), x) for arm in files}
        yield calls
        calls.clear()  # whoever still holds it would keep the sessions alive while the next are opened

    samples = measure.interleave_sessions(
        open_arms, "thread_cpu", sessions=pairs, seconds=seconds, min_calls=pairs, seed=seed
    )
    row["p50_ms"] = {arm: s.p50 * 1e3 for arm, s in samples.items()}
    row["calls"] = {arm: len(s.seconds) for arm, s in samples.items()}
    row["load"] = samples["ours"].load
    row["ratios"] = {}
    for arm in samples:
        if arm != "ours":
            ratio = measure.ratio(samples["ours"], samples[arm])
            row["ratios"][arm] = ratio.as_dict() | {"verdict": verdict(ratio) if pairs >= PAIRS else "too few pairs"}


def open_session(path: Path) -> Any:
    """The settings that all arms have."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_once(session: Any, x: np.ndarray) -> Sequence[np.ndarray]:
    return session.run(None, {session.get_inputs()[0].name: x})


def verdict(ratio: measure.Ratio) -> str:
    """What the interval of ours over another arm says.

    ``slower`` or ``faster``: it leaves out 1 by more than 1 %. ``even``: it lies within 1 % of 1. ``unclear``: neither.
    """
    if ratio.low > 1 + NOISE:
        return "slower"
    if ratio.high < 1 - NOISE:
        return "faster"
    return "even" if ratio.low >= 1 - NOISE and ratio.high <= 1 + NOISE else "unclear"


# -- size --------------------------------------------------------------------------------------------------------------


def tower(nodes: int) -> Graph:
    """RepVGG blocks with a shortcut, five nodes each, that become two."""
    from onnx import TensorProto, helper, numpy_helper

    from edgecompile.graph import Graph

    rng = np.random.default_rng(0)
    made, weights, x = [], [], "x"
    for i in range(nodes // 5):
        for branch, k in (("dense", 3), ("point", 1)):
            values = rng.normal(0, 0.1, (4, 4, k, k)).astype(np.float32)
            weights.append(numpy_helper.from_array(values, f"{branch}{i}.weight"))
        made += [
            helper.make_node("Conv", [x, f"dense{i}.weight"], [f"dense{i}"], pads=[1] * 4),
            helper.make_node("Conv", [x, f"point{i}.weight"], [f"point{i}"]),
            helper.make_node("Add", [f"dense{i}", f"point{i}"], [f"sum{i}"]),
            helper.make_node("Add", [f"sum{i}", x], [f"block{i}"]),
            helper.make_node("Relu", [f"block{i}"], [f"relu{i}"]),
        ]
        x = f"relu{i}"
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in ("x", x)]
    graph = helper.make_graph(made, "tower", ports[:1], ports[1:], weights)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def run_scale(limits: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Time and peak memory of the pass alone, on towers of so many nodes and on zoo models after the other passes.

    The graphs take turns, and the CPU time is that of the best turn: others on the machine only ever add to it.
    """
    from edgecompile.passes.reparam import Reparam
    from edgecompile.pipeline import Context

    graphs = {what: tower(int(what)) if what.isdigit() else _before_reparam(what, seed) for what in limits}
    turns: dict[str, list[dict[str, float]]] = {what: [] for what in limits}
    rows = []
    for _ in range(REPEATS):
        for what, graph in graphs.items():
            work, context = graph.copy(), Context()
            context.begin("reparam")
            gc.collect()
            resident = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
            wall, cpu = time.perf_counter(), time.process_time()
            result = Reparam().run(work, context)
            work.tidy()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            turn = {"seconds": wall, "cpu_seconds": cpu, "rss_before_mb": resident, "peak_mb": _status("VmHWM")}
            turns[what].append(turn)
            if len(turns[what]) == REPEATS:
                best = min(turn["cpu_seconds"] for turn in turns[what])
                rows.append(
                    {
                        "graph": f"tower of {what} nodes" if what.isdigit() else what,
                        "nodes": [len(graph.nodes), len(work.nodes)],
                        "rewrites": len(result.rewrites),
                        "limit_seconds": limits[what],
                        "cpu_seconds": best,
                        "us_per_node": best / len(graph.nodes) * 1e6,
                        "peak_mb": max(turn["peak_mb"] for turn in turns[what]),
                        "turns": turns[what],
                    }
                )
    return {"rows": rows}


def _before_reparam(name: str, seed: int) -> Graph:
    """A zoo model after the passes that come before this one."""
    import torch

    from edgecompile import frontend
    from edgecompile.models.randomize import randomize
    from edgecompile.pipeline import Pipeline

    x = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        source = frontend.from_module(randomize(models.create(name), seed, x), x, folder=Path(folder), seed=seed)
        Pipeline.parse("clean,fold_norm").run(source.graph, source.feeds, strict=True)
    return source.graph


def _status(key: str) -> float:
    """A size in /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:"))


def growth(rows: Sequence[Mapping[str, Any]]) -> float:
    """Exponent p of CPU time ~ nodes^p over the towers, by least squares; 1 is linear."""
    points = [(r["nodes"][0], r["cpu_seconds"]) for r in rows if r["graph"].startswith("tower")]
    nodes, seconds = np.log(np.array(points)).T
    return float(np.polyfit(nodes, seconds, 1)[0])


# -- the report --------------------------------------------------------------------------------------------------------


def print_latency(rows: Sequence[Mapping[str, Any]]) -> None:
    """The tables of latency ratios and of sizes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, colours = Console(width=160), {"slower": "red", "faster": "green"}
    others = [*(arm for arm in ARMS if arm != "ours"), CONTROL]
    times = Table("model", "ours, ms", *others, title="median call of ours over the other's; below 1 ours is faster")
    sizes = Table("model", *ARMS, title="parameters, multiply-accumulates, nodes")
    for row in rows:
        cells = []
        for arm in others:
            ratio = row.get("ratios", {}).get(arm)
            if ratio is None:
                cells.append(Text(_status_of(row, arm)))
            else:
                text = "{value:.3f} [{low:.3f}, {high:.3f}] {verdict}".format(**ratio)
                cells.append(Text(text, colours.get(ratio["verdict"], "")))
        times.add_row(row["model"], f"{row['p50_ms']['ours']:.2f}" if "p50_ms" in row else "", *cells)
        sizes.add_row(row["model"], *(Text(_size_of(row, arm)) for arm in ARMS))
    console.print(times)
    console.print(sizes)


def _status_of(row: Mapping[str, Any], arm: str) -> str:
    return row.get("error") or row["arms"].get(arm, {"status": ""})["status"]


def _size_of(row: Mapping[str, Any], arm: str) -> str:
    facts = row.get("arms", {}).get(arm, {})
    if "parameters" not in facts:
        return _status_of(row, arm)
    macs = "?" if facts["macs"] is None else f"{facts['macs'] / 1e9:.4f} G"
    return f"{facts['parameters'] / 1e6:.3f} M, {macs}, {facts['nodes']}"


def print_scale(rows: Sequence[Mapping[str, Any]], exponent: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"pass reparam alone, best of {REPEATS}; CPU time of the towers grows as nodes^{exponent:.2f}")
    for column in ("graph", "nodes", "rewrites", "CPU time", "limit", "per node", "peak RSS (before)"):
        table.add_column(column)
    for r in rows:
        table.add_row(
            r["graph"],
            f"{r['nodes'][0]} -> {r['nodes'][1]}",
            str(r["rewrites"]),
            f"{r['cpu_seconds']:.2f} s",
            f"{r['limit_seconds']:.0f} s",
            f"{r['us_per_node']:.0f} us",
            f"{r['peak_mb']:.0f} MB ({min(run['rss_before_mb'] for run in r['turns']):.0f} MB)",
        )
    Console(width=140).print(table)


def child(function: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a process of its own, on one thread; ``{"error": why}`` if it fails."""
    command = [sys.executable, __file__, "--child", json.dumps([function, *arguments])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return {"error": f"failed: status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path | None, section: str, content: Mapping[str, Any]) -> None:
    """Replace one section of the file of results, and keep the other."""
    from common import machine

    if path is not None:
        document = json.loads(path.read_text()) if path.is_file() else {}
        document[section] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **content}
        path.write_text(json.dumps(document, indent=1) + "\n")


_EPILOG = """onnxslim and onnxsim are optional; what is not there is marked so. To have them in an
environment of their own:
  python -m venv tools && tools/bin/pip install onnx onnxruntime onnxslim onnxsim

examples:
  python benchmarks/reparam.py --models shvit_s1 repavit_tiny --tools tools/bin/python
  python benchmarks/reparam.py --models all --out benchmarks/results/reparam.json
  python benchmarks/reparam.py --scale --out benchmarks/results/reparam.json

The exit status is 1 if ours is slower than another arm beyond noise, a limit is exceeded or a model failed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(DEFAULT), metavar="NAME", help="zoo names, or all")
    parser.add_argument("--seconds", type=float, default=6.0, help="per arm, over all pairs; 0 times nothing (6)")
    parser.add_argument("--pairs", type=int, default=9, help=f"of fresh sessions; a verdict needs {PAIRS} (9)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and the order of sessions (0)")
    parser.add_argument("--tools", default=sys.executable, metavar="PYTHON", help="that has onnxslim and onnxsim")
    parser.add_argument("--keep", metavar="DIR", help="keep the files of each model there; those there are used again")
    parser.add_argument("--scale", action="store_true", help="time and memory of the pass on large graphs instead")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        function, *arguments = options.child
        print(json.dumps({"run_model": run_model, "run_scale": run_scale}[function](*arguments)))
        return 0
    if options.scale:
        made = [child("run_scale", limits, options.seed) for limits in (TOWERS, LARGEST)]
        if any("error" in m for m in made):
            return 1
        rows = [row for m in made for row in m["rows"]]
        write(options.out, "scale", {"seed": options.seed, "growth_exponent": growth(rows), "rows": rows})
        print_scale(rows, growth(rows))
        return int(any(r["cpu_seconds"] > r["limit_seconds"] for r in rows))
    names = list(FUSED_PARAMETERS) if options.models == ["all"] else options.models
    unknown = [n for n in names if n not in models.ZOO]
    if unknown:
        parser.error(f"no model {', '.join(unknown)} in the zoo")
    settings = {"seconds": options.seconds, "pairs": options.pairs, "seed": options.seed, "noise": NOISE}
    settings |= {"clock": "thread_cpu", "threads": 1, "level": "all"}
    chosen = (options.seconds, options.pairs, options.seed, options.tools, options.keep)
    rows = []
    for name in names:
        rows.append({"model": name, **child("run_model", name, *chosen)})
        seen = {arm: f"{r['value']:.3f} {r['verdict']}" for arm, r in rows[-1].get("ratios", {}).items()}
        print(name, rows[-1].get("error") or seen, flush=True)
        write(options.out, "latency", {"settings": settings, "rows": rows})
    print_latency(rows)
    cells = [(r["model"], arm, c["verdict"]) for r in rows for arm, c in r.get("ratios", {}).items() if arm != CONTROL]
    slower = [f"{model} than {arm}" for model, arm, found in cells if found == "slower"]
    print("slower beyond noise:", ", ".join(slower) or "nowhere")
    return int(bool(slower) or any("error" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
