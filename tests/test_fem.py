"""The finite element comparison: order, exactness, another code on the same meshes, memory, bad input."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.sparse.linalg
import scipy.special
import torch
from torch import Tensor

from taulearn import fem
from taulearn.data import maxwell
from taulearn.fem import best_approximation_error, estimated_memory, l2_error, quadrature

pytest.importorskip("skfem")


def ngsolve_errors(n: int) -> tuple[int, float, float]:
    """Unknowns and errors of the best approximation in ngsolve's lowest order HCurl space, on the mesh of fem."""
    ngsolve = pytest.importorskip("ngsolve", reason="pip install ngsolve: the other finite element code")
    from netgen.meshing import Element3D, FaceDescriptor, Mesh, MeshPoint, Pnt

    ours = fem._mesh(n)
    mesh = Mesh(dim=3)
    mesh.Add(FaceDescriptor(surfnr=1, domin=1, bc=1))
    vertices = [mesh.Add(MeshPoint(Pnt(*x))) for x in ours.p.T]
    for tetrahedron in ours.t.T:
        corners = ours.p[:, tetrahedron]
        edges = corners[:, 1:] - corners[:, :1]
        # ngsolve wants the vertices of a tetrahedron in one orientation
        order = [0, 1, 2, 3] if np.linalg.det(edges) < 0 else [0, 2, 1, 3]
        mesh.Add(Element3D(1, [vertices[i] for i in tetrahedron[order]]))
    domain = ngsolve.Mesh(mesh)
    x, y = ngsolve.x, ngsolve.y
    s = (x * x + y * y) / 4
    terms = 12  # power series of the Bessel functions, below 1e-16 for r^2 <= 2
    i0 = sum(s**k / float(scipy.special.factorial(k) ** 2) for k in range(terms))
    ratio = sum(s**k / float(2 * scipy.special.factorial(k) * scipy.special.factorial(k + 1)) for k in range(terms))
    u, curl_u = ngsolve.CF((-y * ratio, x * ratio, 0)), ngsolve.CF((0, 0, i0))
    space = ngsolve.HCurl(domain, order=0)
    trial, test = space.TnT()
    a = ngsolve.BilinearForm((ngsolve.curl(trial) * ngsolve.curl(test) + trial * test) * ngsolve.dx).Assemble()
    integral = (curl_u * ngsolve.curl(test) + u * test) * ngsolve.dx(bonus_intorder=6)
    f = ngsolve.LinearForm(integral).Assemble()
    u_h = ngsolve.GridFunction(space)
    u_h.vec.data = a.mat.Inverse(inverse="sparsecholesky") * f.vec
    square = lambda error: ngsolve.Integrate(error * error, domain, order=8)  # noqa: E731
    l2 = square(u_h - u)
    return space.ndof, float(l2**0.5), float((l2 + square(ngsolve.curl(u_h) - curl_u)) ** 0.5)


class TestBestApproximation:
    def test_order_one_in_both_norms(self) -> None:
        found = [best_approximation_error(n) for n in (4, 7, 10, 13)]
        h = np.log([each.h for each in found])
        for norm in ("l2", "hcurl"):
            slope = np.polyfit(h, np.log([getattr(each, norm) for each in found]), 1)[0]
            assert slope == pytest.approx(1.0, abs=0.1), norm
        assert [each.dofs for each in found] == [
            3 * n * (n + 1) ** 2 + 3 * n**2 * (n + 1) + n**3 for n in (4, 7, 10, 13)
        ]
        assert found[0].h == pytest.approx(3**0.5 / 4)

    @pytest.mark.parametrize("n", [4, 7, 10])
    def test_ngsolve_finds_the_same_errors(self, n: int) -> None:
        dofs, l2, hcurl = ngsolve_errors(n)
        ours = best_approximation_error(n)
        assert ours.dofs == dofs
        assert ours.l2 == pytest.approx(l2, rel=1e-2)
        assert ours.hcurl == pytest.approx(hcurl, rel=1e-2)
        assert (ours.l2, ours.hcurl) == pytest.approx((l2, hcurl), rel=1e-5)  # they agree far better than they have to

    def test_a_field_of_the_space_is_found_exactly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # a + b x x is what Nedelec's lowest order elements contain on every tetrahedron; its curl is 2 b
        a, b = torch.tensor([0.3, -0.2, 1.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
        monkeypatch.setattr(maxwell, "solution", lambda x: a + torch.linalg.cross(b.expand(x.shape), x))
        monkeypatch.setattr(maxwell, "curl", lambda x: (2 * b).expand(x.shape))
        assert best_approximation_error(3).hcurl < 1e-8

    def test_the_quadrature_resolves_the_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = best_approximation_error(4)
        monkeypatch.setattr(fem, "QUADRATURE_ORDER", 8)
        finer = best_approximation_error(4)
        assert found.l2 == pytest.approx(finer.l2, rel=1e-5)
        assert found.hcurl == pytest.approx(finer.hcurl, rel=1e-5)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = best_approximation_error(3)
        monkeypatch.setattr(fem, "POINTS_PER_CHUNK", 14 * 5)
        assert best_approximation_error(3).hcurl == pytest.approx(whole.hcurl, rel=1e-10)

    def test_direct_solvers_find_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = best_approximation_error(5)
        calls = []

        def spsolve(matrix: Any, load: Any) -> Any:
            calls.append(matrix.shape)
            return scipy.sparse.linalg.spsolve(matrix.tocsc(), load)

        monkeypatch.setitem(sys.modules, "pypardiso", None)
        assert best_approximation_error(5, solver="direct").l2 == pytest.approx(expected.l2, rel=1e-8)
        monkeypatch.setitem(sys.modules, "pypardiso", SimpleNamespace(spsolve=spsolve))
        assert best_approximation_error(5, solver="direct").l2 == pytest.approx(expected.l2, rel=1e-8)
        assert calls == [(expected.dofs, expected.dofs)]

    def test_progress_is_a_line_per_stage(self, capsys: pytest.CaptureFixture[str]) -> None:
        best_approximation_error(2, progress=True)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert "98 unknowns" in lines[0]
        assert "residual" in lines[1]
        best_approximation_error(2)
        assert capsys.readouterr().out == ""

    @pytest.mark.long
    def test_order_one_on_all_meshes_of_the_paper(self) -> None:
        found = [best_approximation_error(n) for n in range(4, 32, 3)]
        assert found[-1].dofs == 217_279
        slope = np.polyfit(np.log([each.h for each in found]), np.log([each.l2 for each in found]), 1)[0]
        assert slope == pytest.approx(1.0, abs=0.1)


class TestFieldErrors:
    def test_norm_of_the_solution(self) -> None:
        def density(y: float, x: float) -> float:
            return scipy.special.iv(1, np.hypot(x, y)) ** 2

        norm = scipy.integrate.dblquad(density, 0, 1, 0, 1)[0] ** 0.5
        assert l2_error(torch.zeros_like, 3) == pytest.approx(norm, rel=1e-8)

    def test_polynomials_of_the_order_are_integrated_exactly(self) -> None:
        total = sum(float((w * x[:, 0] ** 2 * x[:, 1] * x[:, 2] ** 2).sum()) for x, w in quadrature(2))
        assert total == pytest.approx(1 / 18, rel=1e-12)

    def test_the_field_sees_all_points_in_chunks(self) -> None:
        sizes: list[int] = []

        def field(x: Tensor) -> Tensor:
            assert x.dtype == torch.float64
            assert not torch.is_grad_enabled()
            sizes.append(len(x))
            return maxwell.solution(x) + 0.5

        assert l2_error(field, 4, points_per_chunk=1000) == pytest.approx((3 * 0.25) ** 0.5, rel=1e-12)
        assert max(sizes) <= 1000
        assert sum(sizes) == 6 * 4**3 * 14

    def test_a_float32_network_is_compared_in_float64(self) -> None:
        error = l2_error(lambda x: maxwell.solution(x).float(), 3)
        assert 0 < error < 1e-7


class TestBadInput:
    @pytest.mark.parametrize("n", [0, -1, 2.5])
    def test_n_below_one(self, n: Any) -> None:
        for function in (best_approximation_error, estimated_memory, lambda n: next(quadrature(n))):
            with pytest.raises(ValueError, match="n must be an integer >= 1"):
                function(n)

    def test_unknown_solver(self) -> None:
        with pytest.raises(ValueError, match=r"solver must .*got 'lu'"):
            best_approximation_error(2, solver="lu")

    def test_a_mesh_too_large_for_memory_is_refused_before_it_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fem, "_mesh", lambda n: pytest.fail("allocated"))
        with pytest.raises(MemoryError, match=r"n must .*got 200: .* 192.1 GB"):
            best_approximation_error(200, memory=1e9)
        with pytest.raises(MemoryError, match="n must be at most"):
            best_approximation_error(10_000)  # against what is free here

    def test_the_largest_mesh_that_is_named_is_accepted(self) -> None:
        assert estimated_memory(33) <= 1e9 < estimated_memory(34)

    def test_scikit_fem_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "skfem", None)
        with pytest.raises(ImportError, match=r"must be installed .*: pip install 'taulearn\[fem\]'$"):
            best_approximation_error(4)
        with pytest.raises(ImportError, match=r"pip install 'taulearn\[fem\]'"):
            l2_error(torch.zeros_like, 4)

    def test_a_system_that_was_not_solved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fem, "_solve_cg", lambda matrix, load: np.zeros_like(load))
        with pytest.raises(RuntimeError, match=r"solver 'cg' must .*got 1 for n = 2: .*'direct'"):
            best_approximation_error(2)

    @pytest.mark.parametrize("field", [lambda x: x[:, :2], lambda x: x * torch.nan])
    def test_fields_of_another_shape_or_not_finite(self, field: Any) -> None:
        with pytest.raises(ValueError, match="field must return"):
            l2_error(field, 2)

    def test_chunks_smaller_than_a_tetrahedron(self) -> None:
        with pytest.raises(ValueError, match="points_per_chunk must be >= 14"):
            l2_error(torch.zeros_like, 2, points_per_chunk=5)
