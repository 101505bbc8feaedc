"""Runtimes that come with optkit. One file or package each."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_backends() -> Registration:
    return {
        "torch": "optkit_backends.torch:Torch",
        "torchscript": "optkit_backends.torchscript:TorchScript",
        "onnxruntime": "optkit_backends.onnxruntime:OnnxRuntime",
    }
