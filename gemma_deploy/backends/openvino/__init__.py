"""Models in OpenVINO's own format, which its runtime and openvino-genai load."""
