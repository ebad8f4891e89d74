"""Matrix square roots of pooled outer products, which even out the strengths of what correlates.

Sources: Li, Xie, Wang, Gao, 'Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square
Root Normalization' (iSQRT-COV), https://arxiv.org/abs/1712.01034; Lin, Maji, 'Improved Bilinear Pooling with CNNs',
https://arxiv.org/abs/1707.06772.
"""

from typing import Annotated, List, Optional, Tuple

import torch

from ...ops import descriptor_size, reference
from ..arguments import Bounds
from .plain import PlainPooling, mean_products, root_and_norm
from .registry import Terms, register_pooling

__all__ = ['ISqrtPooling', 'MatrixRootPooling', 'matrix_root', 'newton_schulz']

# Of the largest eigenvalue's root: what is smaller is rounding of an eigenvalue 0 in float64.
_LEAST_ROOT = 1e-7
_NO_SECOND_DERIVATIVE = "Pooling 'sqrtm' has no second derivative; with `iterations` it has."


def newton_schulz(z: torch.Tensor, iterations: int) -> torch.Tensor:
    """Square roots of symmetric matrices by coupled Newton-Schulz iterations.

    Small eigenvalues are not there yet after few of them: each makes the root at most 1.5 times what it was.

    Args:
        z: (B, C, C), positive semidefinite, with eigenvalues of 1 at most.
        iterations: Number of iterations.

    Returns:
        (B, C, C).
    """
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    step = 1.5 * eye - 0.5 * z
    root = torch.bmm(z, step)
    inverse = step
    for i in range(1, iterations):
        step = torch.baddbmm(eye, inverse, root, beta=1.5, alpha=-0.5)
        root = torch.bmm(root, step)
        if i < iterations - 1:
            inverse = torch.bmm(step, inverse)
    return root


def _inverses(x: torch.Tensor) -> torch.Tensor:
    """1 / x, but 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


def _solve_lyapunov(g: torch.Tensor, vectors: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """X with S X + X S = G for symmetric S = U diag(s) U^T and the symmetric part of G; 0 where S is.

    Of U (B, C, R) there may be but the columns whose s is not 0.
    """
    g = ((g + g.mT) / 2) @ vectors
    inner = vectors.mT @ g
    solved = inner * _inverses(roots[..., :, None] + roots[..., None, :])
    if vectors.shape[-1] == vectors.shape[-2]:
        return vectors @ solved @ vectors.mT
    # what maps the null space of S to the space of U, and back
    half = (g - vectors @ inner) * _inverses(roots)[..., None, :] + vectors @ (solved / 2)
    half = half @ vectors.mT
    return half + half.mT


def _eigen_roots(z: torch.Tensor, x: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """Roots of eigenvalues (B, R), 0 for what is 0 but for rounding, and their eigenvectors (B, C, R).

    Of a matrix that is not finite, for which LAPACK gives up the whole batch, the roots are nan.

    Args:
        z: (B, C, C).
        x: (B, C, N) with Z = X X^T / N: of fewer columns than rows R = N eigenvectors come from X^T X / N, else R = C.
    """
    factor = x if x is not None and x.shape[-1] < x.shape[-2] else None
    gram = z if factor is None else factor.mT @ factor / factor.shape[-1]
    is_finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(is_finite[..., None, None], gram, 0.0)
    # Of many rows of zeros, as dead channels make them, LAPACK may find no eigenvectors ('failed to converge'; in MKL
    # two or three matrices in a hundred). It does if no two eigenvalues are alike, to the last digit of the largest.
    spread = torch.linspace(0.5, 1, gram.shape[-1], dtype=z.dtype, device=z.device) * torch.finfo(z.dtype).eps
    ridge = torch.diag_embed(gram.diagonal(0, -2, -1).amax(-1, keepdim=True) * spread)
    values, vectors = torch.linalg.eigh(gram + ridge)
    roots = torch.where(is_finite[..., None], values.clamp_min(0).sqrt(), torch.nan)
    roots = torch.where(roots <= _LEAST_ROOT * roots.amax(-1, keepdim=True), 0.0, roots)
    if factor is not None:
        vectors = (factor @ vectors) * (_inverses(roots) * factor.shape[-1] ** -0.5)[..., None, :]
    return roots, vectors


class _CompiledMatrixRoot(torch.autograd.Function):
    """Square root by eigenvectors. Its derivative X solves S X + X S = dZ, the Lyapunov equation, which has no
    differences of eigenvalues in it as the derivatives of the eigenvectors have.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: torch.Tensor, x: Optional[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        roots, vectors = _eigen_roots(z, x)
        return (vectors * roots[..., None, :]) @ vectors.mT, vectors, roots

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, vectors, roots = output
        ctx.mark_non_differentiable(vectors, roots)
        ctx.save_for_backward(vectors, roots)
        ctx.save_for_forward(vectors, roots)

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _, __) -> Tuple[torch.Tensor, None]:
        return _CompiledFirstDerivative.apply(grad, *ctx.saved_tensors), None


class _MatrixRoot(_CompiledMatrixRoot):
    """The same with a forward derivative, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, _) -> Tuple[torch.Tensor, None, None]:
        return _FirstDerivative.apply(tangent, *ctx.saved_tensors), None, None

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _, __) -> Tuple[torch.Tensor, None]:
        return _FirstDerivative.apply(grad, *ctx.saved_tensors), None


class _CompiledFirstDerivative(torch.autograd.Function):
    """`_solve_lyapunov`, which has no derivative of its own: in it eigenvectors are taken for constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: torch.Tensor, vectors: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
        return _solve_lyapunov(grad, vectors, roots)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


class _FirstDerivative(_CompiledFirstDerivative):
    """The same, of which forward mode asks for a derivative too."""

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def matrix_root(z: torch.Tensor, x: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Square roots of symmetric positive semidefinite matrices.

    Args:
        z: (B, C, C).
        x: (B, C, N) with Z = X X^T / N, if there is one: with fewer columns than rows its small Gram matrix is solved.

    Returns:
        (B, C, C).
    """
    if not torch.jit.is_scripting():
        if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            root = _CompiledMatrixRoot if torch.compiler.is_compiling() else _MatrixRoot
            return root.apply(z, x if x is None else x.detach())[0]
    return _iterated_root(z, 32)  # until roots of 3e-6 of the largest are there, in graphs that have no eigenvectors


def _iterated_root(z: torch.Tensor, iterations: int) -> torch.Tensor:
    """Square roots by iterations from matrices divided by their Frobenius norm, (B, C, C)."""
    squares = z.square().sum((1, 2), keepdim=True)
    length = torch.where(squares > 0, squares, 1.0).sqrt()
    return newton_schulz(z / length, iterations) * length.sqrt()


@register_pooling('isqrt')
class ISqrtPooling(PlainPooling):
    """Covariance of the channels, its square root by a few Newton-Schulz iterations, upper triangle.

    The root is not that of mathematics: 5 iterations leave small eigenvalues smaller, which regularises.
    """

    max_streams = 1

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        iterations: Annotated[int, Bounds(1, 100)] = 5,
        isometric: bool = True,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels.
            iterations: Newton-Schulz iterations.
            isometric: Off-diagonal entries times sqrt(2), so that inner products are those of the matrices; False for
                the bare triangle of fast-MPN-COV.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = descriptor_size(*in_features)
        self.iterations = iterations
        self.isometric = isometric

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        scale, _ = reference.safe_scales(a, a)
        a = a / scale
        return self.root(a - a.mean(2, keepdim=True)) * scale[:, 0]

    def root(self, a: torch.Tensor) -> torch.Tensor:
        """Packed root of the covariance of centred features (B, C, N)."""
        z = reference.products(a, a, 'avg')
        trace = z.diagonal(0, 1, 2).sum(1)[:, None, None]
        trace = torch.where(trace > 1e-30, trace, 1.0)  # of an image without variance the root is 0 / 1
        root = newton_schulz(z / trace, self.iterations) * trace.sqrt()
        packed = reference.pack(root)
        return packed if self.isometric else _bare(packed, int(root.shape[1]))

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        """Of centred features: what all locations have in common is in no covariance."""
        a = a / reference.safe_scales(a, a)[0]
        a = a - a.mean(2, keepdim=True)
        return [Terms(self.root(a), (a,), 1)]

    def fold_triangle(self, weight: torch.Tensor) -> torch.Tensor:
        """A classifier's weight (K, D) for bare triangles, for this pooling's descriptors."""
        is_packed = self.isometric and weight.shape[1] == self.num_features
        return _bare(weight, self.in_features[0]) if is_packed else weight

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, iterations={self.iterations}, isometric={self.isometric}'


def _bare(packed: torch.Tensor, channels: int) -> torch.Tensor:
    """Packed vectors (..., D) with their off-diagonal entries divided by sqrt(2)."""
    eye = torch.eye(channels, dtype=packed.dtype, device=packed.device)
    return torch.where(reference.pack(eye[None])[0] > 0, packed, packed * 0.5**0.5)


@register_pooling('sqrtm')
class MatrixRootPooling(PlainPooling):
    """Mean outer product, its matrix square root, then signed square root and L2 norm, packed.

    In float64, since the root of an eigenvalue's rounding is large.
    """

    max_streams = 1
    is_packed = True
    is_unit_length = True

    def __init__(
        self,
        in_features: Tuple[int, ...],
        *,
        iterations: Annotated[Optional[int], Bounds(1, 100)] = None,
        eps: Annotated[float, Bounds(above=0, most=1e30)] = 1e-10,
        device=None,
        dtype=None,
    ):
        """
        Args:
            in_features: Channels.
            iterations: Newton-Schulz iterations, as in the authors' release; None for the exact root.
            eps: Offset under the signed square root.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_features = descriptor_size(*in_features)
        self.iterations = iterations
        self.eps = eps

    def _factor(self, a: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Features in float64, scaled as `mean_products` does it, and their mean outer product."""
        x = a.double()
        x = x / reference.safe_scales(x, x)[0]
        return x, reference.products(x, x, 'avg')

    def root(self, a: torch.Tensor) -> torch.Tensor:
        """Root (B, C, C) of the mean outer product of features (B, C, N)."""
        iterations = self.iterations
        if iterations is None:
            x, z = self._factor(a)
            return matrix_root(z, x).to(a.dtype)
        return _iterated_root(mean_products(a, None), iterations)

    def describe(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
        return root_and_norm(self.root(a), self.eps)

    def terms(self, a: torch.Tensor, b: Optional[torch.Tensor]) -> List[Terms]:
        if self.iterations is not None:
            return [Terms(reference.pack(self.root(a)), (a,), 1)]
        # Z^(1/2) = (Q Z + Z Q) / 2 with Q = Z^(-1/2) held constant
        x, z = self._factor(a)
        roots, vectors = _eigen_roots(z.detach(), x.detach())
        inverse = (vectors * _inverses(roots)[:, None, :]) @ vectors.mT
        return [Terms(reference.pack((inverse @ z + z @ inverse) / 2).to(a.dtype), (a,), 2)]

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, iterations={self.iterations}, eps={self.eps:g}'
