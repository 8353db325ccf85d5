"""Packaging of megatron_rlsd. Versions that belong together: requirements/cpu.txt, gpu.txt."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "httpx2>=2.0",
    "jinja2",
    "math-verify>=0.9.0",
    "numpy",
    "packaging",
    "psutil",
    "pydantic>=2.7",
    "pyyaml",
    "reasoning-gym>=0.1.25",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "torch>=2.6",
    "transformers>=4.51",
]
MEGATRON = [
    # 0.16.1 is the newest release whose metadata admits Python 3.11.
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core>=0.17,<0.20; python_version >= "3.12"',
    # Megatron-Core 0.19 imports it, also where no kernel runs.
    'triton; python_version >= "3.12"',
]

setup(
    name="megatron_rlsd",
    version="0.1.0",
    description="RLSD (Self-Distilled RLVR) post-training of language models on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_rlsd", "megatron_rlsd.*"]),
    package_data={"megatron_rlsd.observability.report": ["*.html", "*.css", "*.js"]},
    python_requires=">=3.11,<3.13",
    install_requires=CORE,
    extras_require={
        "cpu": MEGATRON,
        # apex is not on the package index: the NGC images carry it, and it is optional. The
        # library of Transformer Engine is an extra of its own, for one release of CUDA; its torch
        # part is built against the torch that is there (requirements/gpu.txt says how).
        "gpu": [*MEGATRON, "torch>=2.10", "transformer-engine[core_cu13,pytorch]>=2.8"],
        # Turns the GGUF weights that ship in a package into an HF folder (tools/fetch_smollm2.py).
        "smollm2": ["gguf", "accelerate"],
        "observability": ["wandb", "mlflow-skinny"],
        "dev": [
            "hypothesis",
            "import-linter",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "types-PyYAML",
        ],
    },
)
