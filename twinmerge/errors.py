"""Every exception that twinmerge raises on purpose.

    TwinMergeError
    ├── CheckpointError          a folder we were handed cannot be read as a checkpoint of this base
    │   ├── CorruptCheckpoint    a weight file is truncated, unreadable, or disagrees with its index
    │   ├── UnsafePickle         a .bin file asks to run code while loading
    │   ├── UnsupportedCheckpoint  quantised weights, DoRA and other algebra that we cannot merge
    │   ├── MissingTensor        an expert lacks a tensor that the base and other experts have
    │   ├── ShapeMismatch        base and expert disagree about one tensor
    │   └── NotFinite            NaN or infinity in a tensor
    ├── RecipeError              the request is wrong; no weight was read yet
    ├── OutputError              the place to write to is taken, or full
    ├── ArtifactError            a file of ours cannot be trusted
    │   ├── UnsupportedFormat    written by a version that we do not know
    │   ├── CorruptArtifact      a digest or size differs from the manifest, or a file is missing
    │   └── RouterError          no router yet, or one fitted for other experts
    ├── UnsupportedModel         a running model cannot mix what the experts differ in exactly
    ├── InputError               an argument or a row of data that we cannot use
    └── MissingExtra             an optional dependency is needed

A message names the thing, what was expected, what came, and what to do next. Everything here is a
user's mistake or a file's fault: the command line prints it without a traceback and exits with 1.
"""


class TwinMergeError(Exception):
    """Base class: catch this to catch everything that twinmerge raises on purpose."""


class CheckpointError(TwinMergeError):
    """A folder or hub id cannot be read as a checkpoint of this base."""


class CorruptCheckpoint(CheckpointError):
    """A weight file is truncated, unreadable, or disagrees with its index."""


class UnsafePickle(CheckpointError):
    """A .bin file holds more than tensors: loading it would run code."""


class UnsupportedCheckpoint(CheckpointError):
    """A kind of checkpoint whose algebra is not a plain (low-rank) sum."""


class MissingTensor(CheckpointError):
    """An expert lacks a tensor that the base and other experts have."""


class ShapeMismatch(CheckpointError):
    """Base and expert disagree about the shape of one tensor."""


class NotFinite(CheckpointError):
    """NaN or infinity in a tensor."""


class RecipeError(TwinMergeError):
    """The request is wrong. Raised before any weight is read; lists all problems at once."""


class OutputError(TwinMergeError):
    """The output folder is taken, cannot be written, or the disk is full."""


class ArtifactError(TwinMergeError):
    """A file of an artifact cannot be trusted."""


class UnsupportedFormat(ArtifactError):
    """The artifact was written by a format version that this release does not know."""


class CorruptArtifact(ArtifactError):
    """A digest or size differs from the manifest, or a file is missing."""


class RouterError(ArtifactError):
    """The artifact has no router yet, or one that was fitted for other experts."""


class UnsupportedModel(TwinMergeError):
    """The experts differ in something that a running model cannot mix exactly."""


class InputError(TwinMergeError):
    """An argument or a row of data that cannot be used."""


class MissingExtra(TwinMergeError):
    """An optional dependency is needed; the message holds the install line."""


def did_you_mean(word: str, known: list[str]) -> str:
    """` Did you mean 'x'?` where something known is close, else an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def first_line(problem: Exception) -> str:
    """Of what another library says, for a message of ours."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
