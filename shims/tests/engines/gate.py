"""A vLLM logits processor that changes nothing, and holds an engine up: while the file that `GATE` names is there, no answer gets longer than
`HELD_AT` tokens."""

import os
import time

from vllm.v1.sample.logits_processor import LogitsProcessor

GATE = "KVSTORE_TEST_GATE"
HELD_AT = 100


class Gate(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        self.file, self.answers = os.environ[GATE], {}

    @classmethod
    def validate_params(cls, sampling_params):
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits):
        return logits

    def update_state(self, batch_update) -> None:
        for index, _, _, answer in batch_update.added if batch_update else ():
            self.answers[index] = answer
        while max(map(len, self.answers.values()), default=0) >= HELD_AT and os.path.exists(self.file):
            time.sleep(0.005)
