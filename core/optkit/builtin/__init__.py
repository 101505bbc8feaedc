"""Sources, datasets and metrics that come with optkit, through the same door as any plugin."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_sources() -> Registration:
    return {
        "hf": "optkit.builtin.huggingface:HuggingFace",
        "gguf": "optkit.builtin.gguf:GGUF",
    }


@hookimpl
def register_datasets() -> Registration:
    return {
        "python_reference": "optkit.builtin.texts:PythonReference",
        "imagefolder": "optkit.builtin.images:ImageFolder",
        "text_file": "optkit.builtin.texts:TextFile",
    }


@hookimpl
def register_metrics() -> Registration:
    return {
        "perplexity": "optkit.builtin.quality:Perplexity",
        "kl": "optkit.builtin.quality:KLDivergence",
        "kl_p99": "optkit.builtin.quality:KLDivergenceP99",
        "top1_agreement": "optkit.builtin.quality:Top1Agreement",
        "embedding_cosine": "optkit.builtin.quality:EmbeddingCosine",
        "embedding_cosine_p01": "optkit.builtin.quality:EmbeddingCosineP01",
        "label_agreement": "optkit.builtin.quality:LabelAgreement",
        "accuracy": "optkit.builtin.quality:Accuracy",
        "decode_tokens_per_second": "optkit.builtin.speed:DecodeTokensPerSecond",
        "prefill_tokens_per_second": "optkit.builtin.speed:PrefillTokensPerSecond",
        "ttft_ms": "optkit.builtin.speed:TimeToFirstToken",
        "tpot_ms": "optkit.builtin.speed:TimePerOutputToken",
        "latency_s": "optkit.builtin.speed:Latency",
        "sequences_per_second": "optkit.builtin.speed:SequencesPerSecond",
        "images_per_second": "optkit.builtin.speed:ImagesPerSecond",
        "size_bytes": "optkit.builtin.speed:Size",
        "peak_memory_bytes": "optkit.builtin.speed:PeakMemory",
    }
