"""Pictures of recorded runs: matplotlib figures and one self-contained interactive page.

Everything here is drawn from records alone (``History``, ``Run``). matplotlib and plotly are imported by the functions
that draw, so importing this package costs nothing.
"""

from taulearn.report import figures as figures
from taulearn.report.html import write_html as write_html

__all__ = ["figures", "write_html"]
