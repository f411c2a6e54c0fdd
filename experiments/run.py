"""Trains, evaluates, tries prompts and exports.

python experiments/run.py {fit,validate,test,predict} --config math.yaml [--config opsd.yaml] [--key value]
python experiments/run.py generate PROMPT --config math.yaml [--ckpt_path FILE] [--n 4]
python experiments/run.py export --ckpt_path runs/NAME/checkpoints/best.ckpt --to FOLDER
"""

import os
import sys

_STAGES, _QUIET = ("fit", "validate", "test", "predict"), {"-h", "--help", "--print_config"}
if sys.argv[1:2] and sys.argv[1] in _STAGES and not _QUIET & {*sys.argv} and "LOCAL_RANK" not in os.environ:
    print(f"{sys.argv[1]} in {os.getcwd()}: reading the configuration", file=sys.stderr, flush=True)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported

from ogls.system.startup import defer_torchmetrics  # noqa: E402 - the line above comes before what takes seconds

defer_torchmetrics()

from ogls.cli import main  # noqa: E402 - Lightning comes in here

if __name__ == "__main__":
    main()
