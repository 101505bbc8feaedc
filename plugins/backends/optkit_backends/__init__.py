"""Runtimes that come with optkit. One file or package each."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_backends() -> Registration:
    return {
        "torch": "optkit_backends.torch:Torch",
        "torch_compile": "optkit_backends.torch_compile:TorchCompile",
        "aot_inductor": "optkit_backends.aot_inductor:AOTInductor",
        "torchscript": "optkit_backends.torchscript:TorchScript",
        "onnxruntime": "optkit_backends.onnxruntime:OnnxRuntime",
        "openvino": "optkit_backends.openvino:OpenVINO",
        "openvino_genai": "optkit_backends.openvino_genai:OpenVINOGenAI",
        "llama_cpp": "optkit_backends.llama_cpp:LlamaCpp",
    }
