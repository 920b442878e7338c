"""Opens initial weights, from a file or a published model, and loads them into a model."""

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
    """Initial weights.

    Args:
        state: our name to tensor.
        facts: facts about the weights.
        source: file or name of the weights, for messages.
        left_over: entries of the file that no model uses, name to reason.
        config: configuration of the training as plain values; empty in files of other projects.
        classes: names of the head's classes in label order, if the file has them.
    """

    state: dict[str, Tensor]
    facts: WeightFacts
    source: str
    left_over: dict[str, str]
    config: dict[str, Any]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartReport:
    """Report about the loading of weights into a model.

    Args:
        source: file or name of the weights.
        loaded: parameters that were loaded from the weights.
        resized: descriptions of the parameters whose shape was changed.
        fresh: parameters that keep their initial values, name to reason.
        unused: entries that the model does not use, name to reason.
        warnings: differences between the run and the training of the weights, in words.
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
    """Group names by their reason and describe each group.

    Args:
        names: name to reason.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in names.items():
        groups.setdefault(reason, []).append(name)
    return [f"{few(group)} ({reason})" for reason, group in groups.items()]


def open_start(weights: str) -> StartWeights:
    """Open the weights that a configuration names.

    Args:
        weights: a file (of this project, AVION, LaViLa, EgoVLP, VideoMAE, OpenAI or open_clip; `torch.save` or
            safetensors), `open_clip:NAME/PRETRAINED`, which downloads the file unless it is cached, or
            `open_clip:NAME//FILE`, whose NAME determines the activation of the weights in FILE.

    Raises:
        UserError: when they cannot be downloaded, read or used; lists what is supported.
    """
    if weights.startswith(OPEN_CLIP_PREFIX):
        path, known = _find_open_clip(weights)
        state, _, more = _read_file(path)
        family = _identified(state, source=weights)
        if family != "open_clip":
            raise UserError(f"{weights}: {path} contains weights of {family}; give the file without open_clip:")
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
    """Open weights that this project wrote, whose header contains all facts about them."""
    config, described = _checked_header(header, source=source)
    if header.get("layout"):  # written in the names of another project
        known: dict[str, Any] = {name: described[name] for name in _KNOWN_FROM_HEADER if name in described}
        return _converted(state, _identified(state, source=source), source=source, known=known)
    ours, left_over = to_ours(state, "avion_dali")
    if not config and not described:
        raise UserError(f"{source} does not describe its model; give a file that a training exported")
    try:
        # If no model.size has the dimensions of the weights, the file has facts but no configuration.
        facts = (
            facts_of_config(config, ours) if config else WeightFacts(**{**described, "family": "avion_dali"})
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except TypeError as error:
        raise UserError(f"{source}: its header belongs to another version of avion_dali: {error}") from error
    return StartWeights(ours, facts, source, left_over, dict(config), tuple(header.get("classes", ())))


def _checked_header(header: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the facts in a header, once their values have the right types."""
    config, described, classes = header.get("config", {}), header.get("weights", {}), header.get("classes", ())
    try:
        require_types(TrainConfig, config, name="config")
        require_types(WeightFacts, described, name="weights")
        if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"classes are {shown(classes)}, not a list of names")
        for values in (described, config.get("data", {}), config.get("model", {})):
            require_sane_counts(values)
    except UserError as error:
        raise UserError(
            f"{source}: its header is damaged or belongs to another version: {error}; obtain the file again"
        ) from error
    return dict(config), dict(described)


_KNOWN_FROM_HEADER: Final = ("activation", "norm_eps", "normalization", "num_frames", "frame_size")


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return the state dict, this project's header (empty in other files), and further facts from the file."""
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        return state, header, {}
    content = read_torch_file(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind.startswith(HEADER_KEY):
        # The running average, if there is one, replaces the weights, because the training evaluates it.
        state = {**find_state_dict(content, source=str(path)), **content.get("average", {})}
        return state, {name: content[name] for name in ("config", "classes") if name in content}, {}
    state = find_state_dict(content, source=str(path))
    # Only OpenAI's own files have this constant, and all their models were trained with QuickGELU.
    return state, {}, {"activation": "quick_gelu"} if "input_resolution" in state else {}


def _find_open_clip(weights: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of a published model, downloading it if needed, and the facts implied by its name."""
    name, _, rest = weights.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if not name or not rest:
        raise UserError(
            f"model.weights = {weights!r}: use open_clip:NAME/PRETRAINED, such as open_clip:ViT-B-16/openai, "
            "or open_clip:NAME//path/to/file"
        )
    quick: Activation = "quick_gelu" if name.endswith("-quickgelu") else "gelu"
    if rest.startswith("/"):
        absolute = Path(rest)
        return absolute if absolute.is_file() else Path(rest.lstrip("/")), {"activation": quick}
    from open_clip import pretrained  # imported here because it takes seconds

    published = pretrained.get_pretrained_cfg(name, rest)
    if not published:
        tags = pretrained.list_pretrained_tags_by_model(name)
        has = f"open_clip has {name} as: {', '.join(tags)}" if tags else f"open_clip has no pretrained {name}"
        raise UserError(f"model.weights = {weights!r}: {has}")
    try:
        path = Path(pretrained.download_pretrained(published))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{weights} could not be downloaded ({error}). Without a network, copy the file to this machine "
            f"and set model.weights to open_clip:{name}//path/to/file"
        ) from error
    own_statistics = tuple(published.get("mean", ())) == tuple(pretrained.OPENAI_DATASET_MEAN)
    return path, {
        "activation": "quick_gelu" if published.get("quick_gelu") else quick,
        "normalization": "openai" if own_statistics else None,
    }


def contradictions(
    facts: WeightFacts, *, normalization: Normalization | None = None, activation: Activation | None = None
) -> tuple[str, ...]:
    """Describe the differences between a run and the training of its weights.

    Args:
        facts: facts about the weights.
        normalization: pixel statistics of the run; None skips their comparison.
        activation: activation of the run's model; None skips its comparison.
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
            f"the file does not specify the activation of its training, this run uses {activation}; "
            "open_clip:NAME//FILE specifies it by the name"
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
    """Load weights into a model; on an error the model is unchanged.

    Args:
        model: a newly created dual encoder, classifier or masked-video model, without a wrapper.
        start: output of `open_start`.
        temporal_resize: how frame positions are adapted to fewer frames; for more frames they are interpolated.
        normalization: pixel statistics of the run, to be compared with those of the weights.
        activation: activation of the model, to be compared with that of the weights.

    Returns:
        The loaded, newly initialized and unused entries, the last two with reasons.

    Raises:
        UserError: when an entry is missing, unexpected or of another shape and no rule allows it; names it.
    """
    try:
        fit = fit_weights(model, start.state, facts=start.facts, temporal_resize=temporal_resize)
    except UserError as error:
        raise UserError(f"{start.source}: {error}") from error
    if fit.problems:
        embed_dim = start.facts.embed_dim
        hint = f" (their model.embed_dim is {embed_dim})" if embed_dim else ""
        raise UserError(
            f"{start.source} does not fit the model: {few(fit.problems)}. Use the model settings with which "
            f"the weights were trained{hint}"
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
