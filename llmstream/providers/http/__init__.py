"""A lean HTTP/1.1 client for upstreams that stream: from the socket to the reader without a task in between."""
