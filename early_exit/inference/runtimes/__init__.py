"""Runtimes: what runs a network's segments, such as eager torch, ONNX Runtime and OpenVINO."""
