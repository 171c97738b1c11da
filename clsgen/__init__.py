"""Import name of this flat repository: `clsgen.modeling_clsgen` is `<repository root>/modeling_clsgen.py`."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent)]
