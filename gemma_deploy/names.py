"""Facts that several parts of the program name: files, modules of a model, units, domains. Each stands here alone.

Modules of a model are named as Hugging Face names them, in checkpoints, graphs and parameter files alike.
"""

from __future__ import annotations

# Files of a checkpoint and of an artifact.
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PARAMS = "params.safetensors"
GGUF = "model.gguf"  # the parameter file, as llama.cpp reads it
TVM_LIBRARY = "model.so"
TVM_OBJECTS = "model.tar"  # in its place, where a linker is not here
OPENVINO_MODEL = "openvino_model.xml"
OPENVINO_WEIGHTS = "openvino_model.bin"  # likewise, beside its graph, as OpenVINO looks for it
PARAMETER_FILES = (PARAMS, GGUF, OPENVINO_WEIGHTS)
MANIFEST = "manifest.json"

# Modules of a model, without and with the name of their weight; a layer is LAYERS and its number.
EMBEDDING = "model.embed_tokens"
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
COLUMN_SCALE = "model.embed_tokens.column_scale"
CACHE_FACTOR = "cache_factor"  # ends the name of what channels of keys or values are divided by, in an int8 cache
CACHE_SCALE = "cache_scale"  # ends the name of the size of one step of each channel's codes, likewise
COLUMN_FACTOR = "column_factor"  # ends the name of what the columns of linears that read one input were multiplied by
FIRST_ROW = ".first_row"  # ends the name, in a rank's graph, of the number of its first row of a table, or expert
LAYERS = "model.layers."
PER_LAYER_TABLE = "model.embed_tokens_per_layer"  # rows of a vector for each layer
PER_LAYER_PROJECTION = "model.per_layer_model_projection"
PER_LAYER_NORM = "model.per_layer_projection_norm"
PLE_PROJECTION = "model.ple.per_layer_model_projection"  # likewise, of a model that has no table of vectors
PLE_NORM = "model.ple.per_layer_projection_norm"
PER_LAYER_VECTORS = "model.per_layer_inputs"  # the value in a graph: what those three make of a token
LAST_POSITION = "model.last_position"  # begins the names of values in a graph that are cut down to it
STREAM_PROJECTION = "model.altup_projections"  # and a number: makes a stream of the embeddings
STREAM_UNEMBED = "model.altup_unembed_projections"  # and a number: what a stream is of the last hidden state
STREAMS = "model.streams"  # the value in a graph: what the first layer reads of the embeddings
NORM = "model.norm"
NORM_WEIGHT = "model.norm.weight"
TOKEN_PROJECTION = "model.embedding_projection"  # of some encoders: of each token, behind the last norm
HEAD = "lm_head"
HEAD_WEIGHT = "lm_head.weight"

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators

FP16_MAX = 65504.0  # the largest finite float16
MIB = 1 << 20  # bytes
GIB = 1 << 30
