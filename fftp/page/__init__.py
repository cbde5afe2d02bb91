"""The parts of the HTML page that `python -m fftp.report` writes: text to markup, no files read but style and script."""
