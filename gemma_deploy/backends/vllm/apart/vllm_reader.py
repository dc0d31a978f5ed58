"""Runs in the Python that vLLM is installed in, never in this program's: a checkpoint's numbers, as vLLM has them.

    vllm_reader.py vllm|transformers|steps PATH DTYPE LENGTH

One request a line on standard input, one answer a line on standard output, JSON; arrays pass as .npy files.
`{"run": [ids, ...], "out": [file, ...]}` -> `{"rows": [n, ...]}`: what leaves the final norm, [n, H] float32 of each.
`{"head": file, "out": file}` -> `{"rows": n}`: logits [n, V] float32 of such rows.
`steps` answers `begin`, `read`, `end` and `peak` as llama_reader.py does, the logits of one row at a time.
"""

import importlib
import json
import os
import resource
import sys
from typing import Any

import numpy as np

STEP = 512  # tokens of a prompt in a step of `steps`
CHUNK = 128  # tokens of a prompt in a step, so that most of them read their past from the cache


class Probe:
    """What a worker of vLLM does beside its own work (`worker_extension_cls`)."""

    model_runner: Any

    def probe_begin(self) -> str:
        """Keep what leaves the final norm from now on."""
        model = self.model_runner.get_model()
        self.kept: list[np.ndarray] = []

        def keep(module: Any, given: Any, made: Any) -> None:
            hidden = made[0] if isinstance(made, tuple) else made
            self.kept.append(hidden.detach().float().numpy().copy())

        model.model.norm.register_forward_hook(keep)
        return type(model).__name__

    def probe_rows(self, file: str, count: int) -> int:
        """Write the last `count` rows that were kept, and keep none."""
        rows, self.kept = np.concatenate(self.kept), []
        np.save(file, rows[-count:])
        return len(rows)

    def probe_step(self, out: str) -> int:
        """Logits of the last row that was kept, raw float32 into the file; how many there are."""
        torch = importlib.import_module("torch")
        rows, self.kept = self.kept[-1][-1:], []
        with torch.inference_mode():
            given = torch.from_numpy(rows).to(self.model_runner.dtype)
            logits = self.model_runner.get_model().compute_logits(given).float().numpy()[0]
        np.memmap(out, np.float32, "r+", shape=logits.shape)[:] = logits
        return len(logits)

    def probe_size(self) -> tuple[int, int]:
        """Tokens that have logits, and this process's peak RSS in bytes."""
        vocabulary = self.model_runner.get_model().config.vocab_size
        return vocabulary, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def probe_head(self, file: str, out: str) -> int:
        """Logits of rows, as the sampler gets them."""
        torch = importlib.import_module("torch")
        rows = torch.from_numpy(np.load(file)).to(self.model_runner.dtype)
        with torch.inference_mode():
            np.save(out, self.model_runner.get_model().compute_logits(rows).float().numpy())
        return len(rows)


class Vllm:
    """A checkpoint in vLLM."""

    chunk, keeps_prefixes = CHUNK, False

    def __init__(self, path: str, dtype: str, length: int) -> None:
        vllm = importlib.import_module("vllm")
        self.params = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self.llm = vllm.LLM(
            model=path,
            dtype=dtype,
            max_model_len=length + 1,
            max_num_seqs=1,
            max_num_batched_tokens=self.chunk,
            enable_chunked_prefill=True,
            enable_prefix_caching=self.keeps_prefixes,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            worker_extension_cls="vllm_reader.Probe",
        )
        self.llm.collective_rpc("probe_begin")

    def run(self, ids: list[int], out: str) -> int:
        """See the module."""
        self.llm.generate([{"prompt_token_ids": ids}], self.params, use_tqdm=False)
        (rows,) = self.llm.collective_rpc("probe_rows", args=(out, len(ids)))
        return int(rows)

    def head(self, file: str, out: str) -> int:
        """See the module."""
        (rows,) = self.llm.collective_rpc("probe_head", args=(file, out))
        return int(rows)


class Steps(Vllm):
    """Texts that grow. vLLM is given the whole text each time, and finds all but the end of it in its cache."""

    chunk, keeps_prefixes = STEP, True

    def __init__(self, path: str, dtype: str, length: int) -> None:
        super().__init__(path, dtype, length)
        ((self.vocabulary, _),) = self.llm.collective_rpc("probe_size")
        self.texts: dict[int, tuple[list[int], str]] = {}

    def answer(self, asked: dict[str, Any]) -> dict[str, int]:
        """See the module."""
        if "begin" in asked:
            np.memmap(asked["out"], np.float32, "w+", shape=(1, self.vocabulary))
            self.texts[asked["begin"]] = [], asked["out"]
            return {"begun": asked["begin"], "rows": 1}
        if "read" in asked:
            known, out = self.texts[asked["read"]]
            if asked["wanted"] != 1:
                raise ValueError(f"logits of {asked['wanted']} tokens: one is kept")
            known[asked["length"] :] = asked["ids"]
            self.llm.generate([{"prompt_token_ids": known}], self.params, use_tqdm=False)
            self.llm.collective_rpc("probe_step", args=(out,))
            return {"kept": asked["length"]}
        if "end" in asked:
            del self.texts[asked["end"]]
            return {}
        ((_, peak),) = self.llm.collective_rpc("probe_size")
        return {"bytes": peak + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Transformers:
    """A checkpoint in transformers, whose codes compressed-tensors makes weights of again."""

    def __init__(self, path: str, dtype: str, length: int) -> None:
        self.torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        self.kind, options = getattr(self.torch, dtype), {}
        if hasattr(transformers.AutoConfig.from_pretrained(path, local_files_only=True), "quantization_config"):
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=self.kind, attn_implementation="eager", local_files_only=True, **options
        ).eval()
        for module in self.model.modules():  # weights are rounded already, and inputs are left as they are
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False

    def run(self, ids: list[int], out: str) -> int:
        """See the module."""
        with self.torch.inference_mode():
            made = self.model.model(self.torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        np.save(out, made.float().numpy())
        return len(made)

    def head(self, file: str, out: str) -> int:
        """See the module."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        with self.torch.inference_mode():
            logits = self.model.lm_head(self.torch.from_numpy(np.load(file)).to(self.kind)).float()
            logits = logits if cap is None else (logits / cap).tanh_() * cap
        np.save(out, logits.numpy())
        return len(logits)


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    kind, path, dtype, length = sys.argv[1:]
    readers: dict[str, type[Vllm | Transformers]] = {"vllm": Vllm, "steps": Steps, "transformers": Transformers}
    model = readers[kind](path, dtype, int(length))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(model, Steps):
            print(json.dumps(model.answer(asked)), file=answers, flush=True)
        elif "run" in asked:
            rows = [model.run(ids, out) for ids, out in zip(asked["run"], asked["out"], strict=True)]
            print(json.dumps({"rows": rows}), file=answers, flush=True)
        else:
            print(json.dumps({"rows": model.head(asked["head"], asked["out"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
