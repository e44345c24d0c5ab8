"""Computes the relay of another rank's rows: the rank with the same index in its node. No torch here."""

from collections.abc import Sequence


class Relays:
    """Members of an expert group and their nodes, which are renumbered from 0 in ascending order."""

    node_of: tuple[int, ...]  # node of each member
    members_of: tuple[tuple[int, ...], ...]  # members of each node by their index in the group, ascending

    def __init__(self, member_nodes: Sequence[int]) -> None:
        nodes = sorted(set(member_nodes))
        self.node_of = tuple(nodes.index(node) for node in member_nodes)
        self.members_of = tuple(
            tuple(place for place, node in enumerate(self.node_of) if node == number) for number in range(len(nodes))
        )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.members_of)

    @property
    def num_most_members(self) -> int:
        """Number of members of the fullest node."""
        return max(map(len, self.members_of))

    def relay(self, place: int, node: int) -> int:
        """Returns the member that relays rows of member `place` into a node; on its own node, itself."""
        own = self.members_of[self.node_of[place]]
        there = self.members_of[node]
        return there[own.index(place) % len(there)]

    def sources(self, relay: int) -> tuple[int, ...]:
        """Returns the members of other nodes whose rows a member relays into its node, ascending."""
        node = self.node_of[relay]
        return tuple(
            place for place, home in enumerate(self.node_of) if home != node and self.relay(place, node) == relay
        )

    def rails(self) -> tuple[tuple[int, ...], ...]:
        """Splits the members into most sets that hold their members' relays: one per index if nodes are equal."""
        # Connected components of the graph "relays rows of".
        unseen = set(range(len(self.node_of)))
        found = []
        while unseen:
            rail = set()
            pending = [min(unseen)]
            while pending:
                place = pending.pop()
                if place not in rail:
                    rail.add(place)
                    pending += self.sources(place)
                    pending += [self.relay(place, node) for node in range(self.num_nodes)]
            unseen -= rail
            found.append(tuple(sorted(rail)))
        return tuple(found)
