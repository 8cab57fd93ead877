"""Signed KV in vLLM's NIXL connector: who is signed and compared when, and how signatures travel.

vLLM's worker registers one region of memory per layer and moves the same blocks of all regions. It knows
layers by the names in its groups of KV blocks, so for the time of the registration the table of signatures is
one of them, and every transfer carries it. Both classes do nothing unless `is_kv_digest_enabled` is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger

from baton.transfer.digest_orders import DigestBook, DigestOrders, TaggedBlocks
from baton.transfer.kv_digest import TABLE_LAYER, WORD_BYTES, KvDigest, words_of

logger = init_logger(f"vllm.{__name__}")

DIFFERS = 2
"""Among vLLM's counts of failed transfers, which are ones: this one's blocks were not what was signed."""


class SigningScheduler(NixlPullConnectorScheduler):
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        is_on = vllm_config.kv_transfer_config.get_from_extra_config("is_kv_digest_enabled", False)
        self._book = DigestBook(self.block_size) if is_on else None
        self._to_sign: dict[str, Any] = {}
        """Prefill requests whose KV will be handed off."""

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if self._book is not None and (request.kv_transfer_params or {}).get("do_remote_decode"):
            self._to_sign[request.request_id] = request
            self._book.begin_prompt(request.request_id, request.prompt_token_ids)

    def expect(self, request: Any, block_ids: list[int]) -> None:
        """The last blocks of the tokens that the source holds, to be filled by it."""
        if self._book is not None:
            num_held = int(request.kv_transfer_params["remote_num_tokens"])
            self._book.expect(request.request_id, block_ids, request.prompt_token_ids[:num_held])

    def digest_orders(self, scheduler_output: Any) -> DigestOrders:
        """Once per step, before the base class takes the reads away."""
        if self._book is None:
            return DigestOrders()
        for request, block_ids, *_ in self._reqs_need_recv.values():
            if block_ids:
                self.expect(request, list(block_ids[0]))
        return self._book.on_step(self._steps(scheduler_output))

    def _steps(self, scheduler_output: Any) -> Iterator[tuple[str, list[int] | None, bool, int]]:
        for req_id, new_block_ids, is_resumed in yield_req_data(scheduler_output):
            if request := self._to_sign.get(req_id):
                num_computed = request.num_computed_tokens + scheduler_output.num_scheduled_tokens[req_id]
                yield req_id, new_block_ids and new_block_ids[0], is_resumed, num_computed

    def end_signing(self, req_id: str) -> None:
        if self._book is not None and self._to_sign.pop(req_id, None) is not None:
            self._book.end_prompt(req_id)


class SigningWorker(NixlPullConnectorWorker):
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._is_signing = bool(
            vllm_config.kv_transfer_config.get_from_extra_config("is_kv_digest_enabled", False)
        )
        self._digest: KvDigest | None = None
        self._to_compare: dict[str, TaggedBlocks] = {}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._is_signing:
            super().register_kv_caches(kv_caches)
            return
        with registered_table(self, kv_caches) as (self._digest, caches_and_table):
            super().register_kv_caches(caches_and_table)
        self.device_kv_caches = kv_caches

    @property
    def num_layer_regions(self) -> int:
        """Regions that hold KV."""
        num_regions: int = self.num_regions
        return num_regions - self._is_signing

    def sign(self, orders: DigestOrders) -> None:
        """Blocks whose KV is computed (queued, on a GPU), before anybody is told so."""
        for blocks in orders.to_sign:
            assert self._digest is not None
            self._digest.sign(blocks)

    def expect(self, orders: DigestOrders) -> None:
        self._to_compare.update(orders.to_compare)

    def is_intact(self, req_id: str) -> bool:
        """Whether what has arrived is what was signed. Once per request."""
        blocks = self._to_compare.pop(req_id, None)
        if self._digest is None or blocks is None:
            return True
        if wrong := self._digest.differing(blocks):
            logger.error(
                "kv differs from its digest: request_id=%s num_blocks=%d of %d",
                req_id, len(wrong), len(blocks.block_ids),
            )  # fmt: skip
            self.xfer_stats.data["num_failed_transfers"].append(DIFFERS)
        return not wrong

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done: set[str]
        failed: set[str]
        done, failed = super()._pop_done_transfers(transfers)
        failed |= {req_id for req_id in done - failed if not self.is_intact(req_id)}
        return done, failed

    def get_transfer_results(self) -> KVConnectorTransferResults:
        results = super().get_transfer_results()
        for req_id in results.finished_recving:
            self._to_compare.pop(req_id, None)
        return results


@contextmanager
def registered_table(
    worker: Any, kv_caches: Mapping[str, torch.Tensor]
) -> Iterator[tuple[KvDigest, dict[str, torch.Tensor]]]:
    """The digest of these caches, and the caches with its table for `register_kv_caches`.

    Raises ValueError, a sentence: this model's KV cannot be signed.
    """
    if reason := _reason_not_to_sign(worker):
        raise ValueError(f"--kv-digest is not possible here: {reason}")
    (group,) = worker.kv_cache_config.transfer_groups
    names = [name for name in kv_caches if name in worker._layer_specs]
    spec = worker._layer_specs[names[0]]
    layers = [
        words_of(
            kv_caches[name],
            num_blocks=worker.num_blocks,
            block_bytes=spec.page_size_bytes,
            num_heads=spec.num_kv_heads,
        )
        for name in sorted(names)
    ]
    table = torch.zeros((worker.num_blocks, spec.num_kv_heads), dtype=torch.int64, device=layers[0].device)
    worker._layer_specs[TABLE_LAYER] = SimpleNamespace(page_size_bytes=spec.num_kv_heads * WORD_BYTES)
    group.layer_names.append(TABLE_LAYER)
    try:
        yield KvDigest(layers, table), {**kv_caches, TABLE_LAYER: table}
    finally:
        group.layer_names.remove(TABLE_LAYER)
        del worker._layer_specs[TABLE_LAYER]
    _check_regions(worker, layers)


def _reason_not_to_sign(worker: Any) -> str | None:
    page_sizes = {spec.page_size_bytes for spec in worker._layer_specs.values()}
    reasons = {
        "the KV of this model is staged in host memory": worker.use_host_buffer,
        "this model has state-space layers": worker._has_mamba,
        "this model shares one latent KV between heads (MLA)": worker.use_mla,
        "this model has several groups of KV blocks": len(worker.kv_cache_config.transfer_groups) != 1,
        "its layers have blocks of different sizes": len(page_sizes) != 1,
        "a block is several kernel blocks": worker._physical_blocks_per_logical_kv_block != 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _check_regions(worker: Any, layers: list[torch.Tensor]) -> None:
    """What is hashed is what is transferred, byte by byte."""
    regions = list(
        zip(
            worker.kv_caches_base_addr[worker.engine_id][worker.tp_rank],
            worker.block_len_per_layer,
            worker.block_stride_per_layer,
            strict=True,
        )
    )
    *caches, table = regions
    hashed = {
        (layer.data_ptr(), layer.shape[1] * layer.shape[2] * WORD_BYTES, layer.stride(0) * WORD_BYTES)
        for layer in layers
    }
    if set(caches) != hashed or table[1] != layers[0].shape[1] * WORD_BYTES:
        raise ValueError("--kv-digest is not possible here: vLLM transfers KV in other pieces than layers")
