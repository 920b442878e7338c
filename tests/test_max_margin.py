"""Max-margin and symmetric multi-similarity: vectors, loops over pairs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_contrastive import KEY, TEXT, VIDEO, make_batch, make_model

from avion_dali.config import MaxMarginConfig
from avion_dali.contracts import UserError
from avion_dali.objectives.max_margin import (
    MaxMargin,
    margins_to_others,
    max_margin,
    symmetric_multi_similarity,
)

GRADED = MaxMarginConfig(loss="symmetric-multi-similarity", margin=0.6, relaxation=0.1)


class TableCaptions:
    """Relevancy from a small table."""

    def __init__(self, relevancy: np.ndarray) -> None:
        self.table = relevancy.astype(np.float32)

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        return self.table[np.ix_(rows, captions)]


def random_pairs(clips: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(clips, width, generator=generator), torch.randn(clips, width, generator=generator)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_max_margin_vector():
    assert float(max_margin(margins_to_others(TEXT, VIDEO), margin=0.2)) == pytest.approx(0.586667, abs=1e-6)


def test_max_margin_against_a_loop_over_pairs():
    video, text = random_pairs()
    terms = []
    for i in range(6):
        own = cosine(video[i], text[i])
        for j in set(range(6)) - {i}:
            terms += [max(0, 0.3 - own + cosine(text[i], video[j]))]
            terms += [max(0, 0.3 - own + cosine(video[i], text[j]))]
    assert float(max_margin(margins_to_others(text, video), margin=0.3)) == pytest.approx(
        np.mean(terms), abs=1e-6
    )


def test_features_are_normalised_again():
    video, text = random_pairs()
    margins = margins_to_others(text, video)
    assert torch.allclose(margins_to_others(3 * text, 0.1 * video), margins, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(margins_to_others(text, video), margins)


def published_term(difference: float, r: float) -> float:
    """Equation 15 of arXiv 2506.14356 for one pair: gamma 0.6, tau 0.1."""
    if r > 0:
        return max(0.0, r * 0.6 - difference)
    if r < 0:
        return max(0.0, -r * 0.6 + difference)
    return max(0.0, abs(difference) - 0.1)


def published_loop(video: torch.Tensor, text: torch.Tensor, relevancy: np.ndarray) -> float:
    """The mean over all pairs of a clip or caption with a partner that is not its own."""
    terms = []
    for i in range(len(video)):
        own = cosine(video[i], text[i])
        for k in set(range(len(video))) - {i}:
            grade = relevancy[i, i]
            terms.append(published_term(own - cosine(video[i], text[k]), grade - relevancy[i, k]))
            terms.append(published_term(own - cosine(text[i], video[k]), grade - relevancy[k, i]))
    return float(np.mean(terms))


def test_symmetric_loss_against_a_loop_over_pairs():
    video, text = random_pairs()
    relevancy = np.random.default_rng(3).choice([0.0, 0.25, 0.5, 1.0], (6, 6))
    own = np.diag(relevancy)[:, None] - relevancy
    assert (own > 0).any() and (own < 0).any() and (own == 0).sum() > 6, "all three cases must occur"
    loss = symmetric_multi_similarity(
        margins_to_others(text, video), torch.tensor(relevancy, dtype=torch.float32), margin=0.6, relaxation=0.1
    )
    assert float(loss) == pytest.approx(published_loop(video, text, relevancy), abs=1e-6)


def test_binary_relevancy_reduces_the_symmetric_loss_to_max_margin():
    video, text = random_pairs()
    margins = margins_to_others(text, video)
    loss = symmetric_multi_similarity(margins, torch.eye(6), margin=0.4, relaxation=0.1)
    assert torch.allclose(loss, max_margin(margins, margin=0.4))


def test_equal_captions_push_apart_under_max_margin_only():
    """Two clips with one caption: the plain loss counts the other's as wrong, the graded one does not."""
    video, text = torch.tensor([[1.0, 0.0], [0.995, 0.1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    margins = margins_to_others(text, video)
    assert float(max_margin(margins, margin=0.2)) > 0.15
    assert float(symmetric_multi_similarity(margins, torch.ones(2, 2), margin=0.2, relaxation=0.1)) == 0


def test_rounding_of_grades_does_not_rank_equals():
    margins = margins_to_others(*random_pairs())
    grades = torch.full((6, 6), 2 / 3)
    nudged = grades + 1e-6 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    losses = [symmetric_multi_similarity(margins, g, margin=0.6, relaxation=0.1) for g in (grades, nudged)]
    assert torch.equal(*losses)


def batch_with_captions(captions: list[int] | None):
    batch = make_batch()
    batch.caption_ids = None if captions is None else np.array(captions)
    return batch


def test_objective_looks_relevancy_up_by_sample_and_caption():
    relevancy = np.random.default_rng(5).choice([0.0, 0.5, 1.0], (8, 4))
    captions = [3, 0, 1, 1, 2, 0, 3, 2]
    objective, model = MaxMargin(GRADED, "openai", TableCaptions(relevancy)), make_frozen_model()
    outputs = objective.outputs(model, batch_with_captions(captions), KEY)
    loss, report = objective.loss(outputs)
    expected = published_loop(outputs[0].detach(), outputs[1].detach(), relevancy[:, captions])
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    nearest = (outputs[0] @ outputs[1].T).argmax(dim=1) == torch.arange(8)
    assert float(report["accuracy"]) == pytest.approx(float(nearest.float().mean()))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def make_frozen_model():
    model = make_model()
    model.logit_scale.requires_grad_(False)
    return model


def test_large_ids_travel_exactly():
    batch = batch_with_captions([2**40 + 1] * 8)
    batch.sample_ids = batch.sample_ids + 35_000_000_001
    ids = MaxMargin(GRADED, "openai", TableCaptions(np.ones((1, 1)))).outputs(make_frozen_model(), batch, KEY)[
        2
    ]
    assert ids.tolist() == [[35_000_000_001 + i, 2**40 + 1] for i in range(8)]


def test_what_cannot_be_trained_is_refused():
    plain = MaxMargin(MaxMarginConfig(), "openai", None)
    graded = MaxMargin(GRADED, "openai", TableCaptions(np.ones((8, 8))))
    model = make_frozen_model()
    for captions in (None, [0, 1, 2, 3, -1, 5, 6, 7]):
        with pytest.raises(UserError, match=r"data\.text"):
            graded.outputs(model, batch_with_captions(captions), KEY)
    no_texts = make_batch()
    no_texts.tokens_BL = None
    with pytest.raises(UserError, match="needs texts"):
        plain.outputs(model, no_texts, KEY)
    with pytest.raises(UserError, match="train_logit_scale"):
        plain.outputs(make_model(), make_batch(), KEY)
    with pytest.raises(UserError, match="global_batch"):
        plain.loss(plain.outputs(model, make_batch(0, 1), KEY))
    with pytest.raises(UserError, match="captions"):
        MaxMargin(GRADED, "openai", None).loss(plain.outputs(model, make_batch(), KEY))
