"""Trains, evaluates, tries prompts and exports.

python experiments/run.py {fit,validate,test,predict} --config math.yaml [--config opsd.yaml] [--key value]
python experiments/run.py generate PROMPT --config math.yaml [--ckpt_path FILE] [--n 4]
python experiments/run.py export --ckpt_path runs/NAME/checkpoints/best.ckpt --to FOLDER
"""

from ogls.system.startup import defer_torchmetrics

defer_torchmetrics()

from ogls.cli import main  # noqa: E402 - Lightning comes in here

if __name__ == "__main__":
    main()
