"""Agents: the base class to subclass."""

from seedcore.agents.ray_agent import Heartbeat, RayAgent, SummaryStats

__all__ = ["Heartbeat", "RayAgent", "SummaryStats"]
