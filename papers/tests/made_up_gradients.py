"""Measurements of claim A7, made up so that everything is as the article says."""

PARTS = ("propagator", "W", "b", "tau")
# Of the dense scheme beyond its structural growth of 2^(N-j-2), 9 orders of magnitude for 32 layers.
FIXED = {"feedforward": -4.0, "residual": 3.0, "dense": 20.0, "fractional": 3.0}


def orders(value):
    return dict.fromkeys(PARTS, value)


def errors(scheme):
    return orders(1e-14) | ({"tau, as printed": 1e-13} if scheme == "fractional" else {})


def rows(scheme, seed, depths=(8, 32)):
    """The start 1/N (residual and fractional schemes) vanishes, 1 explodes, but for feedforward networks."""
    found = []
    for start in ("1", "1/N") if scheme in ("residual", "fractional") else ("1",):
        for depth in depths:
            growth = FIXED[scheme] * (1.0 if start == "1" else -1.0) * (1 + 0.02 * seed)
            row = {"start": start, "depth": depth, "before": orders(growth), "errors before": errors(scheme)}
            for kind, share in (("fixed", 1.0), ("learned", 0.5 - 0.01 * seed)):
                values = {"growth": orders(share * growth), "errors": errors(scheme)}
                row[kind] = values | {"loss": 0.5, "tau": [0.9, 1.0, 1.1]}
            found.append(row)
    return found


def examples():
    near, far = [1.0, 1.0, 2.0], [100.0, 100.0, 200.0]
    small = {"far": [1.99, 1.99, 3.98], "near": [0.01, 0.01, 2.0]}
    return {"6.3": {"1.0": {"far": far, "near": near}, "0.01": small}, "6.8": dict.fromkeys(FIXED, 1e-16)}


def members(seed):
    """{setting: measurements} of one seed."""
    return {f"gradients/{scheme}": {"rows": rows(scheme, seed)} for scheme in FIXED}
