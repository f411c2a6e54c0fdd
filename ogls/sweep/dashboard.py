"""optuna-dashboard shows a study with the names of its metrics, notes, and the files of its report.

    pip install optuna-dashboard
    optuna-dashboard sqlite:///sweeps.db --artifact-dir runs/dashboard

Names and files are Optuna's own. Notes are the dashboard's, and are written where it is installed.
"""

from __future__ import annotations

import mimetypes
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import optuna
from optuna import Study
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from ogls.sweep.definition import Settings
from ogls.tracking.address import masked


def folder(settings: Settings) -> Path:
    """Returns the folder of the dashboard's files, which all studies in one folder share."""
    return settings.folder / "dashboard"


def command(settings: Settings) -> str | None:
    """Returns the command that opens the study; None where a proxy stands before its storage."""
    if settings.storage.startswith("grpc://"):
        return None
    words = ["optuna-dashboard", masked(settings.storage), "--artifact-dir", str(folder(settings))]
    return shlex.join(words)


def note(about: Study | optuna.Trial, text: str) -> None:
    """Writes what the dashboard shows beside a study or a trial, in Markdown; nothing where it is not installed."""
    with suppress(ImportError):
        from optuna_dashboard import save_note  # pyright: ignore[reportMissingImports] - an extra of the project

        save_note(about, text)


def show_files(settings: Settings, study: Study, files: Sequence[Path]) -> None:
    """Puts files among the study's artifacts; those of the same names are replaced.

    Args:
        settings: options of the sweep's command line
        study: Optuna's study
        files: files of the report
    """
    folder(settings).mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(str(folder(settings)))
    known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study)}
    for file in files:
        if file.name in known:
            with file.open("rb") as content:
                store.write(known[file.name], content)
        else:
            kind = mimetypes.guess_type(file.name)[0] or "text/plain"
            upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=study, mimetype=kind)
