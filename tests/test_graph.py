"""The graph: what survives loading, rewriting and saving, and what a malformed file does."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph, Provenance, globs, matches, named, provenance, where


def conv_model(*, external: str | None = None, size: int = 600) -> onnx.ModelProto:
    """x -> Conv -> Relu -> y, with metadata of every kind."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((size, 3, 3, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    nodes[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'stem', 'stem.conv', 'conv2d']")
    nodes[0].metadata_props.add(
        key="pkg.torch.onnx.stack_trace",
        value='File "/home/me/net.py", line 7, in forward\n  x = f(x)\n'
        'File "/lib/python3/site-packages/torch/nn/conv.py", line 99, in forward\n',
    )
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size, 8, 8])],
        initializer=[weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="someone")
    helper.set_model_props(model, {"author": "A. Person", "stride": "32"})
    model.model_version = 7
    return model


def names(ports) -> list[str]:
    return [p.name for p in ports]


def test_round_trip_keeps_everything(tmp_path):
    onnx.save(conv_model(), tmp_path / "a.onnx")
    graph = Graph.load(tmp_path / "a.onnx")
    graph.save(tmp_path / "b.onnx")
    before, after = onnx.load(tmp_path / "a.onnx"), onnx.load(tmp_path / "b.onnx")
    assert after.opset_import == before.opset_import
    assert (after.ir_version, after.producer_name, after.model_version) == (9, "someone", 7)
    assert {p.key: p.value for p in after.metadata_props} == {"author": "A. Person", "stride": "32"}
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    kept = {p.key: p.value for p in after.graph.node[0].metadata_props}
    scopes, trace = (p for p in before.graph.node[0].metadata_props)
    assert kept[scopes.key] == scopes.value
    portable = trace.value.replace("/home/me/", "").replace("/lib/python3/site-packages/", "")
    assert kept[trace.key] == portable, "where its maker lives is nobody's business"
    origin = provenance(Graph.load(tmp_path / "b.onnx").nodes[0])
    assert origin.modules == ("stem.conv",) and origin.sources == ("conv",)
    assert origin.source_line == "net.py:7"


def test_saving_twice_gives_identical_bytes_under_any_hash_seed(tmp_path):
    onnx.save(conv_model(), tmp_path / "a.onnx")
    code = "import sys; from edgecompile.graph import Graph; Graph.load(sys.argv[1]).save(sys.argv[2])"
    for seed in ("0", "1", "77"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a.onnx", tmp_path / f"{seed}.onnx"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
    contents = {(tmp_path / f"{seed}.onnx").read_bytes() for seed in ("0", "1", "77")}
    assert len(contents) == 1
    assert Graph.load(tmp_path / "0.onnx").digest() == Graph.load(tmp_path / "77.onnx").digest()


def test_digest_sees_one_changed_weight(tmp_path):
    graph = Graph.from_proto(conv_model())
    other = graph.copy()
    weight = other.nodes[0].inputs[1]
    changed = weight.values.copy()
    changed[0, 0, 0, 0] += 1
    weight.values = changed
    assert graph.digest() != other.digest()
    assert graph.nodes[0].inputs[1].values[0, 0, 0, 0] != changed[0, 0, 0, 0], "a copy must not share what was replaced"


@pytest.mark.parametrize("external", [True, False])
def test_external_data_is_mapped_not_read(tmp_path, external):
    onnx.save(conv_model(), tmp_path / "a.onnx", save_as_external_data=external, location="a.bin", size_threshold=0)
    graph = Graph.load(tmp_path / "a.onnx")
    base = graph.nodes[0].inputs[1].values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) is external
    assert graph.external is external
    written = graph.save(tmp_path / "out.onnx")
    assert [p.name for p in written] == (["out.onnx.data", "out.onnx"] if external else ["out.onnx"])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    a, b = oracle.run(graph, feeds)["y"], oracle.run(Graph.load(tmp_path / "out.onnx"), feeds)["y"]
    assert np.array_equal(a, b)


def test_saving_over_the_file_it_was_loaded_from_keeps_mapped_weights(tmp_path):
    onnx.save(conv_model(), tmp_path / "a.onnx", save_as_external_data=True, location="a.onnx.data", size_threshold=0)
    expected = Graph.load(tmp_path / "a.onnx").nodes[0].inputs[1].values.copy()
    Graph.load(tmp_path / "a.onnx").save(tmp_path / "a.onnx")
    assert np.array_equal(Graph.load(tmp_path / "a.onnx").nodes[0].inputs[1].values, expected)


def _truncate(folder):
    (folder / "a.bin").write_bytes(b"short")


def _remove(folder):
    (folder / "a.bin").unlink()


def _fifo(folder):
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")


def _symlink_outside(folder):
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("/etc/hostname")


def _rename_to(location):
    def change(folder):
        model = onnx.load(folder / "a.onnx", load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        (folder / "a.onnx").write_bytes(model.SerializeToString())

    return change


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (_truncate, "too short"),
        (_remove, "does not exist"),
        (_fifo, "not a regular file"),
        (_symlink_outside, "outside"),
        (_rename_to("../a.bin"), "outside"),
        (_rename_to("/etc/hostname"), "outside"),
    ],
)
def test_bad_external_data_is_refused(tmp_path, damage, complaint):
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(conv_model(), folder / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    damage(folder)
    with pytest.raises(InputError, match=complaint):
        Graph.load(folder / "a.onnx")


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\x08\x07"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        Graph.load(tmp_path / "x.onnx")


def test_local_functions_and_foreign_domains_survive(tmp_path):
    body = helper.make_function(
        "my.domain", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="my.domain")],
        "g",
        [helper.make_tensor_value_info("x", 1, [2])],
        [helper.make_tensor_value_info("y", 1, [2])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.domain", 3)]
    onnx.save(helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=9), tmp_path / "f.onnx")
    loaded = Graph.load(tmp_path / "f.onnx")
    loaded.save(tmp_path / "g.onnx")
    after = onnx.load(tmp_path / "g.onnx")
    assert list(after.functions) == [body]
    assert {(o.domain, o.version) for o in after.opset_import} == {("", 18), ("my.domain", 3)}
    assert oracle.run(loaded, {"x": np.array([1, 2], np.float32)})["y"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("option", "named"),
    [("Conv", True), ("/n*", True), ("blocks", True), ("blocks.3", True), ("*.conv", True), ("a, blocks.*.conv,", True),
     ("", False), ("conv", False), ("3", False), ("blocks.3.con", False), ("Relu,head", False)],
)  # fmt: skip
def test_what_an_option_names(option, named):
    """A node goes by its name, its operator, its module and all modules above that."""
    node = gs.Node("Conv", "/node")
    node.provenance = Provenance(("blocks.3.conv",), ("conv",))  # type: ignore[attr-defined]
    assert matches(node, globs(option)) == named


def test_subgraphs_keep_provenance_and_weights(tmp_path):
    def branch(name: str, value: float) -> onnx.GraphProto:
        node = helper.make_node("Mul", ["x", f"k_{name}"], [f"out_{name}"], name=f"mul_{name}")
        node.metadata_props.add(key="edgecompile.modules", value=f'["branch.{name}"]')
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"out_{name}", 1, [2])],
            initializer=[numpy_helper.from_array(np.array([value, value], np.float32), f"k_{name}")],
        )  # fmt: skip

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("a", 2), else_branch=branch("b", 5))
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [2])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    loaded = Graph.from_proto(model).copy()
    loaded.save(tmp_path / "s.onnx")
    again = Graph.load(tmp_path / "s.onnx")
    assert [provenance(n).modules for n in again.walk()] == [(), ("branch.b",), ("branch.a",)], "else before then"
    for flag, factor in ((True, 2), (False, 5)):
        assert oracle.run(again, {"c": np.array(flag), "x": np.ones(2, np.float32)})["y"].tolist() == [factor] * 2
    again.tidy()
    assert [n.op for n in again.walk()] == ["If", "Mul", "Mul"], "x is read only inside the branches and must stay"


def test_unkept_attributes_are_refused_rather_than_dropped():
    node = helper.make_node(
        "Optional", [], ["y"], type=helper.make_optional_type_proto(helper.make_tensor_type_proto(1, [1]))
    )
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 1, [1])])
    with pytest.raises(InputError, match="cannot be kept"):
        Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_torchscript_scope_names_become_module_paths():
    model = conv_model()
    del model.graph.node[0].metadata_props[:]
    for name, path in {
        "/layer1/layer1.0/conv1/Conv": "layer1.0.conv1",
        "/features/features.0/features.0.0/Conv": "features.0.0",
        "/conv/Conv": "conv",
        "Conv_17": "",
    }.items():
        model.graph.node[0].name = name
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        assert provenance(Graph.from_proto(copied).nodes[0]).module == path


def test_inserted_nodes_inherit_the_union_of_what_they_replace():
    graph = Graph.from_proto(conv_model())
    conv, relu = graph.nodes
    relu.provenance = Provenance(("act",), ("relu",))
    fused = graph.insert("FusedConv", [*conv.inputs], [], domain="com.microsoft", replaces=[conv, relu])
    assert provenance(fused).modules == ("stem.conv", "act") and provenance(fused).sources == ("conv", "relu")
    assert where(fused) == "stem.conv, act (FusedConv)"


def test_rewire_keeps_the_name_of_an_output():
    graph = Graph.from_proto(conv_model())
    conv, relu = graph.nodes
    graph.rewire(relu.outputs[0], conv.outputs[0])
    graph.tidy()
    graph.check(Graph.from_proto(conv_model()).signature())
    assert [n.op for n in graph.nodes] == ["Conv"] and graph.nodes[0].outputs[0].name == "y"


def test_rewire_an_output_to_an_input_leaves_an_identity():
    graph = Graph.from_proto(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", 1, [2])],
                [helper.make_tensor_value_info("y", 1, [2])],
            ),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=9,
        )
    )
    signature = graph.signature()
    graph.rewire(graph.outputs[0], graph.inputs[0])
    graph.tidy()
    graph.check(signature)
    assert [n.op for n in graph.nodes] == ["Identity"]


def _lose_output(graph):
    graph.outputs = []


def _rename_input(graph):
    graph.inputs[0].name = "z"


def _dangle(graph):
    graph.nodes[1].inputs[0] = gs.Variable("nowhere", np.float32, None)


def _twice(graph):
    graph.nodes.append(gs.Node("Relu", "again", inputs=[graph.inputs[0]], outputs=[gs.Variable("c", np.float32, None)]))


def _bad_attribute(graph):
    graph.nodes[0].attrs["no_such_attribute"] = 1


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (_lose_output, "outputs were"),
        (_rename_input, "inputs were"),
        (_dangle, "no node produces"),
        (_twice, "produced twice"),
        (_bad_attribute, "checker"),
    ],
)
def test_check_names_what_is_wrong(damage, complaint):
    graph = Graph.from_proto(conv_model())
    signature = graph.signature()
    graph.check(signature)
    damage(graph)
    with pytest.raises(InputError) as caught:
        graph.check(signature)
    assert complaint in str(caught.value)


def test_tidy_sorts_and_refuses_cycles():
    graph = Graph.from_proto(conv_model())
    graph.nodes.reverse()
    graph.tidy()
    assert [n.op for n in graph.nodes] == ["Conv", "Relu"]
    graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]
    with pytest.raises(InputError, match="cycle"):
        graph.tidy()


def test_constant_sees_through_identity_and_constant_nodes():
    graph = Graph.from_proto(conv_model())
    node = gs.Node("Constant", "k", {"value_floats": [1.0, 2.0]}, outputs=[gs.Variable("k")])
    alias = gs.Node("Identity", "i", inputs=[node.outputs[0]], outputs=[gs.Variable("alias")])
    graph.nodes += [node, alias]
    value = graph.constant(alias.outputs[0])
    assert value is not None and value.tolist() == [1, 2]
    assert graph.constant(graph.inputs[0]) is None and graph.constant(graph.nodes[0].outputs[0]) is None


def test_sole_consumer_counts_outputs_and_repeated_reads():
    graph = Graph.from_proto(conv_model())
    conv, relu = graph.nodes
    assert graph.sole_consumer(conv.outputs[0]) is relu
    assert graph.sole_consumer(relu.outputs[0]) is None, "a model output has the caller as reader"
    relu.op, relu.inputs = "Add", [conv.outputs[0], conv.outputs[0]]
    assert graph.sole_consumer(conv.outputs[0]) is None


def test_models_of_ir_3_list_their_initializers_as_inputs(tmp_path):
    model = conv_model()
    model.ir_version, model.opset_import[0].version = 3, 8
    del model.graph.node[0].metadata_props[:]
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [600, 3, 3, 3]))
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "old.onnx")
    graph = Graph.load(tmp_path / "old.onnx")
    graph.check()
    assert names(graph.signature().inputs) == ["x"]
    graph.save(tmp_path / "new.onnx")
    again = onnx.load(tmp_path / "new.onnx")
    onnx.checker.check_model(again)
    assert again.ir_version == 3 and names(again.graph.input) == ["x", "w"]
    feeds = {"x": np.ones((1, 3, 8, 8), np.float32)}
    assert np.array_equal(oracle.run(graph, feeds)["y"], oracle.run(Graph.load(tmp_path / "new.onnx"), feeds)["y"])


def test_string_and_packed_weights_survive(tmp_path):
    values = {
        "words": np.array(["a", "bc", "déf"], object),
        "nibbles": np.array([1, -2, 3, 7, -8], ml_dtypes.int4),
        "brain": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    }
    nodes = [helper.make_node("Identity", [n], [f"{n}_out"]) for n in values]
    protos = [numpy_helper.from_array(v, n) for n, v in values.items()]
    outputs = [helper.make_tensor_value_info(f"{p.name}_out", p.data_type, list(p.dims)) for p in protos]
    graph = helper.make_graph(nodes, "g", [], outputs, initializer=protos)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "s.onnx")
    for external in (False, True):
        loaded = Graph.load(tmp_path / "s.onnx")
        loaded.check()
        loaded.save(tmp_path / "t.onnx", external=external)
        found = Graph.load(tmp_path / "t.onnx").constants()
        assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in values.items()}


def test_nodes_without_metadata_belong_with_what_they_work_on_but_only_once(tmp_path):
    onnx.save(conv_model(), tmp_path / "a.onnx")
    graph = Graph.load(tmp_path / "a.onnx")
    assert provenance(graph.nodes[1]).modules == ("stem.conv",), "the Relu has no metadata of its own"
    graph.nodes[1].provenance = Provenance((), ("relu",))
    graph.save(tmp_path / "b.onnx")
    assert provenance(Graph.load(tmp_path / "b.onnx").nodes[1]).modules == (), (
        "what we have written is not guessed anew"
    )


def test_named_numbers_doubles_and_remembers_what_nodes_were_called():
    text = "g (float[1] x) => (float[1] y) { a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c) }"
    graph = Graph.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'))
    names = ("a", "a_1", "a", "")
    for node, name in zip(graph.nodes, names, strict=True):
        node.name = name
    copy = named(graph)
    assert [n.name for n in copy.nodes] == ["a", "a_1", "a_2", "y"]
    assert [provenance(n).sources for n in copy.nodes] == [("a",), ("a_1",), ("a",), ("y",)]
    assert [n.name for n in graph.nodes] == list(names)
