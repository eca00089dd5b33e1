"""RabbitMQ in front of the scheduler: jobs wait there, and anyone may post some."""
