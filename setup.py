"""Packaging: `pip install -e .` beside the scripts, with extras `pip install -e .[plot]`."""

from setuptools import find_packages, setup

setup(
    name="zephyr-dpo",
    version="0.1.0",
    description="The Zephyr recipe from scratch: dSFT, AI feedback and dDPO in plain PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["zephyr*", "kernels*"]),
    package_data={"zephyr": ["recipes/*.toml", "evals/report.html"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors>=0.8",
        "sentencepiece>=0.2.3",  # earlier ones crash on hostile models
        "numpy>=1.26",
        "tqdm>=4.66",
    ],
    extras_require={
        "parquet": ["pyarrow>=15"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5",
            "peft>=0.21",
            "ruff>=0.12",
            "pyarrow>=15",
            "matplotlib>=3.8",
            "tensorboard>=2.16",
        ],
        "serve": ["transformers[serving]>=5"],
        "peers": ["trl>=1.15", "liger-kernel>=0.6", "datasets>=3"],
    },
)
