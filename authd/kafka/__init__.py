"""The room of Kafka, which tells. The only home of aiokafka."""
