"""The shared fixtures are what the other tests believe them to be."""

import torch

from optkit.weights import load_folder


def test_the_tiny_model_is_the_same_at_every_call_and_nobody_shares_it(tiny_llama):
    first, second = tiny_llama().module, tiny_llama().module
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).abs().sum() > 0


def test_making_a_tiny_model_leaves_the_random_numbers_alone(tiny_llama):
    expected = torch.random.get_rng_state()
    tiny_llama()
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_the_tiny_tokenizer_round_trips_and_chats(tiny_tokenizer):
    text = "Grüße, 2 + 2 = 4 \N{SNOWMAN}"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text
    chat = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|assistant|>"


def test_the_tiny_folder_loads_as_the_tiny_model(tiny_folder, tiny_llama):
    loaded, made = load_folder(tiny_folder), tiny_llama()
    ids = torch.tensor([loaded.tokenizer.encode("The capital of France")])
    assert torch.equal(loaded.module(ids).logits, made.module(ids).logits)
    assert loaded.tags == made.tags
