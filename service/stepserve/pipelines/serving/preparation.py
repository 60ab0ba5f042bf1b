"""What is found out about a model before it serves, on the thread that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from stepserve.engine.loop.engine import Engine
from stepserve.engine.loop.execution import DEFAULT_EXECUTION, Execution
from stepserve.engine.loop.side_stream import CudaSideStream
from stepserve.engine.loop.timing import timing_for
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.cuda_graphs import CudaRecording
from stepserve.pipelines.modules.parking import PROMPTS_BYTES, ParkingOptions
from stepserve.pipelines.modules.third_party.pinned_noise import can_keep_on_host
from stepserve.pipelines.modules.third_party.qwen_text_counts import leave_counts_out
from stepserve.pipelines.modules.wrappers import Wrappers
from stepserve.pipelines.probing.guidance_cost import with_probed_guidance
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.probed_tasks import with_probed_steps, with_probed_tasks
from stepserve.pipelines.probing.row_layers import find_row_layers
from stepserve.pipelines.probing.shape_rules import SizeRules
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, ProbeRequest
from stepserve.pipelines.probing.sharing_plan import SharingPlan, plan_sharing, row_buckets


@dataclass(frozen=True)
class SharingOptions:
    """What an operator decides about how requests share forwards.

    Args:
        fixed_rows: where images would else depend on the load in their last bits, fill forwards
            up to one row count if that cures it.
        mix_lengths: whether requests of any sizes and prompts share forwards where a model takes
            rows of different lengths.
        pad_prompts: whether texts are filled up, so that requests with any prompts share forwards.
        prompt_cache_bytes: how much is kept of each text encoder's outputs.
        plan: made before; None makes one when the engine starts.
    """

    fixed_rows: bool = True
    mix_lengths: bool = True
    pad_prompts: bool = True
    prompt_cache_bytes: int = PROMPTS_BYTES
    plan: SharingPlan | None = None


DEFAULT_SHARING = SharingOptions()


@dataclass(frozen=True)
class Preparation:
    """A model as it is served; by default one of which nothing was found out.

    Args:
        model: with capabilities that hold.
        plan: how its forwards are shared.
        wrappers: what stands around the methods of its modules.
        execution: how the engine is to run its forwards.
        probes: small requests of every task that it serves.
        shape_rules: what calls of each size need, where that is not the same for all.
    """

    model: LoadedModel
    plan: SharingPlan = field(default_factory=SharingPlan)
    wrappers: Wrappers = field(default_factory=Wrappers)
    execution: Execution = DEFAULT_EXECUTION
    probes: Sequence[ProbeRequest] = ()
    shape_rules: SizeRules | None = None


def prepare(
    model: LoadedModel, engine: Engine, adapters: AdapterCache, sharing: SharingOptions
) -> Preparation:
    """Find out how requests of a model may share forwards, and how forwards are to run.

    Run it on the engine's thread, before calls of the model's modules park.
    """
    device = model.pipeline.device
    ceiling = engine.options.row_ceiling
    if sharing.plan is None:
        # Tell what holds, not what the pipeline seems to offer.
        model = with_probed_tasks(with_probed_guidance(with_probed_steps(model)))
    probes = make_probe_requests(model, model.capabilities.tasks)
    plan = sharing.plan or plan_sharing(
        model.pipeline,
        probes,
        ceiling,
        sharing.fixed_rows,
        row_buckets(ceiling) if model.compiles else (),
        sharing.pad_prompts,
        # Compiled code takes rows of one shape.
        sharing.mix_lengths and not model.compiles,
    )
    if model.compiles:
        plan = plan.for_graphs(ceiling)
    if adapters.options.any and not plan.serial:
        adapters.mix(find_row_layers(model.pipeline, probes, plan.parking(ENOUGH_ROWS)))
    parking = plan.parking(
        ParkingOptions(
            max_rows=ceiling,
            prompt_cache_bytes=sharing.prompt_cache_bytes,
            enter=adapters.enter(),
        )
    )
    # Adapters change modules, and a graph is of a module as it was.
    records = model.cuda_graphs and not (adapters.options.any or plan.serial)
    if records:
        leave_counts_out()
    record = partial(CudaRecording, pool=torch.cuda.graph_pool_handle()) if records else None
    needs_rules = device.type != "cpu" and plan.same_bytes and not (plan.serial or model.compiles)
    rules = SizeRules(lambda: engine.row_limit, sharing.fixed_rows) if needs_rules else None
    decodes_aside = can_keep_on_host(model.pipeline, device) and not plan.serial
    execution = Execution(
        row_ceiling=parking.max_rows,
        row_limit=None if plan.has_one_row_count else parking.max_rows,
        one_at_a_time=plan.serial,
        adjust=rules,
        start_timing=timing_for(device),
        side_stream=CudaSideStream() if decodes_aside else None,
    )
    return Preparation(
        _with_plan(model, plan),
        plan,
        Wrappers(parking=parking, record=record),
        execution,
        probes,
        rules,
    )


def _with_plan(model: LoadedModel, plan: SharingPlan) -> LoadedModel:
    """The model with what its plan means for images. On the thread that will run it."""
    capabilities = replace(
        model.capabilities, same_bytes=plan.same_bytes, sharing_remark=plan.remark
    )
    if (fingerprint := capabilities.fingerprint) is not None:
        # The engine thread's own number counts.
        threads = torch.get_num_threads() if model.pipeline.device.type == "cpu" else 0
        fingerprint = replace(fingerprint, row_buckets=plan.row_policy, threads=threads)
        capabilities = replace(capabilities, fingerprint=fingerprint)
    return replace(model, capabilities=capabilities)
