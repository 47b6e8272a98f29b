"""The schema's history, as Alembic revisions with plain SQL inside.

Written to be expanded first and contracted a release later: a revision must leave the schema usable by the release
before.
"""
