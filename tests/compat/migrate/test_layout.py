"""An import that is split: comments stay with their names."""

import textwrap

import pytest

pytest.importorskip("libcst")
from pennyweight.compat.migrate import rewrite

C = "pennyweight.compat"
SPLITS = [
    ("from torch import nn, quantization  # both\n", "from @ import quantization\nfrom torch import nn  # both\n"),
    ("from torch import (quantization, nn)\n", "from @ import quantization\nfrom torch import (nn)\n"),
    ("from torch import nn, \\\n    quantization as q, jit\n", "from @ import quantization as q\nfrom torch import nn, jit\n"),
    (
        """
        from torch import (  # of torch
            nn,  # layers
            # integers
            quantization,  # old
            jit,
            # the end
        )  # done
        """,
        """
        from @ import (
            # integers
            quantization,  # old
        )
        from torch import (  # of torch
            nn,  # layers
            jit,
            # the end
        )  # done
        """,
    ),
    (
        """
        if True:
            # a heading

            from torch.export import (export_for_training,
                                      Dim,  # a size
                                      export)
        """,
        """
        if True:
            # a heading

            from @.export import export_for_training
            from torch.export import (
                Dim,  # a size
                export,
            )
        """,
    ),
    (
        "from torchao.quantization import (\n    pt2e,  # graphs\n    qat,\n)\n",
        "from @ import (\n    quantization as pt2e,  # graphs\n)\nfrom @.torchao.quantization import qat\n",
    ),
    (
        ("from torch import (  # both\n    quantization as qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq,\n"
        "    ao,\n)\nqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq.prepare\n"),
        ("from @ import quantization as qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq\nfrom torch import (  # both\n    ao,\n)\n"
        "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq.prepare\n"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), SPLITS, ids=range(len(SPLITS)))
def test_splits(old, new):
    result = rewrite(textwrap.dedent(old))
    assert result.code == textwrap.dedent(new).replace("@", C)
    assert rewrite(result.code).code == result.code
    compile(result.code, "new", "exec")
