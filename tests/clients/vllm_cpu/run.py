"""Runs models in vLLM: `run.py ASKED FOLDER...`. Prints what each gave, as JSON on the last line.

`ASKED` is a JSON file: `prompts` (token ids of each), `new_tokens`, `dtype`.
"""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.platforms import current_platform


def main(asked: str, *folders: str) -> None:
    wanted = json.loads(Path(asked).read_text())
    current_platform.import_kernels()
    stand_ins = []
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        stand_ins.append("4-bit weights")
        # Its name keeps it alive, and with it what it registers.
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(
            "cpu_gemm_wna16(Tensor input, Tensor weight, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias,"
            " int pack_factor, str isa) -> ()"
        )
        library.impl("cpu_gemm_wna16", product, "CPU")
    if not exact_int8():
        stand_ins.append("8-bit inputs and weights")
        ops.create_onednn_scaled_mm, ops.onednn_scaled_mm = int8_handler, int8_product
    found = [answers(folder, **wanted) for folder in folders]
    print("\n" + json.dumps({"stand_ins": stand_ins, "answers": found}))


def exact_int8() -> bool:
    """Whether oneDNN multiplies int8 as it should.

    It does not with AVX2 alone, whose instruction saturates sums of two products: of 8-bit weights, where a program has
    not kept them to 7 bits, products are off by a fifth.
    """
    full = torch.full((64, 64), 127, dtype=torch.int8)
    out, scales = torch.empty(64, 64), torch.ones(64)  # the handler may point at the scales, and must not outlive them
    handler = ops.create_onednn_scaled_mm(full.t(), scales, torch.float32, True, False)
    ops.onednn_scaled_mm(handler, full, out, torch.ones(64, 1), None, None, None)
    return bool((out == 64 * 127 * 127).all())


def int8_handler(weight: torch.Tensor, scales: torch.Tensor, *_: object) -> SimpleNamespace:
    """What `int8_product` and its caller need of a weight `[in, out]`."""
    return SimpleNamespace(weight=weight.double(), scales=scales.clone().flatten(), n=weight.shape[1])


def int8_product(
    handler: SimpleNamespace,
    input: torch.Tensor,
    out: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero: torch.Tensor | None,
    zero_adjustment: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Stands in for oneDNN's product; vLLM rounds the inputs before it. In float64 sums of integers are exact."""
    assert input_zero is None
    sums = input.double() @ handler.weight * input_scale * handler.scales
    out.copy_(sums if bias is None else sums + bias)


def product(
    input: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa: str,
) -> None:
    """Stands in for vLLM's kernel of 4-bit weights, which its build for processors without AVX-512 lacks.

    All before and after it stays vLLM's: reading the folder, choosing the kernel, and laying out the weights, which
    come as `[out / 16, in * 2]` int32 here.
    """
    features = input.shape[-1]
    stored = unpacked(weight.view(-1, features, 2).permute(1, 0, 2).reshape(features, -1))
    scale = scales.repeat_interleave(features // len(scales), 0)
    zero = 8 if zeros is None else unpacked(zeros).repeat_interleave(features // len(zeros), 0)
    out.copy_(torch.nn.functional.linear(input, ((stored - zero) * scale).T.to(input.dtype), bias))


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """`[rows, columns]` int32 as `[rows, columns * 8]` of 0 to 15."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15).flatten(1)


def answers(folder: str, prompts: list[list[int]], new_tokens: int, dtype: str) -> list[dict]:
    """For each prompt the tokens that follow it, and of every token but the first its logarithmic probability and the
    likeliest in its place."""
    model = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=len(prompts),
        # Prompts whose start is in the cache get no probabilities there.
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=1)
    found = []
    for output in model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        places = list(zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
        found.append(
            {
                "generated": list(output.outputs[0].token_ids),
                "logprobs": [place[token].logprob for token, place in places],
                "likeliest": [next(token for token, one in place.items() if one.rank == 1) for _, place in places],
            }
        )
    del model
    gc.collect()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
