"""The hand-over to Megatron-LM's `pretrain`, with the command of docs/megatron.md as it stands there.

It needs a checkout of Megatron-LM core_v0.16.1, which no package has: MEGATRON_LM=FOLDER pytest tests/examples. On all
layouts, with checkpoints and against `elas train`: tests/megatron/study.py.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
from started import EXAMPLES, ROOT, start, torchrun

CHECKOUT = os.environ.get("MEGATRON_LM", "")


@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path(CHECKOUT, "pretrain_gpt.py").is_file(), reason="MEGATRON_LM: no checkout of Megatron-LM")
def test_the_page_trains_in_megatron_lm(tmp_path):
    page = (ROOT / "docs/megatron.md").read_text(encoding="utf-8")
    script = "docs/examples/pretrain_gpt_elas_cpu.py"
    command = page.split("PYTHONPATH=~/Megatron-LM ")[1].split("```")[0]
    words = shlex.split(command.replace("\\\n", " ").split(script)[1])
    path = os.pathsep.join([CHECKOUT, str(ROOT)])
    example = [*torchrun(2), EXAMPLES / Path(script).name]
    output = start([*example, *words], tmp_path, 180, PYTHONPATH=path)
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    dropped = [float(share) for share in re.findall(r"dropped: (\S+)", output)]
    assert dropped[:3] == [0, 0, 0] and all(0.1 < share < 0.3 for share in dropped[3:])  # --dense-steps 3
