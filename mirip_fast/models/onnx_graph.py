"""Torch modules as ONNX graphs: writing one, running it, making it smaller.

``onnx``, ``onnxscript`` and ``onnxruntime`` are an extra and imported here only, inside functions.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mirip_fast.errors import ConfigError, MiripError

#: The one output of every graph.
OUTPUT = "scores"

#: Bytes of weights above which they go into a file of their own: one ONNX file ends at 2 GiB.
_LARGEST_FILE = 1_900_000_000


def require_onnx() -> None:
    """Make sure that the extra is installed.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(
                f"Exporting to ONNX needs {name}, which is not installed: "
                "pip install onnx onnxscript onnxruntime"
            ) from None


def write_graph(
    path: Path, module: nn.Module, inputs: Sequence[str], examples: Sequence[torch.Tensor]
) -> None:
    """Write ``module`` as an ONNX graph whose batch size is free.

    Args:
        path: the .onnx file; weights of 1.9 GB and more go into ``<name>.data`` beside it.
        module: in eval mode; takes the inputs, gives [B].
        inputs: names of the inputs.
        examples: one tensor [B, …] per input, B ≥ 2; every other size is fixed by it.

    Raises:
        MiripError: the module has something in it that ONNX has no word for.
        DiskFullError: there is no room.
    """
    batch = torch.export.Dim("batch")
    size = sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())
    shapes: Any = tuple({0: batch} for _ in examples)
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        shapes = (shapes,)  # one entry per parameter, and *pixels is one that takes a tuple
    try:
        with _quiet(), torch.no_grad():
            # Exported here: left to itself, torch.onnx falls back to a graph with a fixed batch.
            program = torch.export.export(
                module, tuple(examples), dynamic_shapes=shapes, strict=False
            )
            torch.onnx.export(
                program,
                f=str(path),
                dynamo=True,
                input_names=list(inputs),
                output_names=[OUTPUT],
                external_data=size > _LARGEST_FILE,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # torch wraps what happened in pages of advice
        first = (str(cause).strip().splitlines() or [""])[0]
        raise MiripError(
            f"The model cannot be written as ONNX: {type(cause).__name__}: {first}"
        ) from error


def run_graph(
    path: Path, batches: Iterable[tuple[NDArray[np.float32], ...]]
) -> NDArray[np.float32]:
    """[n] scores of an ONNX file on the CPU.

    Args:
        path: the .onnx file.
        batches: of each one [B, …] per input, in the order in which the file names them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own optimisations
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    scores: list[NDArray[np.float32]] = [
        session.run([OUTPUT], dict(zip(names, arrays, strict=True)))[0] for arrays in batches
    ]
    return np.concatenate(scores).astype(np.float32, copy=False)


def write_int8(source: Path, path: Path) -> None:
    """Write an ONNX file with most matrices as 8-bit integers (dynamic quantisation, onnxruntime).

    What stays float32: the patch embedding, the head (which ONNX writes as Gemm), and the products that
    narrow their input, the second of each MLP: what comes out of a GELU has outliers that one scale for 8
    bits cannot hold. On a ViT-Tiny, rounding those as well cost more than all the others together.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # The shapes that the exporter noted down are of matrices that onnxruntime transposes.
    del model.graph.value_info[:]
    with _quiet():
        quantize_dynamic(
            model,
            path,
            nodes_to_exclude=_kept_exact(model),
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # CPUs without VNNI add up in 16 bits, and overflow
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            use_external_data_format=data_file(source).is_file(),
        )


def _kept_exact(model: Any) -> list[str]:
    """Names of the nodes that are left alone."""
    shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    names = []
    for node in model.graph.node:
        if node.op_type == "Gemm":
            names.append(f"{node.name}_MatMul")  # onnxruntime makes a MatMul of it first
        elif node.op_type == "MatMul":
            rows, columns = shapes.get(node.input[1], (0, 0))[-2:]
            if rows > columns:
                names.append(node.name)
    return names


def data_file(path: Path) -> Path:
    """Where the weights of a large ONNX file lie."""
    return path.with_name(path.name + ".data")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own inner workings."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
