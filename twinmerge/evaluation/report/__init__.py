"""`twinmerge report`: what an artifact does on labelled rows, as one page to look at.

gather -> what was measured; signatures -> what went wrong in it; draw, page -> HTML and markdown
"""

from .gather import Found, gather
from .page import html, markdown
from .signatures import Signature

__all__ = ["Found", "Signature", "gather", "html", "markdown"]
