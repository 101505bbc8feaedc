"""Quantizers that come with optkit. One file an algorithm."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_transforms() -> Registration:
    return {
        "quantize.awq": "optkit_quantize.awq:AWQ",
        "quantize.bitsandbytes": "optkit_quantize.bitsandbytes:BitsAndBytes",
        "quantize.fp8": "optkit_quantize.fp8:FP8",
        "quantize.gptq": "optkit_quantize.gptq:GPTQ",
        "quantize.hqq": "optkit_quantize.hqq:HQQ",
        "quantize.int8_dynamic": "optkit_quantize.int8_dynamic:Int8Dynamic",
        "quantize.int8_static": "optkit_quantize.int8_static:Int8Static",
        "quantize.kv_cache": "optkit_quantize.kv_cache:KVCache",
        "quantize.mixed": "optkit_quantize.mixed:Mixed",
        "quantize.rotate": "optkit_quantize.rotate:Rotate",
        "quantize.rtn": "optkit_quantize.rtn:RTN",
        "quantize.smoothquant": "optkit_quantize.smoothquant:SmoothQuant",
        "quantize.w4a8": "optkit_quantize.w4a8:W4A8",
    }
