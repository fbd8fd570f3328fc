"""What ``auto`` means: the connectors, projection or VAE that a file lacks, found by content in the user's folders.

Only headers are read. A file beside the given one is preferred, then one that holds nothing else (a companion rather than another model); when the
candidates disagree about the LTX-2 version, the user is asked to choose. A file that cannot be read is skipped with one warning.
"""

import logging
import os
from collections import OrderedDict
from functools import lru_cache

from ..ltx2_core.files.errors import CheckpointError
from ..ltx2_core.files.opened import open_model
from ..ltx2_core.files.text import visible
from ..ltx2_core.loading.identify import identify, require_version
from . import folders

logger = logging.getLogger(__name__)

KEPT_REPORTS = 512

_reports = OrderedDict()  # (path, size, modification time) -> FileReport, or the error of a file that cannot be read


class Load:
    """The files of one load, each opened once and handed on open. A context manager: files that nobody took are closed at its end."""

    def __init__(self):
        self._open, self._taken = {}, set()  # both by real path, since a folder may link to a file twice

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for path, file in self._open.items():
            if path not in self._taken:
                file.close()

    def discard(self):
        """Close every file at the end: the load was only a look."""
        self._taken.clear()

    def open(self, path):
        """The open ModelFile of a path."""
        self._taken.add(os.path.realpath(path))
        return self._opened(path)

    def _opened(self, path):
        place = os.path.realpath(path)
        if place not in self._open:
            self._open[place] = open_model(path)
        return self._open[place]

    def model(self, path):
        """The open file of a model. Raises CheckpointError when it is one that this pack does not run, before anything else is looked for."""
        file = self.open(path)
        if identify(file).refusal is not None:
            raise CheckpointError(file.report.refusal)
        return file

    def connectors(self, model, choice, audio=False):
        """The open files with the connectors that ``model`` lacks: none, one, or two. audio: the audio connector is needed too."""
        report = identify(model)
        if choice != folders.AUTO:
            return [self.open(folders.path("ltx2_gguf_connectors", choice))]
        if not report.has("dit"):
            return []  # the loader names what is wrong with a file that holds no transformer
        wanted = [] if report.has("connector") else [("embeddings connectors", lambda other: other.has("connector"))]
        if audio and "connector" not in report.audio_parts:
            wanted.append(("audio connector", lambda other: "connector" in other.audio_parts))
        candidates = wanted and self._candidates(
            "ltx2_gguf_connectors", None, lambda other: other.version == report.version, near=model.path
        )
        found = []
        while wanted:
            best = max(candidates, key=lambda other: sum(fits(other) for _, fits in wanted), default=None)
            rest = [(what, fits) for what, fits in wanted if best is None or not fits(best)]
            if len(rest) == len(wanted):
                raise CheckpointError(
                    f"{model.name} contains no {wanted[0][0]}, and no file in your folders has those of LTX-{report.version}; "
                    "download an 'embeddings_connectors' file of the same model into models/text_encoders."
                )
            logger.info("%s from %s", wanted[0][0], visible(best.path))
            found.append(self.open(best.path))
            wanted = rest
        return found

    def vae(self, model, choice):
        """The open file with the video VAE of this model; None when there is none."""
        report = identify(model)
        if choice != folders.AUTO:
            file = self.open(folders.path("ltx2_gguf_vaes", choice))
            require_version(file, "vae", report.version)
            return file
        if report.has("vae"):
            return model
        return self._find("ltx2_gguf_vaes", "vae", lambda other: other.version == report.version, near=model.path)

    def projection(self, gemma, choice, audio=False):
        """The open file with the text projection for this Gemma; audio: one for sound too, where there is any.

        Raises CheckpointError when there is none, or two for different versions.
        """
        if choice != folders.AUTO:
            return self.open(folders.path("ltx2_gguf_projections", choice))
        report = identify(gemma)
        if report.kind != "gemma" or report.has("projection"):
            return gemma  # the text encoder's loader says what the file is
        wanted = report.config.width * report.config.num_hidden_states
        gemma4 = report.config.generation == 4  # its projection has the size of Gemma 3's, and another meaning

        def fits(other):
            return other.projection_inputs == wanted and (other.version == "2.5") == gemma4

        fitting = self._candidates("ltx2_gguf_projections", "projection", fits, near=gemma.path)
        if not fitting:
            raise CheckpointError(
                f"No file in your folders has a text projection for {report.title} ({gemma.name}); "
                "download the model's 'text_projection' or 'embeddings_connectors' file into models/text_encoders, or choose a model file that contains it."
            )
        if audio:
            fitting = [
                found for found in fitting if found.version == "2.0" or "projection" in found.audio_parts
            ] or fitting
        versions = {found.version: os.path.basename(found.path) for found in fitting}
        if len(versions) > 1:
            named = " and ".join(f"{visible(name)} (LTX-{version})" for version, name in sorted(versions.items()))
            raise CheckpointError(
                f"Your folders have text projections for two versions: {named}; choose the one of your model in 'projection_file'."
            )
        logger.info("text projection from %s", visible(fitting[0].path))
        return self.open(fitting[0].path)

    def audio_vae(self, choice):
        """The open files with the audio VAE and its vocoder: the chosen one, or what the folders have, in one file or two."""
        if choice != folders.AUTO:
            return [self.open(folders.path("ltx2_gguf_audio_vaes", choice))]
        reports = self._candidates(
            "ltx2_gguf_audio_vaes", None, lambda other: {"vae", "vocoder"} & set(other.audio_parts), near=""
        )
        whole = [report for report in reports if {"vae", "vocoder"} <= set(report.audio_parts)]
        halves = [next((r for r in reports if part in r.audio_parts), None) for part in ("vae", "vocoder")]
        chosen = whole[:1] or [half for half in halves if half is not None]
        versions = {report.version for report in (whole or reports)} - {None}
        if len(versions) > 1:
            raise CheckpointError(
                "Your folders have audio VAEs of LTX-2 and of LTX-2.3; choose the one of your model in 'audio_vae_file'."
            )
        if not chosen:
            raise CheckpointError(
                "No file in your folders has the audio VAE of LTX-2 or LTX-2.3; download an 'audio_vae' file of your model into models/vae."
            )
        logger.info("audio VAE from %s", ", ".join(visible(report.path) for report in chosen))
        return [self.open(report.path) for report in chosen]

    def vision(self, gemma, choice):
        """The open file with Gemma's vision part, or None for ``auto``: the text encoder's loader looks into Gemma's own file."""
        return None if choice == folders.AUTO else self.open(folders.path("ltx2_gguf_text_encoders", choice))

    def _find(self, key, part, fits, near):
        found = self._candidates(key, part, fits, near)
        if not found:
            return None
        logger.info("%s from %s", part or "audio part", visible(found[0].path))
        return self.open(found[0].path)

    def _candidates(self, key, part, fits, near):
        """Reports of files under ``key`` that hold ``part`` and fit: beside ``near`` first, then files with the fewest other parts, then by name."""
        reports = [
            report
            for name in folders.files(key)
            if (report := self._report(key, name)) and (part is None or report.has(part)) and fits(report)
        ]
        folder = os.path.dirname(os.path.realpath(near))
        return sorted(
            reports, key=lambda r: (os.path.dirname(os.path.realpath(r.path)) != folder, len(r.parts), r.path)
        )

    def _report(self, key, name):
        """What a file in the user's folders is, None when it cannot be read: it is another model's business, and no reason to stop this one."""
        stamp = name
        try:
            path = folders.path(key, name)
            info = os.stat(path)
            stamp = (path, info.st_size, info.st_mtime_ns)
            if stamp not in _reports:
                _remember(stamp, identify(self._opened(path)))
        except (ValueError, OSError) as error:
            if stamp not in _reports:
                logger.warning("%s is skipped: %s", visible(name), visible(error))
                _remember(stamp, None)
        return _reports[stamp]


def resolved(first, *others):
    """What a load would take now, for the host's question whether a node has to run again: [(path, size, time) or None, ...].

    Each argument is (method of ``Load``, key, choice, further arguments); the first file is given to the methods of the others. When the load would stop
    with a sentence, that stands in the list. Files are opened only when something in the folders has changed since the last question.
    """
    places = {path for _, key, choice, *_ in (first, *others) for path in _paths(key, choice)}
    listing = tuple(sorted((path, *stamp) for path in places if (stamp := _stamp(path))))
    return list(_resolved(first, others, listing))


def stamps(key, choice):
    """[(path, size, time), ...] of the files that a choice may take: for ``auto`` all under ``key``."""
    return sorted((path, *stamp) for path in _paths(key, choice) if (stamp := _stamp(path)))


@lru_cache(maxsize=64)
def _resolved(first, others, listing):
    found = []
    try:
        with Load() as load:
            method, key, choice = first
            model = getattr(load, method)(folders.path(key, choice))
            files = [model]
            for method, _, choice, *more in others:
                answer = getattr(load, method)(model, choice, *more)
                files += answer if isinstance(answer, list) else [answer]
            found = [None if file is None else (str(file.path), *folders.stamp(file.path)) for file in files]
            load.discard()
    except (ValueError, OSError) as error:
        found = [str(error)]
    return tuple(found)


def _paths(key, choice):
    names = folders.files(key) if choice == folders.AUTO else [choice]
    for name in names:
        try:
            yield folders.path(key, name)
        except FileNotFoundError:
            continue


def _stamp(path):
    try:
        return folders.stamp(path)
    except OSError:
        return None


def _remember(stamp, report):
    _reports[stamp] = report
    while len(_reports) > KEPT_REPORTS:
        _reports.popitem(last=False)
