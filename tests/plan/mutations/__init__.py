"""Small changes to legal plans: some that must be harmless, others that usually are not.

One file for each thing that a change is made to: importing them fills :data:`BREAKING` and :data:`HARMLESS`.
"""

from tests.plan.mutations import legal, memory, order, regions, spans, tags  # noqa: F401
from tests.plan.mutations.base import BREAKING, HARMLESS, Mutation, Skip, mutate, preserve
from tests.plan.mutations.corrupt import corrupt
from tests.plan.mutations.order import ORDER_ONLY

__all__ = ["BREAKING", "HARMLESS", "ORDER_ONLY", "Mutation", "Skip", "corrupt", "mutate", "preserve"]
