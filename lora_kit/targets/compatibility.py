"""Whether an adapter fits a model: every misfit in words, so that one error can list them all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import LoraWeights, TokenEmbeddings
from lora_kit.errors import AdapterError, BaseMismatchError
from lora_kit.targets.coverage import Coverage, LayerTarget, survey_coverage
from lora_kit.targets.fingerprint import list_base_mismatches
from lora_kit.targets.match import named_layers
from lora_kit.targets.token_rows import TokenTarget

logger = logging.getLogger(__name__)


def match_adapter(
    name: str, adapter: Adapter, model: nn.Module, *, dtype: torch.dtype, allow: Collection[str] = ()
) -> Coverage:
    """What an adapter covers in a model.

    Args:
        name: for messages.
        dtype: what the tensors are to be held in.
        allow: of `other-base`, `unmatched-targets`: what may pass instead of being refused.

    Raises:
        AdapterError: with every misfit. BaseMismatchError: it was made for another base.
    """
    coverage = survey_coverage(model, adapter.config)
    told = _find_mismatches(adapter, model, coverage, dtype)
    if "unmatched-targets" not in allow:
        told += [f"nothing in the model matches {entry}" for entry in coverage.unmatched]
    if told:
        fitting = sum(target.key in adapter.all_pairs() for target in coverage.targets)
        head = f"{name!r} does not fit this model: {fitting} of {len(coverage.targets)} covered layers have a pair"
        only_unmatched = len(told) == len(coverage.unmatched)
        hint = "allow 'unmatched-targets' if its list of names is meant for several models" if only_unmatched else ""
        raise AdapterError("\n  ".join([head, *told]), hint=hint)
    _check_base(name, adapter, model, coverage, allow)
    return coverage


def _check_base(name: str, adapter: Adapter, model: nn.Module, coverage: Coverage, allow: Collection[str]) -> None:
    if adapter.base is None:
        logger.info("%s: it does not say which base it was made for", name)
        return
    # Rows that a tokenizer got room for are random until they are trained, in one resized base and in another.
    told = list_base_mismatches(adapter.base, model, ignore=coverage.replaced)
    if told and "other-base" not in allow:
        made_for = adapter.base.get("name") or "another base"
        raise BaseMismatchError(
            f"{name!r} was made for {made_for}, and this is another base: {'; '.join(told)}",
            hint="load it on its own base, or allow 'other-base'",
        )
    if told:
        logger.warning("%s: another base than it was made for: %s", name, "; ".join(told))


def _find_mismatches(adapter: Adapter, model: nn.Module, coverage: Coverage, dtype: torch.dtype) -> list[str]:
    """How an adapter's tensors differ from what its config covers in a model; empty where it fits.

    Args:
        coverage: of the adapter's config in this model.
        dtype: what the tensors are to be held in.
    """
    present = dict(named_layers(model))
    pairs = adapter.all_pairs()
    expected = {target.key: target for target in coverage.targets}
    told = [f"the file has nothing for {path}, which the config covers" for path in expected.keys() - pairs.keys()]
    for path, pair in pairs.items():
        told += _find_lora_mismatches(path, pair, expected.get(path), present)
    told += _find_saved_mismatches(adapter.saved(), coverage.saved, present)
    told += coverage.problems or _find_token_mismatches(adapter.tokens(), coverage.tokens)
    told += _find_copy_mismatches(adapter.base_copies(), present)
    told += _find_overflows(adapter.tensors, dtype)
    return sorted(told)


def select_module_tensors(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it."""
    return {key.removeprefix(path + "."): tensor for key, tensor in tensors.items() if key.startswith(path + ".")}


def _find_lora_mismatches(
    path: str, pair: LoraWeights, target: LayerTarget | None, present: Mapping[str, nn.Module]
) -> list[str]:
    if target is None and path not in present:
        return [f"the model has no module {path}"]
    if target is None:
        return [f"the config does not cover {path}, of which the file has a pair"]
    if pair.kind != target.kind:
        return [f"{path}: a pair for a {pair.kind}, and the model has a {target.kind}"]
    if (pair.a.shape[1], pair.b.shape[0]) != (target.in_features, target.out_features):
        shapes = f"A {tuple(pair.a.shape)} B {tuple(pair.b.shape)}"
        return [f"{path}: {shapes} for a layer of {target.in_features} inputs and {target.out_features} outputs"]
    if pair.a.shape[2:] != target.kernel:
        return [f"{path}: a kernel of {tuple(pair.a.shape[2:])} for one of {target.kernel}"]
    if pair.a.shape[0] != target.rows:
        return [f"{path}: pairs of {pair.a.shape[0]} rows for {target.experts} experts of rank {target.rank}"]
    return []


def _find_token_mismatches(tokens: Mapping[str, TokenEmbeddings], targets: Sequence[TokenTarget]) -> list[str]:
    """How rows of embeddings differ from those that the config covers."""
    expected = {target.path: target for target in targets}
    told = [f"the file has no rows of tokens for {path}" for path in expected.keys() - tokens.keys()]
    told += [
        f"the config covers no rows of {path}, of which the file has some" for path in tokens.keys() - expected.keys()
    ]
    return told + [
        f"{path}: rows of {tokens[path].rows.shape[1]} features for a table of {expected[path].features}"
        for path in tokens.keys() & expected.keys()
        if tokens[path].rows.shape[1] != expected[path].features
    ]


def _find_saved_mismatches(
    saved: Mapping[str, Tensor], paths: Sequence[str], present: Mapping[str, nn.Module]
) -> list[str]:
    """How the tensors of modules saved whole differ from those modules."""
    own = {f"{path}.{key}": tensor for path in paths for key, tensor in present[path].state_dict().items()}
    told = [f"{key} is missing, which modules_to_save promises" for key in own.keys() - saved.keys()]
    told += [f"the model has no saved module for {key}" for key in saved.keys() - own.keys()]
    return told + [
        f"{key} is {_describe_tensor(saved[key])}, the model has {_describe_tensor(own[key])}"
        for key in own.keys() & saved.keys()
        if _describe_tensor(own[key]) != _describe_tensor(saved[key])
    ]


def _describe_tensor(tensor: Tensor) -> str:
    """Shape, and the dtype where it is none of the floating ones, which are cast."""
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} of {tensor.dtype}"


def _find_overflows(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Tensors with values beyond the range of fp16, where that is what they would be held in."""
    if dtype != torch.float16:
        return []
    largest = torch.finfo(dtype).max
    return [
        f"{key} holds values beyond {largest:g}, the largest of {dtype}"
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.abs().max() > largest
    ]


def _find_copy_mismatches(copies: Mapping[str, Tensor], present: Mapping[str, nn.Module]) -> list[str]:
    """Base weights an adapter carries must be the base's own: another table is not an update of this one."""
    told = []
    for path, copied in copies.items():
        own = getattr(present.get(path), "weight", None)
        if own is None or own.shape != copied.shape or not torch.equal(own.detach().cpu(), copied.to(own.dtype)):
            told.append(f"the file carries a weight for {path} that is not the base's")
    return told
