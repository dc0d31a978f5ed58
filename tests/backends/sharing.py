"""Ways to break how layers of ONNX Runtime's graph read what other layers made."""

from gemma_deploy.backends.onnxruntime import decoder


def reads_the_first_layer_of_its_kind(patch):
    """Layers that share read the cache of the first layer of their kind, not of the last one before them."""
    attention, sharing, made = decoder.Decoder._attention, decoder.Decoder._sharing_attention, {}

    def own(self, layer, normed, shared):
        made[layer.kind, layer.index] = found = attention(self, layer, normed, shared)
        return found

    def other(self, layer, normed, shared, source):
        first = min(index for kind, index in made if kind == layer.kind)
        return sharing(self, layer, normed, shared, made[layer.kind, first][1:])

    patch.setattr(decoder.Decoder, "_attention", own)
    patch.setattr(decoder.Decoder, "_sharing_attention", other)


def vectors_of_the_layer_before(patch):
    """Each layer adds the per-layer vectors of its neighbour, the first those of the last."""
    right = decoder.by_layer

    def by_layer(nodes, vectors, layers, *, size):
        found = right(nodes, vectors, layers, size=size)
        return dict(zip(layers, [found[layer] for layer in (*layers[-1:], *layers[:-1])], strict=True))

    patch.setattr(decoder, "by_layer", by_layer)
