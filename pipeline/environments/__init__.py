"""Environments: conversations and games that answer the policy turn by turn and reward its replies."""
