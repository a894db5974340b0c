"""An engine with its graph: outputs in the model's order, layers by ONNX node and torch module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgecompile.device import Device
from edgecompile.graph import Graph
from edgecompile.target import Engine, EngineManifest, LayerTime
from edgecompile.targets.trt import layers as trt_layers
from edgecompile.targets.trt.options import Options
from edgecompile.targets.trt.session import TrtSession


class TrtEngine(TrtSession, Engine):
    """A deserialised engine whose graph is known."""

    def __init__(
        self,
        trt: Any,
        device: Device,
        manifest: EngineManifest,
        chosen: Options,
        payload: bytes,
        log: Any,
        graph: Graph,
    ):
        super().__init__(trt, device, manifest, chosen, payload, log, [t.name for t in graph.outputs])
        self._graph = graph

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`."""
        return trt_layers.of_profile(self.profile(feeds, repeats), self._graph)

    def inspection(self) -> trt_layers.Inspection:
        """The layers of the engine, as the engine inspector lists them."""
        return trt_layers.inspect(self.information())
