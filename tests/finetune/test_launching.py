"""Two processes on the CPU: the losses of one process with the double batch."""

import numpy as np
import pytest

pytest.importorskip("trl")

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.finetune.run import finetune
from tests.finetune.make import adapter_of, losses, settings, texts_file, tiny

pytestmark = pytest.mark.slow
LORA = {"r": 4, "alpha": 8}
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
use_cpu: true
num_processes: 1
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base") / "gemma3", "gemma3_text")


def test_two_processes_are_one_with_the_double_batch(base, tmp_path):
    data = texts_file(tmp_path)
    one = finetune(settings(data, tmp_path / "one", lora=LORA, sft={"per_device_train_batch_size": 4}), base)
    two = finetune(settings(data, tmp_path / "two", lora=LORA, devices=2, validation=0), base)
    assert np.abs(np.subtract(losses(two.outcome.log), losses(one.outcome.log))).max() <= 1e-5
    found, expected = adapter_of(two.adapter), adapter_of(one.adapter)
    for name, value in expected.items():  # as in test_training.py: Adam's first steps magnify rounding
        assert np.linalg.norm(found[name] - value) <= 1e-3 * np.linalg.norm(value), name


def test_a_configuration_file_of_accelerate_is_passed_on(base, tmp_path):
    (tmp_path / "accelerate.yaml").write_text(CONFIG)
    data = texts_file(tmp_path)
    plain = finetune(settings(data, tmp_path / "plain", lora=LORA), base)
    launched = finetune(
        settings(data, tmp_path / "out", lora=LORA, accelerate_config=str(tmp_path / "accelerate.yaml")), base
    )
    assert losses(launched.outcome.log) == losses(plain.outcome.log)
    with pytest.raises(UsageError, match="there is no such file"):
        finetune(settings(data, tmp_path / "no", lora=LORA, accelerate_config="nothing.yaml"), base)


def test_a_failure_of_a_process_is_told(base, tmp_path):
    asked = settings(texts_file(tmp_path), tmp_path / "out", lora=LORA, devices=2, sft={"learning_rate": 1e30})
    with pytest.raises(DeployError, match="the loss is no number"):
        finetune(asked, base)
