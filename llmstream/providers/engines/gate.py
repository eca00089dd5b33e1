"""Who may enter llama.cpp now: it stops a generation only when it next hears from it, so nobody waits inside."""

from __future__ import annotations

import threading
from collections import deque


class Ticket:
    """One choice of one generation on its way through the gate."""

    def __init__(self) -> None:
        self.cancelled = False
        self.prefill = 0
        self.inside = False


class Gate:
    """Lets in at most ``slots`` at once, first come first served, and prompts that share a batch or else one by one.

    llama.cpp fills each batch with one prompt before it looks at the next. A prompt that waited for another inside
    would report no progress, and could not be stopped until the other was through.
    """

    def __init__(self, slots: int, batch: int) -> None:
        self._slots, self._batch = slots, batch
        self._inside, self._prefill = 0, 0
        self._line: deque[Ticket] = deque()
        self._changed = threading.Condition()

    def enter(self, ticket: Ticket, prompt_tokens: int) -> bool:
        """Waits for a slot; False when the ticket was cancelled instead."""
        with self._changed:
            self._line.append(ticket)
            self._changed.wait_for(lambda: ticket.cancelled or self._has_room(ticket, prompt_tokens))
            self._line.remove(ticket)
            if not ticket.cancelled:
                self._inside += 1
                self._prefill += prompt_tokens
                ticket.inside, ticket.prefill = True, prompt_tokens
            self._changed.notify_all()
            return not ticket.cancelled

    def prefilled(self, ticket: Ticket) -> None:
        """The ticket's prompt is read."""
        if ticket.prefill:
            with self._changed:
                self._prefill -= ticket.prefill
                ticket.prefill = 0
                self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """The ticket's slot is free; harmless when it never entered."""
        self.prefilled(ticket)
        with self._changed:
            self._inside -= ticket.inside
            ticket.inside = False
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def _has_room(self, ticket: Ticket, prompt_tokens: int) -> bool:
        fits = not self._prefill or self._prefill + prompt_tokens <= self._batch
        return self._line[0] is ticket and self._inside < self._slots and fits
