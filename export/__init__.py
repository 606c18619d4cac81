"""A factored model in, files and figures out: compact form, safetensors, ONNX, benchmarks."""
