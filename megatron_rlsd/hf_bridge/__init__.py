"""Between Hugging Face folders and Megatron models: loading, exporting, writing."""

from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.export import export_hf_tensors
from megatron_rlsd.hf_bridge.families import FAMILIES, family_for, register_family
from megatron_rlsd.hf_bridge.family import Family
from megatron_rlsd.hf_bridge.load import load_hf_weights
from megatron_rlsd.hf_bridge.positions import max_positions
from megatron_rlsd.hf_bridge.reader import SafetensorsFolder, Weights, load_hf_config
from megatron_rlsd.hf_bridge.writer import save_hf_folder

__all__ = [
    "FAMILIES",
    "Family",
    "ModelDims",
    "SafetensorsFolder",
    "ShardLayout",
    "Weights",
    "export_hf_tensors",
    "family_for",
    "load_hf_config",
    "load_hf_weights",
    "max_positions",
    "register_family",
    "save_hf_folder",
]
