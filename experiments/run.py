"""``python experiments/run.py {fit,validate,test,predict} --config math.yaml [--config opsd.yaml] [--key value]``"""

from ogls.cli import main

if __name__ == "__main__":
    main()
