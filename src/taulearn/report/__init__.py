"""Pictures of recorded runs: matplotlib figures and one self-contained interactive page.

Everything here is drawn from records alone (``History``, ``Run``), but for ``drawing``, which draws a model. matplotlib
and plotly are imported by the functions that draw, so importing this package costs nothing.
"""

from taulearn.report import drawing as drawing, figures as figures
from taulearn.report.html import write_html as write_html

__all__ = ["drawing", "figures", "write_html"]
