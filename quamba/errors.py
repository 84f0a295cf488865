"""Errors that are the user's to fix. The command line prints their text alone, without a traceback."""


class QuambaError(Exception):
    """Something given to quamba is wrong. The message names the thing and the way out. Exit code 1."""


class CheckpointError(QuambaError):
    """A model's files are missing, damaged, contradictory or of an unknown kind."""


class RecipeError(QuambaError):
    """A recipe holds an unknown key, an illegal value, or asks for what the family can't do."""


class DataError(QuambaError):
    """A text, task file or tokenizer can't be used."""
