"""Conversations for tests."""

from __future__ import annotations

from lora_kit.data.messages import Conversation, Message


def conversation(*turns: tuple[str, str], tools: str = "", variables: str = "") -> Conversation:
    """Build a conversation of roles and texts."""
    return Conversation(tuple(Message(role, text) for role, text in turns), tools, variables)
