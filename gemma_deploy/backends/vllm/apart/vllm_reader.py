"""Runs in the Python that vLLM is installed in, never in this program's: a checkpoint's numbers, as vLLM has them.

    vllm_reader.py vllm|transformers PATH DTYPE LENGTH

One request a line on standard input, one answer a line on standard output, JSON; arrays pass as .npy files.
`{"run": [ids, ...], "out": [file, ...]}` -> `{"rows": [n, ...]}`: what leaves the final norm, [n, H] float32 of each.
`{"head": file, "out": file}` -> `{"rows": n}`: logits [n, V] float32 of such rows.
"""

import importlib
import json
import os
import sys
from typing import Any

import numpy as np

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

    def probe_head(self, file: str, out: str) -> int:
        """Logits of rows, as the sampler gets them."""
        torch = importlib.import_module("torch")
        rows = torch.from_numpy(np.load(file)).to(self.model_runner.dtype)
        with torch.inference_mode():
            np.save(out, self.model_runner.get_model().compute_logits(rows).float().numpy())
        return len(rows)


class Vllm:
    """A checkpoint in vLLM."""

    def __init__(self, path: str, dtype: str, length: int) -> None:
        vllm = importlib.import_module("vllm")
        self.params = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self.llm = vllm.LLM(
            model=path,
            dtype=dtype,
            max_model_len=length + 1,
            max_num_seqs=1,
            max_num_batched_tokens=CHUNK,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
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
    reader = Vllm if kind == "vllm" else Transformers
    model = reader(path, dtype, int(length))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "run" in asked:
            rows = [model.run(ids, out) for ids, out in zip(asked["run"], asked["out"], strict=True)]
            print(json.dumps({"rows": rows}), file=answers, flush=True)
        else:
            print(json.dumps({"rows": model.head(asked["head"], asked["out"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
