"""The contracts on the wire: `.proto` files of the package esper.v1, and their conversion."""
