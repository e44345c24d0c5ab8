"""Plans a run before it starts: time, memory, cost and layouts. No run imports it."""

from base import share_comm

share_comm()
