"""Text from an artifact of `backend.type: onnxruntime` with onnxruntime-genai, and without gemma-deploy.

Use: python examples/genai.py workspace/NAME "Return the" [NEW_TOKENS]

docs/onnxruntime-genai.md explains it, and has the same in C# and C++.
"""

import sys

import onnxruntime_genai as og


def main(artifact: str, text: str, new_tokens: int = 32) -> None:
    """Print the text and what the model adds to it, token by token."""
    model = og.Model(artifact)
    tokenizer = og.Tokenizer(model)
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(text)]  # encode puts no BOS in front, and Gemma needs one

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    stream = tokenizer.create_stream()
    print(text, end="")
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
