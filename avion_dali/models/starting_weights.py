"""Starting from existing weights: open a file or a published model, and fill a model from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from avion_dali.config import Activation, Normalization, TemporalResize, TrainConfig
from avion_dali.config.plain import require_sane_counts, require_types
from avion_dali.contracts import UserError
from avion_dali.models.convert import identify, to_ours
from avion_dali.models.find_facts import facts_of_config, guessed_facts
from avion_dali.models.safetensors_files import HEADER_KEY, read_safetensors
from avion_dali.models.torch_files import find_state_dict, read_torch_file
from avion_dali.models.weight_facts import Family, WeightFacts
from avion_dali.models.weight_fitting import fit_weights
from avion_dali.wording import few, shown

OPEN_CLIP_PREFIX: Final = "open_clip:"


@dataclass(frozen=True)
class StartWeights:
    """Weights to start from.

    Args:
        state: our name to tensor.
        facts: what they are.
        source: where they came from, for messages.
        left_over: entries of the file that no model here has, name to reason.
        config: configuration of the training as plain values, in this project's own files; else empty.
        classes: names of the head's classes in label order, where the file has them.
    """

    state: dict[str, Tensor]
    facts: WeightFacts
    source: str
    left_over: dict[str, str]
    config: dict[str, Any]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartReport:
    """What a model took from weights.

    Args:
        source: where they came from.
        loaded: parameters filled from the weights.
        resized: which of them were changed in shape, in words.
        fresh: parameters that stay as the model was created, name to reason.
        unused: entries that the model has no use for, name to reason.
        warnings: where the run differs from the training of the weights, in words.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: dict[str, str]
    unused: dict[str, str]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return a few lines for a log: counts, reasons, names."""
        lines = [f"{self.source}: {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} parameters loaded"]
        lines += [f"  resized: {change}" for change in self.resized]
        lines += [f"  fresh: {text}" for text in by_reason(self.fresh)]
        lines += [f"  unused: {text}" for text in by_reason(self.unused)]
        return lines + [f"  warning: {text}" for text in self.warnings]


def by_reason(names: Mapping[str, str]) -> list[str]:
    """Put names that have the same reason together, in words.

    Args:
        names: name to reason.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in names.items():
        groups.setdefault(reason, []).append(name)
    return [f"{few(group)} ({reason})" for reason, group in groups.items()]


def open_start(weights: str) -> StartWeights:
    """Open weights by the name a configuration gives them.

    Args:
        weights: a file (of this project, AVION, LaViLa, EgoVLP, VideoMAE, OpenAI or open_clip; `torch.save` or
            safetensors), `open_clip:NAME/PRETRAINED`, which downloads what is not cached, or
            `open_clip:NAME//FILE`, whose NAME says which activation the weights in FILE were trained with.

    Raises:
        UserError: when they cannot be downloaded, read or used; says what is supported.
    """
    if weights.startswith(OPEN_CLIP_PREFIX):
        path, known = _find_open_clip(weights)
        state, _, more = _read_file(path)
        family = _identified(state, source=weights)
        if family != "open_clip":
            raise UserError(f"{weights}: {path} holds weights of {family}; name the file without open_clip:")
        return _converted(state, "open_clip", source=weights, known={**known, **more})
    state, header, known = _read_file(Path(weights))
    if header:
        return _own(state, header, source=weights)
    return _converted(state, _identified(state, source=weights), source=weights, known=known)


def _identified(state: Mapping[str, Tensor], *, source: str) -> Family:
    try:
        return identify(state)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _converted(
    state: Mapping[str, Tensor], family: Family, *, source: str, known: Mapping[str, Any]
) -> StartWeights:
    try:
        ours, left_over = to_ours(state, family)
        facts = guessed_facts(ours, family, known=known)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return StartWeights(ours, facts, source, left_over, config={})


def _own(state: Mapping[str, Tensor], header: Mapping[str, Any], *, source: str) -> StartWeights:
    """Weights that this project wrote; its header says what they are, so that nothing is guessed."""
    config, told = _checked_header(header, source=source)
    if header.get("layout"):  # written in the names of another project
        known: dict[str, Any] = {name: told[name] for name in _TOLD_BY_HEADER if name in told}
        return _converted(state, _identified(state, source=source), source=source, known=known)
    ours, left_over = to_ours(state, "avion_dali")
    if not config and not told:
        raise UserError(f"{source} does not say which model it holds; give a file that a training exported")
    try:
        # Weights of dimensions that no model.size has are described by the facts alone.
        facts = facts_of_config(config, ours) if config else WeightFacts(**{**told, "family": "avion_dali"})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except TypeError as error:
        raise UserError(f"{source}: its header is of another version: {error}") from error
    return StartWeights(ours, facts, source, left_over, dict(config), tuple(header.get("classes", ())))


def _checked_header(header: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the facts that a header tells, once their values have the right types."""
    config, told, classes = header.get("config", {}), header.get("weights", {}), header.get("classes", ())
    try:
        require_types(TrainConfig, config, name="config")
        require_types(WeightFacts, told, name="weights")
        if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"classes are {shown(classes)}, not a list of names")
        for values in (told, config.get("data", {}), config.get("model", {})):
            require_sane_counts(values)
    except UserError as error:
        raise UserError(
            f"{source}: its header is damaged, or of another version: {error}; get the file again"
        ) from error
    return dict(config), dict(told)


_TOLD_BY_HEADER: Final = ("activation", "norm_eps", "normalization", "num_frames", "frame_size")


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """State dict, this project's header (empty for files of others), and what else the file says of itself."""
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        return state, header, {}
    content = read_torch_file(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind.startswith(HEADER_KEY):
        # The running average, where there is one, is what the training evaluated.
        state = {**find_state_dict(content, source=str(path)), **content.get("average", {})}
        return state, {name: content[name] for name in ("config", "classes") if name in content}, {}
    state = find_state_dict(content, source=str(path))
    # Only OpenAI's own files carry this constant, and all their models were trained with QuickGELU.
    return state, {}, {"activation": "quick_gelu"} if "input_resolution" in state else {}


def _find_open_clip(weights: str) -> tuple[Path, dict[str, Any]]:
    """The file of a published model, downloaded when it is not cached, and what its name says."""
    name, _, rest = weights.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if not name or not rest:
        raise UserError(
            f"model.weights = {weights!r}: write open_clip:NAME/PRETRAINED, such as open_clip:ViT-B-16/openai, "
            "or open_clip:NAME//path/to/file"
        )
    quick: Activation = "quick_gelu" if name.endswith("-quickgelu") else "gelu"
    if rest.startswith("/"):
        absolute = Path(rest)
        return absolute if absolute.is_file() else Path(rest.lstrip("/")), {"activation": quick}
    from open_clip import pretrained  # imported here: it takes seconds

    published = pretrained.get_pretrained_cfg(name, rest)
    if not published:
        tags = pretrained.list_pretrained_tags_by_model(name)
        has = f"open_clip has {name} as: {', '.join(tags)}" if tags else f"open_clip knows no pretrained {name}"
        raise UserError(f"model.weights = {weights!r}: {has}")
    try:
        path = Path(pretrained.download_pretrained(published))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{weights} could not be downloaded ({error}). Where there is no network, copy the file here and "
            f"set model.weights to open_clip:{name}//path/to/file"
        ) from error
    own_statistics = tuple(published.get("mean", ())) == tuple(pretrained.OPENAI_DATASET_MEAN)
    return path, {
        "activation": "quick_gelu" if published.get("quick_gelu") else quick,
        "normalization": "openai" if own_statistics else None,
    }


def contradictions(
    facts: WeightFacts, *, normalization: Normalization | None = None, activation: Activation | None = None
) -> tuple[str, ...]:
    """List where a run differs from the training of its weights, in words.

    Args:
        facts: what the weights are.
        normalization: pixel statistics of the run; None to not compare them.
        activation: activation of the run's model; None to not compare it.
    """
    found = []
    if normalization and facts.normalization and normalization != facts.normalization:
        found.append(
            f"the weights were trained with data.normalization {facts.normalization}, "
            f"this run uses {normalization}"
        )
    if activation and facts.activation and activation != facts.activation:
        found.append(
            f"the weights were trained with model.activation {facts.activation}, this run uses {activation}"
        )
    if activation and not facts.activation:
        found.append(
            f"the file does not tell the activation of its training, this run uses {activation}; "
            "open_clip:NAME//FILE tells it by the name"
        )
    return tuple(found)


def apply_start(
    model: nn.Module,
    start: StartWeights,
    *,
    temporal_resize: TemporalResize,
    normalization: Normalization | None = None,
    activation: Activation | None = None,
) -> StartReport:
    """Fill a model from weights; on an error the model is unchanged.

    Args:
        model: a dual encoder, classifier or masked-video model, just created and not wrapped.
        start: from `open_start`.
        temporal_resize: how frame positions are fitted to fewer frames; for more they are interpolated.
        normalization: pixel statistics of the run, to be compared with those of the weights.
        activation: activation of the model, to be compared with that of the weights.

    Returns:
        What was loaded, what stayed fresh and what was left over, each with its reason.

    Raises:
        UserError: when an entry is missing, left over or of another shape and no rule allows it; names it.
    """
    try:
        fit = fit_weights(model, start.state, start.facts, temporal_resize=temporal_resize)
    except UserError as error:
        raise UserError(f"{start.source}: {error}") from error
    if fit.problems:
        embed_dim = start.facts.embed_dim
        hint = f" (their model.embed_dim is {embed_dim})" if embed_dim else ""
        raise UserError(
            f"{start.source} does not fit the model: {few(fit.problems)}. Use the model settings the weights "
            f"were made with{hint}"
        )
    model.load_state_dict({**model.state_dict(), **fit.tensors})
    return StartReport(
        source=start.source,
        loaded=tuple(fit.tensors),
        resized=tuple(fit.resized),
        fresh=fit.fresh,
        unused={**start.left_over, **fit.unused},
        warnings=contradictions(start.facts, normalization=normalization, activation=activation),
    )
