"""Package esper.v1. The `_pb2` files are generated: change the `.proto` and run `make proto`."""
