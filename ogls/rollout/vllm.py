"""vLLM samples rollouts, in the training process or in one of its own.

This is the only file that imports vllm, and it does so only when an engine starts.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ogls.records import Completion, Sampling
from ogls.rollout.engine import RolloutEngine, prompt_seeds
from ogls.system.memory.serving import Serving
from ogls.system.memory.shapes import Shapes
from ogls.system.ranges import POSITIVE, within

if TYPE_CHECKING:
    from ogls.policy.policy import Policy

# vllm reads these variables when it is imported. One that the environment has already is left as it is.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_CACHE = 2 << 30  # bytes of keys and values
_THOUGHTS = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}  # vLLM makes tokens of them


class VllmEngine(RolloutEngine):
    """This engine samples with vLLM, which takes either merged weights or the adapter alone after each update.

    Args:
        sync: weights that vLLM is given: ``merged`` for all that can have changed, with the adapter merged into them;
            ``adapter`` for the adapter alone, if the policy has one; ``auto`` for ``merged`` on a CPU, where an adapter
            costs most of the throughput, and ``adapter`` on a GPU for a policy that has one
        memory_gib: memory for keys and values, in GiB; null takes 2 on a CPU, and on a GPU what the memory plan leaves
        max_num_seqs: largest number of sequences that are sampled side by side
        max_lora_rank: largest rank of an adapter that vLLM takes
        dtype: dtype of vLLM's weights and computation
        enforce_eager: whether vLLM does without CUDA graphs and compilation; null does without on a CPU alone
        kv_cache_dtype: dtype of keys and values; ``auto`` is `dtype`, ``fp8`` takes half of its memory and traffic, on
            a GPU alone. Rollouts are then drawn from a slightly other policy (`train/engine_logprob_gap`).
    """

    takes_process = True

    def __init__(
        self,
        sync: Literal["auto", "merged", "adapter"] = "auto",
        memory_gib: float | None = None,
        max_num_seqs: int = 256,
        max_lora_rank: int = 64,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        enforce_eager: bool | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    ) -> None:
        within("data.engine.memory_gib", memory_gib, POSITIVE)
        within("data.engine.max_num_seqs", max_num_seqs, "[1, 1e9]")
        self.sync = sync
        self.memory_gib = memory_gib
        self.max_num_seqs = max_num_seqs
        self.max_lora_rank = max_lora_rank
        self.dtype: Literal["bfloat16", "float32"] = dtype
        self.enforce_eager = enforce_eager
        self.kv_cache_dtype: Literal["auto", "fp8"] = kv_cache_dtype
        self._llm: Any = None
        self._num_loads = 0
        self._adapters: Path | None = None
        self._lora_request: Any = None

    def _start(self, folder: Path, context_length: int) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vllm is not installed: pip install 'ogls[cpu]', or 'ogls[cuda]' on a GPU machine")
        device = None
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # vLLM looks at what is free, and what torch keeps for later is not
            device = torch.cuda.mem_get_info()
        self._gpu = device is not None
        options = self.options(folder, context_length, device)
        for name, value in (_ENVIRONMENT | ({} if self._gpu else CPU_ENVIRONMENT)).items():
            os.environ.setdefault(name, value)
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM does so after its first warnings
        from vllm import LLM

        if not options["enforce_eager"]:
            said = "vLLM starts; its first start on a machine takes minutes, since it compiles"
            print(said, file=sys.stderr, flush=True)
        set_num_threads = torch.set_num_threads
        self._llm = LLM(**options)
        step = self._llm.llm_engine.step

        def beating() -> Any:
            self.beat()
            return step()

        self._llm.llm_engine.step = beating  # a step is a token of every sequence, or a piece of a prompt
        torch.set_num_threads = set_num_threads  # on a CPU, vLLM replaces it by a function that does nothing

    def check_device(self, kind: str) -> None:
        if self.kv_cache_dtype == "fp8" and kind != "cuda":
            raise ValueError(
                f"data.engine.kv_cache_dtype is fp8, but a {kind} keeps no keys and values in it: set auto"
            )

    def options(self, folder: Path, context_length: int, device: tuple[int, int] | None) -> dict[str, Any]:
        """Returns the arguments that vLLM starts with.

        Args:
            folder: folder of the model
            context_length: largest number of tokens of a prompt and its completion
            device: free bytes of the GPU and all that it has; None on a CPU

        Raises:
            ValueError: the policy's adapter or the device does not fit the settings.
        """
        self.check_device("cpu" if device is None else "cuda")
        if self._serves_adapter(device is not None) and self.adapter_rank is not None:
            self._refuse_rank(self.adapter_rank)
        cache = self.asked_cache or self.cache_bytes or _CPU_CACHE
        options = self._settings(folder, context_length, device is not None, self._serves_adapter(device is not None))
        if device is not None:
            free, total = device
            shapes = Shapes.of(json.loads((folder / "config.json").read_text()))
            serving = self.serving(shapes)
            if self.asked_cache is None and self.cache_bytes is None:  # nobody trains here: half of what is left
                cache = max(serving.cache(context_length), (free - serving.share(0)) // 2)
            # vLLM refuses to start unless as much is free, although it takes the bytes of the cache as they are.
            options["gpu_memory_utilization"] = min(1.0, serving.share(cache) / total)
        return options | {"kv_cache_memory_bytes": cache, "use_tqdm_on_load": False}

    def served(self, folder: Path, context_length: int, gpu: bool) -> dict[str, Any]:
        """Returns the arguments of a vLLM server that has its device to itself, see `options`.

        It takes adapters if the policy has one, unless `sync` is ``merged``.
        """
        self.check_device("cuda" if gpu else "cpu")
        adapter = self.sync != "merged" and bool(self.adapter_rank)
        if adapter:
            self._refuse_rank(self.adapter_rank or 0)
        cache = self.asked_cache or (None if gpu else _CPU_CACHE)
        return self._settings(folder, context_length, gpu, adapter) | {"kv_cache_memory_bytes": cache}

    def _settings(self, folder: Path, context_length: int, gpu: bool, adapter: bool) -> dict[str, Any]:
        loras = {"enable_lora": True, "max_lora_rank": self.max_lora_rank, "max_loras": 1} if adapter else {}
        thoughts = {"reasoning_config": _THOUGHTS} if self.thought_ids else {}
        return (
            loras
            | thoughts
            | {
                "model": str(folder),
                "skip_tokenizer_init": self.thought_ids is None,
                "generation_config": "vllm",
                "dtype": self.dtype,
                "max_model_len": context_length,
                "max_num_seqs": self.max_num_seqs,
                "kv_cache_dtype": self.kv_cache_dtype,
                "enable_prefix_caching": True,
                "enforce_eager": self._eager(gpu),
                "logprobs_mode": "processed_logprobs",
                "disable_log_stats": True,
                "seed": 0,
            }
        )

    def serving(self, shapes: Shapes) -> Serving:
        """Returns a count of what vLLM takes of a GPU."""
        return Serving(
            shapes=shapes,
            rank=self.max_lora_rank if self._serves_adapter(gpu=True) else 0,
            max_num_seqs=self.max_num_seqs,
            graphs=not self._eager(gpu=True),
            dtype_bytes=2 if self.dtype == "bfloat16" else 4,
            cached_bytes=1 if self.kv_cache_dtype == "fp8" else None,
        )

    @property
    def asked_cache(self) -> int | None:
        """Returns the bytes of `memory_gib`; None where a plan decides."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    def _eager(self, gpu: bool) -> bool:
        return not gpu if self.enforce_eager is None else self.enforce_eager

    def _serves_adapter(self, gpu: bool) -> bool:
        return self.sync == "adapter" or (self.sync == "auto" and gpu and bool(self.adapter_rank))

    def _load(self, policy: Policy) -> None:
        self._num_loads += 1
        if self._serves_adapter(self._gpu):
            self._load_adapter(policy)
        else:
            weights = iter(policy.merged_weights())
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.reset_prefix_cache()

    def _load_adapter(self, policy: Policy) -> None:
        """Hands over an adapter under a new name and path, because vLLM's caches go by these."""
        from vllm.lora.request import LoRARequest

        self._refuse_rank(policy.adapter_rank)
        previous, self._adapters = self._adapters, Path(tempfile.mkdtemp(prefix="ogls-adapter-"))
        policy.save_adapter(self._adapters)
        self._lora_request = LoRARequest(f"ogls-{self._num_loads}", self._num_loads, str(self._adapters))
        if previous is not None:
            shutil.rmtree(previous)

    def _refuse_rank(self, rank: int) -> None:
        if rank == 0:
            raise ValueError('this policy has no adapter: set data.engine.sync to "merged" or "auto"')
        if rank > self.max_lora_rank:
            raise ValueError(
                f"the adapter has rank {rank}, the engine takes up to {self.max_lora_rank}: set "
                "data.engine.init_args.max_lora_rank"
            )

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with torch.random.fork_rng(devices=[]):  # vLLM draws from the global generator, which stays as it was
            torch.manual_seed(seed)
            outputs = self._llm.generate(
                inputs,
                [self._parameters(sampling, n, own) for own in prompt_seeds(prompts, seed)],
                lora_request=self._lora_request,
                use_tqdm=False,
            )
        return [[_completion(sample) for sample in sorted(out.outputs, key=lambda s: s.index)] for out in outputs]

    def _parameters(self, sampling: Sampling, n: int, seed: int) -> Any:
        """Returns vLLM's parameters, all that matter by name, because its defaults are for chat.

        Its sampler on a CPU takes no seed, so that there the prompts of a call share one generator.
        """
        from vllm import SamplingParams

        return SamplingParams(
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            thinking_token_budget=sampling.thinking_token_budget,
            stop_token_ids=list(self._end_token_ids),
            ignore_eos=True,  # the tokenizer's end token may be another one
            logprobs=0,
            detokenize=False,
            seed=seed % 2**63 if self._gpu else None,
        )

    def _close(self) -> None:
        if self._llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            llm, self._llm, self._lora_request = self._llm, None, None
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
        if self._adapters is not None:
            shutil.rmtree(self._adapters)
            self._adapters = None


def _completion(sample: Any) -> Completion:
    ids = tuple(sample.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True))
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason=sample.finish_reason)
