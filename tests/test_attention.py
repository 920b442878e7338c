import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from avion_dali.contracts import UserError
from avion_dali.models import attention
from avion_dali.models.attention import (
    FusedAttention,
    SelfAttention,
    attend,
    attend_causally,
    describe_kernel,
    resolve_attention,
    sdpa_problem,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PACKAGES = {"flash-attn": "flash_attn", "xformers": "xformers"}


@pytest.fixture(autouse=True)
def _nothing_found_out_before():
    forget()
    yield
    forget()


def forget() -> None:
    attention._find_problem.cache_clear()
    attention._find_automatic_kernel.cache_clear()
    attention._PACKAGE_KERNELS.clear()


def make_qkv(dtype: torch.dtype = torch.float64, queries: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 4, 7, 5, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (q, k, v)]


@pytest.mark.parametrize("queries", [7, 1])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_attend_equals_the_written_formula(backend, queries):
    q, k, v = make_qkv(queries=queries)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(5), dim=-1)
    assert torch.allclose(attend(q, k, v, backend), weights @ v, atol=1e-12)


def test_one_query_is_not_given_to_cudnn(monkeypatch):
    """Its backward pass gives NaN for one query with scores below -88."""
    given, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*qkv: torch.Tensor) -> torch.Tensor:
        given.append((qkv[0].shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(*qkv)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for backend in ("sdpa", "cudnn"):
        attend(*make_qkv(queries=1), backend)
    attend(*make_qkv(queries=2), "sdpa")
    assert given == [(1, False), (1, False), (2, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_one_query_with_strongly_negative_scores(dtype, error):
    q, k, v = make_qkv(queries=1)
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(5)
    given = [t.to(dtype) for t in (q, k, v)]
    exact, ours = ([t.to(d).requires_grad_() for t in given] for d in (torch.float64, dtype))
    assert all(score < -100 for score in (given[0].double() @ given[1].double().mT / math.sqrt(5)).flatten())
    expected, mixed = attend(*exact, "math"), attend(*ours, "sdpa")
    assert torch.allclose(mixed.double(), expected, atol=error)
    expected[..., 0].sum().backward()
    mixed[..., 0].sum().backward()
    for right, found in zip(exact, ours, strict=True):
        assert found.grad.isfinite().all()
        # The first feature of all keys is -268, which multiplies rounding errors in the gradient of the query.
        assert torch.allclose(found.grad[..., 1:].double(), right.grad[..., 1:], atol=error, rtol=error)


def test_attend_with_equal_keys_averages_the_values():
    q, v = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    mixed = attend(q, torch.ones(1, 2, 6, 4), v)
    assert torch.allclose(mixed, v.mean(dim=2, keepdim=True).expand_as(v), atol=1e-6)


def test_gradients_of_both_kernels_agree():
    grads = []
    for backend in ("sdpa", "math"):
        qkv = [t.requires_grad_() for t in make_qkv()]
        attend(*qkv, backend).sin().sum().backward()
        grads.append([t.grad for t in qkv])
    for fused, plain in zip(*grads, strict=True):
        assert torch.allclose(fused, plain, atol=1e-10)


def test_half_precision_stays_near_the_formula_and_keeps_its_matrix_in_half():
    exact = attend(*make_qkv(), "math")
    for backend in ("sdpa", "math"):
        mixed = attend(*make_qkv(torch.bfloat16), backend)
        assert mixed.dtype == torch.bfloat16
        assert torch.allclose(mixed.double(), exact, atol=0.03)


def test_pytorchs_kernels_are_called_and_compared(monkeypatch):
    assert sdpa_problem(SDPBackend.MATH, CPU, dtype=torch.float32) is None
    assert sdpa_problem(SDPBackend.FLASH_ATTENTION, CPU, dtype=torch.bfloat16) is None
    assert "No viable backend" in sdpa_problem(SDPBackend.CUDNN_ATTENTION, CPU, dtype=torch.float32)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v + 0)
    assert "wrong by up to" in sdpa_problem(SDPBackend.MATH, CPU, dtype=torch.float32)


def test_a_kernel_of_pytorchs_can_be_forced(monkeypatch):
    assert resolve_attention("flash", CPU, dtype=torch.float32) == "flash"
    for name in ("cudnn", "efficient"):
        with pytest.raises(UserError, match=f"'{name}' cannot run here: No viable backend.*auto or sdpa"):
            resolve_attention(name, CPU, dtype=torch.float32)
    q, k, v = make_qkv(torch.float32)
    traced = torch.compile(attend, backend="eager", fullgraph=True)
    for call in (attend, traced):
        assert torch.allclose(call(q, k, v, "flash"), attend(q, k, v, "math"), atol=1e-6)
        assert torch.allclose(call(q[:, :, :1], k, v, "cudnn"), attend(q[:, :, :1], k, v, "math"), atol=1e-6)
        with pytest.raises(RuntimeError, match="No viable backend|No available kernel"):
            call(q, k, v, "cudnn")


def test_the_kernel_that_pytorch_picks_has_a_name():
    assert describe_kernel("sdpa", CPU, dtype=torch.float32, width=64) == "sdpa (flash)"
    with sdpa_kernel(SDPBackend.MATH):
        assert describe_kernel("sdpa", CPU, dtype=torch.float32, width=64) == "sdpa (math)"
    assert describe_kernel("cudnn", CPU, dtype=torch.float32, width=64) == "cudnn"


@pytest.mark.parametrize("length", [1, 6])
def test_causal_attention_is_attention_to_the_tokens_before(length):
    q, k, v = (t[:, :, :length] for t in make_qkv())
    mixed = attend_causally(q, k, v)
    for end in range(length):
        before = slice(0, end + 1)
        expected = attend(q[:, :, end : end + 1], k[:, :, before], v[:, :, before], "math")
        assert torch.allclose(mixed[:, :, end : end + 1], expected, atol=1e-12)


@pytest.mark.parametrize("backend", PACKAGES)
def test_backends_of_other_packages_say_why_they_cannot_run_here(backend):
    if importlib.util.find_spec(PACKAGES[backend]) and torch.cuda.is_available():
        pytest.skip(f"{backend} can run here")
    with pytest.raises(UserError, match=rf"{backend}.* cannot run here: .*(imported|GPU).*auto or sdpa"):
        resolve_attention(backend, CPU, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="cannot run here"):
        attend(*make_qkv(torch.float32), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", PACKAGES)
def test_backends_of_other_packages_equal_the_formula(backend):
    pytest.importorskip(PACKAGES[backend], reason=f"{backend} is not installed")
    q, k, v = (torch.randn(2, 3, 50, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = attend(q.float(), k.float(), v.float(), "math")
    assert torch.allclose(attend(q[:, :, :9], k, v, backend).float(), expected[:, :, :9], atol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 2, 197])
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "efficient"])
def test_pytorchs_kernels_take_strongly_negative_scores_on_a_gpu(backend, queries):
    try:
        kernel = resolve_attention(backend, CUDA, dtype=torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 64, generator=generator)
    k, v = torch.randn(2, 2, 3, 197, 64, generator=generator)
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    given = [t.bfloat16() for t in (q, k, v)]
    exact, ours = [t.double() for t in given], [t.to(CUDA).requires_grad_() for t in given]
    mixed = attend(*ours, kernel)
    mixed.float().sum().backward()
    assert torch.allclose(mixed.double().cpu(), attend(*exact, "math"), atol=0.03)
    assert all(t.grad.isfinite().all() for t in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [16, 48, 64, 77])
def test_causal_attention_on_a_gpu_is_that_on_a_cpu(length):
    q, k, v = torch.randn(3, 2, 3, length, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = [t.to(CUDA).requires_grad_() for t in (q, k, v)]
    mixed = attend_causally(*ours)
    mixed.float().sum().backward()
    expected = attend_causally(q.double(), k.double(), v.double())
    assert torch.allclose(mixed.double().cpu(), expected, atol=0.03)
    assert all(t.grad.isfinite().all() for t in ours)


class FakePackage(types.ModuleType):
    """A package with flash-attn's function, on CPUs."""

    def __init__(self, problem: str = "") -> None:
        super().__init__("flash_attn")
        self.problem, self.shapes = problem, []

    def flash_attn_func(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.shapes.append((tuple(q.shape), tuple(k.shape)))
        if self.problem:
            raise RuntimeError(self.problem)
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), "math").transpose(1, 2)


def install(monkeypatch: pytest.MonkeyPatch, package: FakePackage) -> None:
    """Pretend that a package is there, and that there is a GPU to try it on."""
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "_trial_tokens", lambda device, dtype: torch.zeros(1, 8, 1, 64, dtype=dtype))


def test_a_package_that_works_is_taken_on_a_gpu_in_half_precision_only(monkeypatch):
    install(monkeypatch, FakePackage())
    assert resolve_attention("auto", CUDA, dtype=torch.bfloat16) == "flash-attn"
    assert resolve_attention("auto", CUDA, dtype=torch.float32) == "sdpa"
    assert resolve_attention("auto", CPU, dtype=torch.bfloat16) == "sdpa"
    assert resolve_attention("flash-attn", CUDA, dtype=torch.float16) == "flash-attn"
    with pytest.raises(UserError, match="float16 and bfloat16, not torch.float32"):
        resolve_attention("flash-attn", CUDA, dtype=torch.float32)


def test_a_package_whose_kernel_fails_is_not_taken(monkeypatch):
    install(monkeypatch, FakePackage("only supports Ampere GPUs or newer.\nmore"))
    assert resolve_attention("auto", CUDA, dtype=torch.bfloat16) == "sdpa"
    with pytest.raises(UserError, match="here: only supports Ampere GPUs or newer.; set it"):
        resolve_attention("flash-attn", CUDA, dtype=torch.bfloat16)


def test_a_package_gets_heads_behind_tokens(monkeypatch):
    package = FakePackage()
    install(monkeypatch, package)
    kernel = resolve_attention("flash-attn", CUDA, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "resolve_attention", never_again)
    q, k, v = make_qkv(queries=3)
    mixed = attend(q, k, v, kernel)
    assert package.shapes[-1] == ((2, 3, 4, 5), (2, 7, 4, 5))
    assert torch.allclose(mixed, attend(q, k, v, "math"))


def never_again(*where: object) -> None:
    raise AssertionError("a kernel was resolved in a forward pass")


@pytest.mark.parametrize("kind", [SelfAttention, FusedAttention])
def test_a_forward_pass_does_not_resolve_a_kernel_that_has_a_name(monkeypatch, kind):
    module, x = kind(24, 3, backend=resolve_attention("auto", CPU, dtype=torch.float32)), torch.randn(2, 9, 24)
    monkeypatch.setattr(attention, "resolve_attention", never_again)
    assert module.backend == "sdpa" and module(x).shape == x.shape


def test_auto_in_a_module_built_by_hand_is_resolved_once_per_device_and_type(monkeypatch):
    asked = []

    def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
        asked.append((name, device, dtype))
        return "math"

    monkeypatch.setattr(attention, "resolve_attention", resolve)
    modules, x = [SelfAttention(24, 3, backend="auto") for _ in range(2)], torch.randn(2, 9, 24)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for module in modules:
            module.to(dtype)(x.to(dtype))
    assert asked == [("auto", CPU, torch.float32), ("auto", CPU, torch.float64)]


def test_compiled_code_does_not_look_for_packages(monkeypatch):
    install(monkeypatch, FakePackage())

    def mix(q, k, v):
        kernel = resolve_attention("auto", CUDA, dtype=torch.bfloat16)
        return attend(q, k, v) if kernel == "flash-attn" else q

    q, k, v = make_qkv()
    traced = torch.compile(mix, backend="eager", fullgraph=True)
    assert torch.allclose(traced(q, k, v), attend(q, k, v, "math"))


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="choose one of auto, sdpa"):
        resolve_attention("paged", CPU, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_self_attention_takes_the_weights_and_gives_the_numbers_of_torch(backend):
    torch.manual_seed(2)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).train()  # eval would take a fused inference path
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = SelfAttention(24, 3, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 9, 24)
    expected = theirs(x, x, x, need_weights=False)[0]
    assert torch.allclose(ours(x), expected, atol=1e-6)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {"proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    fused = FusedAttention(24, 3, backend=backend)
    fused.load_state_dict({ours: theirs.state_dict()[name] for ours, name in names.items()}, strict=True)
    assert torch.allclose(fused(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [SelfAttention, FusedAttention])
def test_width_must_divide_into_heads(kind):
    with pytest.raises(UserError, match="width 10 is not a multiple of the number of heads, 3"):
        kind(10, 3)
