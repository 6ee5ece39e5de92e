"""Check whether an adapter matches a model. One error lists every mismatch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.peft_keys import LoraWeights, TokenEmbeddings
from lora_kit.errors import AdapterError, BaseMismatchError, format_list
from lora_kit.targets.coverage import Coverage, survey_adapter
from lora_kit.targets.fingerprint import list_base_mismatches
from lora_kit.targets.layer_target import LayerTarget
from lora_kit.targets.match import Modules, named_layers
from lora_kit.targets.rename_command import suggest_conversion
from lora_kit.targets.token_rows import TokenTarget

logger = logging.getLogger(__name__)


def match_adapter(
    name: str,
    adapter: Adapter,
    model: nn.Module,
    *,
    dtype: torch.dtype,
    allow: Collection[str] = (),
    modules: Modules | None = None,
) -> Coverage:
    """Return what an adapter covers in a model, after checking that the two match.

    Args:
        name: of the adapter, for messages.
        dtype: in which the tensors are to be kept.
        allow: `other-base` is accepted where it is in it, and an error otherwise. Names in the config that match
            nothing in the model are logged as a warning unless `unmatched-targets` is in it.
        modules: those of the model, where the caller has listed them.

    Raises:
        AdapterError: a mismatch; the message lists them all.
        BaseMismatchError: the adapter was made for another base.
    """
    modules = list(named_layers(model)) if modules is None else modules
    coverage = survey_adapter(model, adapter, modules)
    mismatches = _find_mismatches(adapter, dict(modules), coverage, dtype)
    if mismatches:
        count = sum(target.key in adapter.all_pairs() for target in coverage.targets)
        total = len(coverage.targets)
        head = f"{name!r} does not match this model: {count} of {total} covered layers have LoRA weights"
        mismatches += [f"nothing in the model matches {entry}" for entry in coverage.unmatched]
        raise AdapterError("\n  ".join([head, *mismatches]), hint=suggest_conversion(adapter, model))
    if coverage.unmatched and "unmatched-targets" not in allow:
        # Every tensor has its place: a list that is meant for several models, as PEFT's of heads is.
        logger.warning("%s: nothing in the model matches %s", name, format_list(coverage.unmatched))
    _check_base(name, adapter, modules, coverage, allow)
    return coverage


def _check_base(name: str, adapter: Adapter, modules: Modules, coverage: Coverage, allow: Collection[str]) -> None:
    """Raise BaseMismatchError where an adapter was made for another base; warn where `allow` accepts it."""
    if adapter.base is None:
        logger.info("%s: the adapter does not say which base it was made for", name)
        return
    # Rows that were added for new tokens are random until they are trained, so two resized bases differ there.
    mismatches = "; ".join(list_base_mismatches(adapter.base, modules, ignore=coverage.replaced))
    if mismatches and "other-base" not in allow:
        made_for = adapter.base.get("name") or "another base"
        raise BaseMismatchError(
            f"{name!r} was made for {made_for}, and this is another base: {mismatches}",
            hint="load it on its own base, or allow 'other-base'",
        )
    if mismatches:
        logger.warning("%s: another base than it was made for: %s", name, mismatches)


def _find_mismatches(
    adapter: Adapter, present: Mapping[str, nn.Module], coverage: Coverage, dtype: torch.dtype
) -> list[str]:
    """List how an adapter's tensors differ from what its config covers in a model.

    Args:
        present: modules of the model by path.
        coverage: of the adapter's config in this model.
        dtype: in which the tensors are to be kept.
    """
    skipped, weights = dict(coverage.skipped), adapter.all_pairs()
    expected = {target.key: target for target in coverage.targets}
    missing = expected.keys() - weights.keys()
    return sorted(
        [
            *(f"the file has no LoRA weights for {path}, which the config covers" for path in missing),
            *(
                message
                for path, lora in weights.items()
                for message in _find_lora_mismatches(path, lora, expected.get(path) or skipped.get(path), present)
            ),
            *_find_saved_mismatches(adapter.saved(), coverage.saved, present),
            *(coverage.problems or _find_token_mismatches(adapter.tokens(), coverage.tokens)),
            *_find_copy_mismatches(adapter.base_copies(), present),
            *_find_overflows(adapter.tensors, dtype),
        ]
    )


def select_module_tensors(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors of one module, by their names inside it."""
    return {key.removeprefix(path + "."): tensor for key, tensor in tensors.items() if key.startswith(path + ".")}


def _find_lora_mismatches(
    path: str, lora: LoraWeights, target: LayerTarget | str | None, present: Mapping[str, nn.Module]
) -> list[str]:
    """List how the LoRA weights of one layer differ from what the config covers there; at most one message.

    Args:
        target: what the config covers there, or the reason why the layer cannot have LoRA weights.
    """
    if isinstance(target, str):
        return [f"{path} cannot have LoRA weights: {target}"]
    if target is None and path not in present:
        return [f"the model has no module {path}"]
    if target is None:
        return [f"the file has LoRA weights for {path}, which the config does not cover"]
    if lora.kind != target.kind:
        return [f"{path}: LoRA weights for a {lora.kind}, but the model has a {target.kind}"]
    if (lora.a.shape[1], lora.b.shape[0]) != (target.in_features, target.out_features):
        shapes = f"A {tuple(lora.a.shape)} B {tuple(lora.b.shape)}"
        return [f"{path}: {shapes}, but the layer has {target.in_features} inputs and {target.out_features} outputs"]
    if lora.a.shape[2:] != target.kernel:
        return [f"{path}: a kernel of {tuple(lora.a.shape[2:])}, but the layer's is {target.kernel}"]
    if lora.a.shape[0] != target.rows:
        return [f"{path}: A has {lora.a.shape[0]} rows, but {target.experts} experts of rank {target.rank} are covered"]
    return []


def _find_token_mismatches(tokens: Mapping[str, TokenEmbeddings], targets: Sequence[TokenTarget]) -> list[str]:
    """List how the token embeddings of an adapter differ from those that its config covers."""
    expected = {target.path: target for target in targets}
    missing, extra = expected.keys() - tokens.keys(), tokens.keys() - expected.keys()
    mismatches = [f"the file has no token embeddings for {path}" for path in missing]
    mismatches += [f"the file has token embeddings for {path}, which the config does not cover" for path in extra]
    return mismatches + [
        f"{path}: embeddings of {tokens[path].rows.shape[1]} features, but the table has {expected[path].features}"
        for path in tokens.keys() & expected.keys()
        if tokens[path].rows.shape[1] != expected[path].features
    ]


def _find_saved_mismatches(
    saved: Mapping[str, Tensor], paths: Sequence[str], present: Mapping[str, nn.Module]
) -> list[str]:
    """List how the tensors of `modules_to_save` differ from those of the model's modules."""
    own = {f"{path}.{key}": tensor for path in paths for key, tensor in present[path].state_dict().items()}
    mismatches = [f"the file has no {key}, which modules_to_save names" for key in own.keys() - saved.keys()]
    mismatches += [
        f"the file has {key}, which is in no module that modules_to_save names" for key in saved.keys() - own.keys()
    ]
    return mismatches + [
        f"{key} is {_describe_tensor(saved[key])}, but the model has {_describe_tensor(own[key])}"
        for key in own.keys() & saved.keys()
        if _describe_tensor(own[key]) != _describe_tensor(saved[key])
    ]


def _describe_tensor(tensor: Tensor) -> str:
    """Return the shape, and the dtype unless it is a floating one: those are cast."""
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} of {tensor.dtype}"


def _find_overflows(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """List the tensors with values beyond the range of fp16, where they are to be kept in fp16."""
    if dtype != torch.float16:
        return []
    largest = torch.finfo(dtype).max
    return [
        f"{key} has values beyond {largest:g}, the largest of {dtype}"
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.abs().max() > largest
    ]


def _find_copy_mismatches(copies: Mapping[str, Tensor], present: Mapping[str, nn.Module]) -> list[str]:
    """List the base weights in an adapter's file that differ from the base's own.

    An adapter with another embedding table is not an update of this base. Of a meta model only the shapes are compared.
    """
    mismatches = []
    for path, copied in copies.items():
        own = getattr(present.get(path), "weight", None)
        if own is None or own.shape != copied.shape or not (own.is_meta or _is_same_weight(own.detach().cpu(), copied)):
            mismatches.append(f"the file has a weight for {path} that is not the base's")
    return mismatches


def _is_same_weight(own: Tensor, copied: Tensor) -> bool:
    """Whether two tensors are one weight, each in its own dtype: they are equal in the coarser one."""
    if not (own.is_floating_point() and copied.is_floating_point()):
        return own.dtype == copied.dtype and torch.equal(own, copied)
    coarse = max(own.dtype, copied.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if {own.dtype, copied.dtype} == {torch.float16, torch.bfloat16}:
        # Both may be roundings of a finer weight, and fp16 has a larger smallest step.
        eps, step = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float16).smallest_normal * 2**-10
        return torch.allclose(own.float(), copied.float(), rtol=eps, atol=step)
    return torch.equal(own.to(coarse), copied.to(coarse))
