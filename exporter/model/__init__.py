"""The Llama in plain torch, the one op that is special to it, and the graph that is traced from both."""
