"""The only home of aiokafka: the producer and its recovery."""
