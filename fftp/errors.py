"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input. Its message is one sentence: what is wrong, where, and what to do about it.

    Commands print the sentence and end with exit code 2; nothing else in the project turns an exception into a message.
    """
