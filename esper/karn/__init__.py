"""Karn: invents blueprints, and breeds what did well."""
