"""``python experiments/run.py {fit,validate,test,predict} --config math.yaml [--config opsd.yaml] [--key value]``"""

from ogls.system.startup import defer_torchmetrics

defer_torchmetrics()

from ogls.cli import main  # noqa: E402 - Lightning comes in here

if __name__ == "__main__":
    main()
