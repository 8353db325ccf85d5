"""Users' own code by name: files and modules that register rewards, algorithms or families."""

from megatron_rlsd.plugins.loading import FILE_MODULE, file_of, import_file, load_plugins
from megatron_rlsd.plugins.registry import Reference, Registered, Registry

__all__ = [
    "FILE_MODULE",
    "Reference",
    "Registered",
    "Registry",
    "file_of",
    "import_file",
    "load_plugins",
]
