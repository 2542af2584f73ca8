"""Who feeds whom: a read-only graph recorded from one eager run, and questions about it."""

from pennyweight.graph.graph import Graph, Node, Ref, Value
from pennyweight.graph.record import record

__all__ = ["Graph", "Node", "Ref", "Value", "record"]
