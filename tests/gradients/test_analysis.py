"""What identifies a measurement of gradients."""

import json
from types import SimpleNamespace

from support import settings_for

from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions, GradientUnit
from lora_tradeoffs.measuring.subjects import Subject


def test_a_run_that_was_trained_again_is_measured_again(tmp_path):
    subject = Subject("run", 6, Checkpoint("run", 6, tmp_path), {}, "similar", True, True)
    base = SimpleNamespace(digest="base")
    analysis = GradientAnalysis(settings_for(), base, GradientOptions(3, 4, "fp32"))
    analysis.task = lambda subject, name: SimpleNamespace(fingerprint=name)
    requests = []
    for digest in ("a", "b", "b"):
        files = {
            name: {"size": 1, "sha256": value}
            for name, value in {"model.safetensors": digest, "optimizer.pt": "c"}.items()
        }
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
        unit = GradientUnit(subject, "similar", ("sst2", "mnli"))
        requests.append(analysis.full_request(unit))
    assert requests[0] != requests[1] == requests[2]
