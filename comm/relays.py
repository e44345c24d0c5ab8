"""Who takes whose rows into a node: the rank of the same index there, as arithmetic on places of an expert group.

A rank's rows for another node go to one rank of it, the relay, which spreads them. Nodes may hold unequal numbers of
the group's ranks. No torch here.
"""

from collections.abc import Sequence


class Relays:
    """An expert group's members by place, and the nodes on which they lie, renumbered from 0 in ascending order.

    Attributes:
        node_of: the node's number, of each member.
        members_of: the members' places, of each node, ascending.
    """

    node_of: tuple[int, ...]
    members_of: tuple[tuple[int, ...], ...]

    def __init__(self, member_nodes: Sequence[int]) -> None:
        """Groups members by node; `member_nodes`: the node of each member, by place."""
        nodes = sorted(set(member_nodes))
        self.node_of = tuple(nodes.index(node) for node in member_nodes)
        self.members_of = tuple(
            tuple(place for place, node in enumerate(self.node_of) if node == number) for number in range(len(nodes))
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the group."""
        return len(self.members_of)

    @property
    def num_most_members(self) -> int:
        """Members of the fullest node."""
        return max(map(len, self.members_of))

    def relay(self, place: int, node: int) -> int:
        """Returns the member that takes rows of member `place` into a node: itself into its own."""
        own, there = self.members_of[self.node_of[place]], self.members_of[node]
        return there[own.index(place) % len(there)]

    def sources(self, relay: int) -> tuple[int, ...]:
        """Returns the members of other nodes whose rows a member takes into its node, ascending."""
        node = self.node_of[relay]
        return tuple(
            place for place, home in enumerate(self.node_of) if home != node and self.relay(place, node) == relay
        )

    def rails(self) -> tuple[tuple[int, ...], ...]:
        """Cuts the members into as many sets as possible, so that each member's relays are all in its set.

        With equally full nodes: a set for each index, one member of every node.
        """
        unseen = set(range(len(self.node_of)))
        found = []
        while unseen:
            rail, ahead = set(), [min(unseen)]
            while ahead:
                place = ahead.pop()
                if place not in rail:
                    rail.add(place)
                    ahead += self.sources(place)
                    ahead += [self.relay(place, node) for node in range(self.num_nodes)]
            unseen -= rail
            found.append(tuple(sorted(rail)))
        return tuple(found)
