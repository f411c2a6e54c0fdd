"""The command line is LightningCLI, with errors of one line.

Configurations may be stacked (several ``--config``) and refer to their own values (``${...}``).
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse._postponed_annotations
import jsonargparse._typehints
import yaml
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse._util import NestedArg
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ogls.rollout.servers
import ogls.rollout.transformers
import ogls.rollout.vllm
import ogls.tasks.chains
import ogls.tasks.families
import ogls.tasks.function
import ogls.tasks.reasoning_gym
import ogls.tasks.tables
from ogls import export, generate
from ogls.callbacks import RunRecorder
from ogls.callbacks.best import BestCheckpoint, newest_run
from ogls.callbacks.checkpoint_io import SoundCheckpoints, read_manifest
from ogls.callbacks.conclusion import improvement, next_commands
from ogls.data import RolloutDataModule
from ogls.help import list_classes
from ogls.lessons.prompts import Prompts
from ogls.lessons.reflection.reflector import ReflectionLimits
from ogls.methods import Method
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy, quickest_dtype
from ogls.records import Sampling
from ogls.rollout.accuracy import Evaluation, Subset
from ogls.system.exits import DiskFailed, RunEnded, unwritable
from ogls.system.library_warnings import LibraryWarnings
from ogls.system.ranges import within
from ogls.system.suggestions import in_one_line, one_line
from ogls.system.yaml_text import find_config, read_strictly
from ogls.tracking import Tracker, tracker_of
from ogls.tracking.config import given, parameters
from ogls.tracking.files import CHECKPOINTS, check_checkpoint
from ogls.training import SETTINGS, callbacks, check_settings, refused, validate_first

PROJECT = Path(__file__).resolve().parents[1]
_ABOUT = "On-policy self-distillation of language models: trains, evaluates, tries prompts and exports."


_PARTS = (
    *(SelfDistillation, RolloutDataModule, Method, Policy, Sampling, Evaluation, Subset),
    *(ReflectionLimits, Prompts, Lora, Trainer, Tracker),
)
_KEYS = {name for part in _PARTS for name in inspect.signature(part).parameters}
_KEYS |= {"seed_everything", "trainer", "model", "data", "method", "policy", "allow_changes"}


def _forget_arguments(parser: Any, before: Any, now: Any) -> None:
    """Drops the arguments of a class that another one replaces, so that a named method is that method as published."""
    if before and "init_args" in before and before["class_path"] != now["class_path"]:
        before.pop("init_args")


def _hints(of: Any, names: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the types of a class's fields; those that it inherits are read by the names of the file they stand in."""
    if inspect.isclass(of):
        with suppress(NameError):  # of what is imported for type checkers alone
            return get_type_hints(of)
    return get_type_hints(of, names, more)


_as_choice = jsonargparse._typehints.subclass_spec_as_namespace


def _null_kept(value: Any, before: Any = None) -> Any:
    """Keeps the null of ``--method.steering.alpha null``, which jsonargparse makes the text "None" at such depth."""
    if isinstance(value, NestedArg) and value.val is None and "." in value.key:
        value = NestedArg(value.key, "null")
    return _as_choice(value, before)


jsonargparse._typehints.subclass_spec_as_namespace = _null_kept
jsonargparse._typehints.discard_init_args_on_class_path_change = _forget_arguments  # jsonargparse's keeps what fits
# jsonargparse's reads all of them by the names of the last file.
jsonargparse._postponed_annotations.get_type_hints = _hints  # pyright: ignore[reportPrivateImportUsage]
_MODE = "omegaconf+"
read_strictly(_MODE)


@contextmanager
def _settings_refused() -> Iterator[None]:
    """Whatever is raised about settings while this context is entered becomes a ValueError of one line."""
    try:
        yield
    except RecursionError as error:
        raise ValueError("the configuration refers to itself in a circle") from error
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(where + str(error).partition("\n")[0] + _NO_ENVIRONMENT * ("oc.env" in str(error))) from error
    except ValueError as error:
        raise ValueError(one_line(str(error))) from error


_NO_ENVIRONMENT = ": what it reads would be in config.yaml and in MLflow; programs read their secrets from there alone"


class _Parser(LightningArgumentParser):
    """This parser says in one line what is wrong, and what may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        sys.exit(_complain(in_one_line(message, _KEYS, ogls.__all__)))


class OglsCLI(LightningCLI):
    """The command line makes one method and one policy, and hands both to module and data.

    `fit` validates once before the first step, so that every run knows where it began.
    """

    asked: str | None = None
    """Subcommand that the command line begins with; None where it begins otherwise."""

    library_warnings: LibraryWarnings | None = None
    """Warnings that were kept from the terminal, for the run's folder; None where they are shown."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        subcommands: Any = parser._subcommands_action  # `main` runs these
        about = "Writes a trained model as a folder for transformers, peft and vLLM."
        subcommands.add_subcommand("export", self.init_parser(), help=about)
        about = "Prints completions of prompts, to try a model or a checkpoint."
        subcommands.add_subcommand("generate", self.init_parser(), help=about)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Makes the parser of the subcommand that is asked for; the others, which take as long, are there by name."""
        if self.asked not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # its table; StepProgress prints all with intervals
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the keys ``method`` and ``policy``."""
        about = "choice of what is learned and from whom: a published method, or one with changed choices"
        parser.add_argument("--method", type=Method, required=True, help=about)
        parser.add_class_arguments(Policy, "policy")
        parser.add_argument(
            "--allow_changes", action="store_true", help="let --ckpt_path go on with another configuration"
        )
        for half in ("model", "data"):
            for shared in ("method", "policy"):
                parser.link_arguments(shared, f"{half}.{shared}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, and looks at those that no class of the project has.

        Raises:
            ValueError: an argument cannot work; the message is one line.
        """
        self.arguments = args
        with _settings_refused():
            super().parse_arguments(parser, args)
        config: Any = self.config
        config = config[config.subcommand] if "subcommand" in config else config
        for section in ("trainer", "model", "data", "policy"):
            if not isinstance(config[section], Namespace):
                raise ValueError(f"{section}: expected keys with their values, got {config[section]!r}")
        if not isinstance(config.seed_everything, bool):
            within("seed_everything", config.seed_everything, "[0, 4294967295]")
        check_settings(vars(config.trainer))

    def instantiate_classes(self) -> None:
        """Makes all objects; what they refuse becomes a ValueError of one line."""
        if (checkpoint := self._get(self.config, "ckpt_path")) not in (None, "last"):
            check_checkpoint(Path(checkpoint))
        with _settings_refused():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns the trainer, with sound checkpoints and a tracker that knows method and seed."""
        settings = self._get(self.config_init, "trainer")
        self.trainer_defaults["callbacks"] = callbacks(vars(settings))
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        try:
            trainer = super().instantiate_trainer(plugins=[*plugins, SoundCheckpoints()], **kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise refused(error, vars(self._get(self.config, "trainer"))) from error
        if self.subcommand is not None:
            config = self.config[self.subcommand].clone()
            if self.subcommand == "fit":  # a run that goes on is still the same
                config.ckpt_path, config.allow_changes = None, False
            text = self._parser(self.subcommand).dump(config, skip_none=False)
            self._configuration = text, parameters(yaml.safe_load(text))
        if tracker := tracker_of(trainer):  # it needs them to find a checkpoint of the same method
            arguments = sys.argv[1:] if self.arguments is None else self.arguments
            tracker.describe(
                self._method_of_weights(), self.datamodule.seed, given(arguments), self.subcommand or "fit"
            )
            if self.library_warnings is not None:
                self.library_warnings.folder = lambda: tracker.run_folder
            if self.subcommand is not None:
                tracker.configure(*self._configuration)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, RunRecorder) and self.subcommand == "fit":
                callback.allow_changes = bool(self._get(self.config, "allow_changes"))
        return trainer

    def _method_of_weights(self) -> str:
        """Returns the name of the method that is trained, or of the one that trained the checkpoint to be looked at."""
        checkpoint = None if self.subcommand == "fit" else self._get(self.config, "ckpt_path")
        trained_by = None if checkpoint is None else read_manifest(Path(checkpoint)).get("method")
        if trained_by in (None, self.model.method.name):
            return self.model.method.name
        rank_zero_only(print)(f"{checkpoint} was trained by {trained_by}, by which {self.subcommand} is named")
        return trained_by

    def _parse_ckpt_path(self) -> None:
        """Does nothing: configuration comes from files and command line, and no checkpoint overrides it."""

    def before_fit(self) -> None:
        """Validates the student before the first step of a new run."""
        tracker, anew = tracker_of(self.trainer), False
        if self.config.fit.ckpt_path == "last" and tracker is not None:
            anew = self._begins_anew(tracker)
        if self.config.fit.ckpt_path is None and tracker is not None:
            tracker.begin(anew)
            if self.trainer.is_global_zero:
                print(f"Run {tracker.run_name}; folder: {tracker.run_folder}; MLflow: {tracker.ui_command}", flush=True)
        for logger in self.trainer.loggers:
            if logger is not tracker:
                logger.log_hyperparams({**self._configuration[1], "method": self.model.method.name})
        if self.config.fit.ckpt_path is None:
            try:
                validate_first(self.trainer, self.model, self.datamodule)
            except ValueError:  # of problems or weights that cannot be used
                if tracker is not None:
                    tracker.leave()
                raise

    def after_fit(self) -> None:
        """Says what the run has changed, and what to do next."""
        tracker, kept = tracker_of(self.trainer), self.trainer.checkpoint_callback
        if tracker is None or not self.trainer.is_global_zero or not isinstance(kept, BestCheckpoint):
            return
        if said := improvement(tracker.run_folder):
            print(said)
        if Path(kept.best_model_path).is_file():
            told = next_commands(
                sys.argv[0],
                tracker.run_folder,
                Path(kept.best_model_path),
                tracker.experiment,
                f"val/avg_at_{self.datamodule.evaluation.samples}",
                tracker.tracking_uri,
            )
            print(f"Next:\n{told}", flush=True)

    def _begins_anew(self, tracker: Tracker) -> bool:
        """A run that was killed before its first checkpoint has nothing to go on from but its folder."""
        run = newest_run(tracker)
        if run is None or any((run / CHECKPOINTS).glob("*.ckpt")):
            return False
        print(f"{run.name} has no checkpoint yet: it begins anew")
        tracker.resume(None, run)
        for config in (self.config, self.config_init):
            config.fit.ckpt_path = None  # pyright: ignore[reportAttributeAccessIssue]
        return True


def find_configs(args: list[str]) -> list[str]:
    """Returns the arguments with the full path of every configuration.

    ``--config math.yaml`` is the file in the working directory, or else the one in the project's experiments.
    """
    found = list(args)
    for i, arg in enumerate(found):
        flag, equals, name = arg.partition("=")
        if arg in ("--config", "-c") and i + 1 < len(found):
            found[i + 1] = find_config(found[i + 1], PROJECT / "experiments")
        elif flag == "--config" and equals:
            found[i] = f"--config={find_config(name, PROJECT / 'experiments')}"
    return found


def _unwritable(error: OSError, exporting: bool) -> int:
    cure = "another place (--trainer.logger.init_args.folder), then go on by --ckpt_path last"
    _complain(
        f"{error.filename or 'the run'}: {(error.strerror or str(error)).lower()}; make room or choose "
        + ("another folder by --to" if exporting else cure)
    )
    return DiskFailed.exit_code


def _complain(message: str) -> int:
    with suppress(OSError):  # stderr may go to a full disk
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def build(args: list[str] | None = None, run: bool = True, kind: type[OglsCLI] = OglsCLI) -> OglsCLI:
    """Parses arguments, makes all objects, and runs the subcommand.

    Args:
        args: arguments to parse; None takes those of the command line
        run: whether the subcommand is run; if not, there is none among the arguments
        kind: class that makes the objects
    """
    sys.path += [str(Path.cwd()), str(PROJECT / "experiments")]  # for classes of the user's own
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.clear_resolver("oc.env")  # the resolved configuration is written down
    OmegaConf.register_resolver("quickest_dtype", quickest_dtype, replace=True)
    if args is None:
        sys.argv[1:] = find_configs(sys.argv[1:])
    list_classes(sys.argv[1:] if args is None else args)
    first = (sys.argv[1:] if args is None else args)[:1]
    OglsCLI.asked = first[0] if run and first and first[0] in OglsCLI.subcommands() else None
    return kind(
        SelfDistillation,
        RolloutDataModule,
        args=None if args is None else find_configs(args),
        run=run,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=None,
        parser_class=_Parser,
        parser_kwargs={"description": _ABOUT, "parser_mode": _MODE, "allow_abbrev": False},  # half a name is a typo
        trainer_defaults={
            "logger": {"class_path": f"{Tracker.__module__}.{Tracker.__name__}"},
            **SETTINGS,
        },
    )


def main() -> None:
    """Runs the command line, as ``experiments/run.py`` does, and ends with an exit code of `ogls.system.exits`."""
    exporting = sys.argv[1:2] == ["export"]
    with ended_well(exporting), LibraryWarnings() as kept:
        OglsCLI.library_warnings = kept
        if exporting:
            export.main(sys.argv[2:])
        elif sys.argv[1:2] == ["generate"]:
            generate.main(sys.argv[2:], partial(build, run=False))
        else:
            build()


@contextmanager
def ended_well(exporting: bool = False) -> Iterator[None]:
    """What ends a program for a reason that its user can mend becomes one line and an exit code.

    Args:
        exporting: whether a disk that fails is that of an export, and not of a run
    """
    try:
        yield
    except RunEnded as ended:
        _complain(str(ended))
        sys.exit(ended.exit_code)
    except OSError as error:
        if not unwritable(error):
            raise
        sys.exit(_unwritable(error, exporting))
    except MisconfigurationException as error:  # what Lightning says of its settings once the run is made
        sys.exit(_complain(one_line(str(error))))
    except SyntaxError as error:  # of a file of the user's own
        sys.exit(_complain(f"{error.filename}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"))
    except ValueError as error:
        # What is raised here on purpose is for the user; all else shows where it comes from, such as a method's code.
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not Path(last.filename).is_relative_to(PROJECT / "ogls") or not (last.line or "").startswith("raise "):
            raise
        sys.exit(_complain(str(error)))
