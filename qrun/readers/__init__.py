"""Weights that other tools have quantized, each tool's layout in a file of its own."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from qrun.readers.awq import AWQReader
from qrun.readers.base import Reader, Tensors, mapping, refuse
from qrun.readers.bitsandbytes import BitsAndBytesReader
from qrun.readers.compressed_tensors import CompressedTensorsReader
from qrun.readers.fastdeploy import FastDeployReader
from qrun.readers.fp8 import Fp8Reader
from qrun.readers.gptq import GPTQReader
from qrun.readers.hqq import HQQReader
from qrun.readers.modelopt import ModelOptReader
from qrun.readers.quark import QuarkReader
from qrun.readers.torchao import TorchAOReader

__all__ = ["METHODS", "Reader", "Tensors", "open_reader", "quantization"]


def auto_round(tensors: Tensors, config: Mapping[str, Any]) -> Reader:
    """auto-round writes GPTQ's layout, or AWQ's."""
    awq = str(config.get("packing_format")).endswith("auto_awq")
    return AWQReader(tensors, config) if awq else GPTQReader(tensors, config)


METHODS: Final[Mapping[str, Callable[[Tensors, Mapping[str, Any]], Reader]]] = {
    "gptq": GPTQReader,
    "awq": AWQReader,
    "compressed-tensors": CompressedTensorsReader,
    "fp8": Fp8Reader,
    "bitsandbytes": BitsAndBytesReader,
    "modelopt": ModelOptReader,
    "hqq": HQQReader,
    "torchao": TorchAOReader,
    "auto-round": auto_round,
    "quark": QuarkReader,
    "wint2": FastDeployReader,
}
"""``quant_method``, or FastDeploy's ``quantization``, -> its reader."""
_KEYS: Final = ("quantization_config", "compression_config")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of how its weights are quantized, ``quant_method`` always; empty if nothing.

    Raises `UnsupportedModelError`, naming the method, for one that is not read.
    """
    for key in _KEYS:
        found = config.get(key)
        if found:
            settings = mapping(found)
            method = settings.get("quant_method") or settings.get("quantization")  # as FastDeploy calls it
            if method not in METHODS:
                raise refuse(f"config.json: {key} has quant_method {method or 'unnamed'!r}")
            return {**settings, "quant_method": method}
    if config.get("quantization"):
        raise refuse(f"config.json: quantization {config['quantization']!r}")
    return {}


def open_reader(tensors: Tensors, config: Mapping[str, Any]) -> Reader | None:
    """The reader of a checkpoint's quantized weights, by its config.json; none where they are not quantized."""
    settings = quantization(config)
    return METHODS[settings["quant_method"]](tensors, settings) if settings else None
